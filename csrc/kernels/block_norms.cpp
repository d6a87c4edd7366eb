// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_norms.h"

#include "kernels/block_panels.h"

namespace pybsp {

template <typename T>
void block_norms(const T* weight, const BlockGrid& given, float* norms, int threads) {
  const BlockRowKernels<T>& kernels = block_row_kernels<T>();
  const BlockGrid grid = without_row_ends(given);
  // Read once: long rows, whatever the height.
  const Panels panels = split_into_panels(grid, kPanelCols * grid.block_rows);
  for_each_panel(grid, panels, threads, [&](int64_t, const Panel& panel) {
    kernels.block_norms(weight + panel.row * grid.row_stride + panel.col, panel.shape,
                        norms + panel.block);
  });
}

template void block_norms(const float*, const BlockGrid&, float*, int);
template void block_norms(const Bfloat16*, const BlockGrid&, float*, int);

}  // namespace pybsp
