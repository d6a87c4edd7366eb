// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm_cases.h"
#include "kernels/int8_weights.h"

namespace selftest {

// What the integers of a case are: random, or all at the ends of their ranges.
enum class Int8Values { random, extreme };

// One matrix of 8 bits and its inputs, against the formula of int8_products.h with
// scalars: every bit must be the same.
class Int8Case {
 public:
  Int8Case(GemmShape shape, double density, int64_t max_tokens, Int8Values kind,
           uint64_t seed);

  void check(Report& report, int64_t tokens) const;
  const pybsp::Schedule& schedule() const { return packed_.schedule(); }

 private:
  std::vector<float> expected(int64_t tokens, float input_scale) const;
  std::vector<float> computed(int64_t tokens, float input_scale, bool tiles,
                              int threads) const;

  std::string name_;
  BlockSparse weight_;
  std::vector<int8_t> q_;
  std::vector<float> scales_, bias_, x_;
  pybsp::Int8Weights packed_;
};

}  // namespace selftest
