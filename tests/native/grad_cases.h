// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm_cases.h"
#include "kernels/transposed_index.h"
#include "report.h"

namespace selftest {

// The gradients of one matrix for several numbers of tokens.
class GradCase {
 public:
  GradCase(GemmShape shape, double density, int64_t max_tokens, uint64_t seed);

  // dx and dW against double precision, bit-equal on 1, 2 and 3 threads.
  void check(Report& report, int64_t tokens) const;

 private:
  void check_x(Report& report, int64_t tokens, const std::string& what) const;
  void check_values(Report& report, int64_t tokens, const std::string& what) const;

  std::string name_;
  BlockSparse weight_;
  pybsp::TransposedIndex index_;
  std::vector<float> x_;   // one float longer: used from 1, never aligned
  std::vector<float> dy_;  // the same
};

}  // namespace selftest
