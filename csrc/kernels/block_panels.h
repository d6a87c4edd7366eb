// SPDX-License-Identifier: Apache-2.0
// How the drivers of the training operations split a dense weight into panels, the unit
// of work of a thread. The split depends on the sizes alone, so that results do not
// depend on the number of threads.
#pragma once

#include <algorithm>

#include "kernels/block_norms.h"
#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/threads.h"

namespace pybsp {

// The kernels of the active instruction set for weights of type T.
template <typename T>
const BlockRowKernels<T>& block_row_kernels();
template <>
inline const BlockRowKernels<float>& block_row_kernels() {
  return *variants(active_isa()).float32;
}
template <>
inline const BlockRowKernels<Bfloat16>& block_row_kernels() {
  return *variants(active_isa()).bfloat16;
}

// Blocks of one row in a weight without gaps are those of one long row.
inline BlockGrid without_row_ends(BlockGrid grid) {
  const int64_t cols = grid.grid_cols * grid.block_cols;
  if (grid.block_rows != 1 || grid.row_stride != cols) return grid;
  grid.row_stride *= grid.grid_rows;
  grid.grid_cols *= grid.grid_rows;
  grid.grid_rows = 1;
  return grid;
}

struct Panels {
  int64_t blocks;  // in a panel, but for the last of a block row
  int64_t across;  // panels in a block row
  int64_t count;   // panels in all
};

// Panels of `elements` or fewer, if that leaves 128 of them in a row.
inline Panels split_into_panels(const BlockGrid& grid, int64_t elements) {
  if (grid.grid_rows == 0 || grid.grid_cols == 0) return {1, 0, 0};
  const int64_t cols = std::clamp<int64_t>(elements / grid.block_rows, 128, kPanelCols);
  const int64_t blocks = std::max<int64_t>(1, cols / grid.block_cols);
  const int64_t across = (grid.grid_cols + blocks - 1) / blocks;
  return {blocks, across, across * grid.grid_rows};
}

// One panel: what the kernels take, where it starts in the weight (element, with rows
// row_stride apart) and in arrays per block.
struct Panel {
  BlockRow shape;
  int64_t row;
  int64_t col;
  int64_t block;
};

// body(index, Panel) for every panel.
template <typename Body>
void for_each_panel(const BlockGrid& grid, Panels panels, int threads, Body body) {
  // A thread with less than this to do costs more than it saves.
  constexpr int64_t kLeastWork = 1 << 14;
  const int64_t work =
      grid.grid_rows * grid.grid_cols * grid.block_rows * grid.block_cols;
  const int64_t useful = std::min(panels.count, 1 + work / kLeastWork);
  const int used = static_cast<int>(std::min<int64_t>(threads, useful));
  parallel(used, [&](int thread, int count) {
    const Range range = share(panels.count, thread, count);
    for (int64_t i = range.first; i < range.last; ++i) {
      const int64_t row = i / panels.across;
      const int64_t first = i % panels.across * panels.blocks;
      const int64_t blocks = std::min(panels.blocks, grid.grid_cols - first);
      const bool last_in_row = first + blocks == grid.grid_cols;
      const bool last = i + 1 == panels.count;
      const int64_t down = last || !last_in_row ? 0 : grid.block_rows;
      const int64_t right = last ? 0 : (last_in_row ? -first : blocks);
      body(i, Panel{{grid.row_stride, grid.block_rows, grid.block_cols, blocks, down,
                     right * grid.block_cols},
                    row * grid.block_rows,
                    first * grid.block_cols,
                    row * grid.grid_cols + first});
    }
  });
}

}  // namespace pybsp
