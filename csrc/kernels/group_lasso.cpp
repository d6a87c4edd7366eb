// SPDX-License-Identifier: Apache-2.0
#include "kernels/group_lasso.h"

#include <cmath>
#include <vector>

#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/threads.h"

namespace pybsp {
namespace {

// Calls body(i, scratch) for every block row with grid_cols floats of scratch.
template <typename Body>
void for_each_block_row(const BlockGrid& grid, int threads, Body body) {
  std::vector<float> scratch(static_cast<size_t>(threads * grid.grid_cols));
  parallel(threads, [&](int thread, int count) {
    const Range range = share(grid.grid_rows, thread, count);
    float* mine = scratch.data() + thread * grid.grid_cols;
    for (int64_t i = range.first; i < range.last; ++i) body(i, mine);
  });
}

BlockRow block_row(const BlockGrid& grid) {
  return {grid.row_stride, grid.block_rows, grid.block_cols, grid.grid_cols};
}

}  // namespace

double group_lasso_grad(float* grad, int64_t grad_stride, const float* weight,
                        const float* factors, float lam, const BlockGrid& grid,
                        int threads) {
  const Variants& isa = variants(active_isa());
  std::vector<double> penalties(static_cast<size_t>(grid.grid_rows));
  for_each_block_row(grid, threads, [&](int64_t i, float* scale) {
    const int64_t row = i * grid.block_rows;
    isa.block_squares(weight + row * grid.row_stride, block_row(grid), scale);
    double penalty = 0.0;
    for (int64_t j = 0; j < grid.grid_cols; ++j) {
      const float norm = std::sqrt(scale[j]);
      const float factor = factors[i * grid.grid_cols + j];
      penalty += static_cast<double>(factor) * static_cast<double>(norm);
      scale[j] = norm > 0.0f ? lam * factor / norm : 0.0f;
    }
    penalties[static_cast<size_t>(i)] = penalty;
    isa.add_scaled_blocks(grad + row * grad_stride, grad_stride,
                          weight + row * grid.row_stride, block_row(grid), scale);
  });
  double total = 0.0;
  for (double penalty : penalties) total += penalty;
  return static_cast<double>(lam) * total;
}

void group_lasso_prox(float* weight, const float* thresholds, const BlockGrid& grid,
                      int threads) {
  const Variants& isa = variants(active_isa());
  for_each_block_row(grid, threads, [&](int64_t i, float* scale) {
    float* row = weight + i * grid.block_rows * grid.row_stride;
    isa.block_squares(row, block_row(grid), scale);
    for (int64_t j = 0; j < grid.grid_cols; ++j) {
      const float norm = std::sqrt(scale[j]);
      const float threshold = thresholds[i * grid.grid_cols + j];
      scale[j] = norm <= threshold ? 0.0f : 1.0f - threshold / norm;
    }
    isa.scale_blocks(row, block_row(grid), scale);
  });
}

void apply_block_mask(float* weight, const bool* mask, const BlockGrid& grid,
                      int threads) {
  const Variants& isa = variants(active_isa());
  for_each_block_row(grid, threads, [&](int64_t i, float* scale) {
    for (int64_t j = 0; j < grid.grid_cols; ++j) {
      scale[j] = mask[i * grid.grid_cols + j] ? 1.0f : 0.0f;
    }
    isa.scale_blocks(weight + i * grid.block_rows * grid.row_stride, block_row(grid),
                     scale);
  });
}

}  // namespace pybsp
