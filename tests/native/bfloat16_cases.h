// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm_cases.h"

namespace selftest {

// One matrix of bfloat16 beside the same numbers in float32: every bit of their
// products must be the same.
class Bfloat16Case {
 public:
  Bfloat16Case(GemmShape shape, double density, int64_t max_tokens, uint64_t seed);

  void check(Report& report, int64_t tokens) const;
  const pybsp::Schedule& schedule() const { return schedule_; }

 private:
  // Of both at once, so that parts of either follow those of the other; the results of
  // the float32 matrix, of the bfloat16 one and of the latter alone.
  std::vector<std::vector<float>> products(int64_t tokens, bool tiles,
                                           int threads) const;

  std::string name_;
  BlockSparse weight_;  // holds only what bfloat16 can
  std::vector<pybsp::Bfloat16> bfloat16_;
  pybsp::Schedule float32_schedule_, schedule_;
  std::vector<float> bias_, x_;
};

}  // namespace selftest
