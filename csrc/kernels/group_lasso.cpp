// SPDX-License-Identifier: Apache-2.0
#include "kernels/group_lasso.h"

#include <vector>

#include "kernels/block_panels.h"

namespace pybsp {
namespace {

// Elements of a panel that is read twice: the weight's 128 KB, and as much of a
// gradient, stay in L2 in between.
constexpr int64_t kReadTwice = 1 << 15;

}  // namespace

template <typename T>
double group_lasso_grad(T* grad, int64_t grad_stride, const T* weight,
                        const float* factors, float lam, const BlockGrid& given,
                        int threads) {
  const bool alike = grad_stride == given.row_stride;
  const BlockGrid grid = alike ? without_row_ends(given) : given;
  if (alike) grad_stride = grid.row_stride;
  const BlockRowKernels<T>& kernels = block_row_kernels<T>();
  const Panels panels = split_into_panels(grid, kReadTwice);
  std::vector<double> penalties(static_cast<size_t>(panels.count));
  for_each_panel(grid, panels, threads, [&](int64_t index, const Panel& panel) {
    penalties[static_cast<size_t>(index)] = kernels.group_lasso_grad(
        grad + panel.row * grad_stride + panel.col, grad_stride,
        weight + panel.row * grid.row_stride + panel.col, panel.shape,
        factors + panel.block, lam);
  });
  double total = 0.0;
  for (double penalty : penalties) total += penalty;
  return static_cast<double>(lam) * total;
}

template <typename T>
void group_lasso_prox(T* weight, const float* thresholds, float step,
                      const BlockGrid& given, int threads) {
  const BlockGrid grid = without_row_ends(given);
  const BlockRowKernels<T>& kernels = block_row_kernels<T>();
  const Panels panels = split_into_panels(grid, kReadTwice);
  for_each_panel(grid, panels, threads, [&](int64_t, const Panel& panel) {
    kernels.group_lasso_prox(weight + panel.row * grid.row_stride + panel.col,
                             panel.shape, thresholds + panel.block, step);
  });
}

template <typename T>
void apply_block_mask(T* weight, const bool* mask, const BlockGrid& given,
                      int threads) {
  const BlockGrid grid = without_row_ends(given);
  const BlockRowKernels<T>& kernels = block_row_kernels<T>();
  const Panels panels = split_into_panels(grid, kPanelCols * grid.block_rows);
  for_each_panel(grid, panels, threads, [&](int64_t, const Panel& panel) {
    kernels.apply_block_mask(weight + panel.row * grid.row_stride + panel.col,
                             panel.shape, mask + panel.block);
  });
}

template double group_lasso_grad(float*, int64_t, const float*, const float*, float,
                                 const BlockGrid&, int);
template double group_lasso_grad(Bfloat16*, int64_t, const Bfloat16*, const float*,
                                 float, const BlockGrid&, int);
template void group_lasso_prox(float*, const float*, float, const BlockGrid&, int);
template void group_lasso_prox(Bfloat16*, const float*, float, const BlockGrid&, int);
template void apply_block_mask(float*, const bool*, const BlockGrid&, int);
template void apply_block_mask(Bfloat16*, const bool*, const BlockGrid&, int);

}  // namespace pybsp
