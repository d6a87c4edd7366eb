// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/block_norms.h"
#include "report.h"

namespace selftest {

struct GridShape {
  int64_t grid_rows, grid_cols, r, c;
  int64_t gap;  // floats between the end of a row and the next, which must stay
};

// A random dense weight, a fifth of whose blocks are zero.
class GroupLassoCase {
 public:
  GroupLassoCase(GridShape shape, Random& random);
  void check(Report& report) const;

 private:
  void check_norms(Report& report) const;
  void check_grad(Report& report) const;
  void check_prox(Report& report) const;
  void check_mask(Report& report) const;
  void check_bfloat16(Report& report) const;

  int64_t blocks() const { return grid_.grid_rows * grid_.grid_cols; }
  // body(index into the weight) for every element of a block.
  template <typename Body>
  void for_each(int64_t block, Body body) const;
  template <typename Operation>
  std::vector<float> on_threads(Report& report, const std::string& what,
                                const std::vector<float>& start,
                                Operation operation) const;

  pybsp::BlockGrid grid_;
  std::string name_;
  std::vector<float> weight_, grad_, factors_;
  std::vector<double> norms_;  // exact to double precision
  double relative_;            // bound on the relative error of a norm
};

}  // namespace selftest
