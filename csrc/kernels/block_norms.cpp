// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_norms.h"

#include <cmath>

#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/threads.h"

namespace pybsp {

void block_norms(const float* weight, const BlockGrid& grid, float* norms,
                 int threads) {
  const Variants& isa = variants(active_isa());
  const BlockRow shape{grid.row_stride, grid.block_rows, grid.block_cols,
                       grid.grid_cols};
  parallel(threads, [&](int thread, int count) {
    const Range range = share(grid.grid_rows, thread, count);
    for (int64_t i = range.first; i < range.last; ++i) {
      float* row = norms + i * grid.grid_cols;
      isa.block_squares(weight + i * grid.block_rows * grid.row_stride, shape, row);
      for (int64_t j = 0; j < grid.grid_cols; ++j) row[j] = std::sqrt(row[j]);
    }
  });
}

}  // namespace pybsp
