// SPDX-License-Identifier: Apache-2.0
#include "kernels/transposed_index.h"

#include <algorithm>

namespace pybsp {
namespace {

constexpr int32_t kTileRuns = 8;
// Features whose sums the runs of a part are added to. More of them leave fewer tiles
// with less than eight runs, which is worth more than sums in L1: 128 took up to a
// fifth longer.
constexpr int64_t kRunFeatures = 512;
// Weights of a part by block column, 64 KB, and its features.
constexpr int64_t kPartValues = 16384;
constexpr int64_t kPartFeatures = 256;

size_t at(int64_t i) { return static_cast<size_t>(i); }

// Parts of equal width for the runs, and of similar weight for the block columns.
std::vector<int32_t> split_columns(const BlockSparseView& view,
                                   const TransposedIndex& index) {
  const int32_t grid_cols = static_cast<int32_t>(view.in_features / view.block_cols);
  const int64_t block_size = view.block_rows * view.block_cols;
  std::vector<int32_t> boundaries{0};
  int64_t values = kPartValues;
  if (!index.by_run) {
    values = std::clamp<int64_t>(index.ccol_indices.back() * block_size / 16, 2048,
                                 kPartValues);
  }
  for (int32_t col = 1; col <= grid_cols; ++col) {
    const int32_t first = boundaries.back();
    const int64_t features = (col - first) * view.block_cols;
    bool full = features >= (index.by_run ? kRunFeatures : kPartFeatures);
    if (!index.by_run) {
      const int64_t blocks =
          index.ccol_indices[at(col)] - index.ccol_indices[at(first)];
      full = full || blocks * block_size >= values;
    }
    if (full || col == grid_cols) boundaries.push_back(col);
  }
  return boundaries;
}

void sort_by_column(const BlockSparseView& view, TransposedIndex& index) {
  const int32_t grid_rows = static_cast<int32_t>(view.out_features / view.block_rows);
  const int64_t grid_cols = view.in_features / view.block_cols;
  const int64_t nnz = view.crow_indices[grid_rows];
  index.ccol_indices.assign(at(grid_cols + 1), 0);
  for (int64_t b = 0; b < nnz; ++b) ++index.ccol_indices[at(view.col_indices[b] + 1)];
  for (int64_t col = 0; col < grid_cols; ++col) {
    index.ccol_indices[at(col + 1)] += index.ccol_indices[at(col)];
  }
  std::vector<int32_t> next(index.ccol_indices.begin(), index.ccol_indices.end() - 1);
  index.blocks.resize(at(nnz));
  index.row_indices.resize(at(nnz));
  for (int32_t row = 0; row < grid_rows; ++row) {
    for (int32_t b = view.crow_indices[row]; b < view.crow_indices[row + 1]; ++b) {
      const int32_t slot = next[at(view.col_indices[b])]++;
      index.blocks[at(slot)] = b;
      index.row_indices[at(slot)] = row;
    }
  }
}

// Groups the runs of each part by block row, kTileRuns to a tile. Within a part, whole
// tiles come first and then those of every other size, so that the jump to the kernel
// of a size is predicted.
void make_tiles(const BlockSparseView& view, TransposedIndex& index) {
  const int32_t grid_rows = static_cast<int32_t>(view.out_features / view.block_rows);
  const int32_t cols = static_cast<int32_t>(view.block_cols);
  const int64_t nnz = view.crow_indices[grid_rows];
  index.run_features.reserve(at(nnz * cols));
  for (int64_t b = 0; b < nnz; ++b) {
    for (int32_t j = 0; j < cols; ++j) {
      index.run_features.push_back(view.col_indices[b] * cols + j);
    }
  }
  // The first block of every block row that no part has taken.
  std::vector<int32_t> next(view.crow_indices, view.crow_indices + grid_rows);
  std::vector<RunTile> rests;
  index.part_tiles.push_back(0);
  for (int64_t part = 0; part < index.num_parts(); ++part) {
    const int32_t end_col = index.part_cols[at(part + 1)];
    rests.clear();
    for (int32_t row = 0; row < grid_rows; ++row) {
      int32_t run = next[at(row)] * cols;
      int32_t& b = next[at(row)];
      while (b < view.crow_indices[row + 1] && view.col_indices[b] < end_col) ++b;
      for (; run + kTileRuns <= b * cols; run += kTileRuns) {
        index.tiles.push_back({run, kTileRuns, row});
      }
      if (run < b * cols) rests.push_back({run, b * cols - run, row});
    }
    std::stable_sort(
        rests.begin(), rests.end(),
        [](const RunTile& x, const RunTile& y) { return x.count > y.count; });
    index.tiles.insert(index.tiles.end(), rests.begin(), rests.end());
    index.part_tiles.push_back(static_cast<int32_t>(index.tiles.size()));
  }
}

}  // namespace

TransposedIndex transposed_index(const BlockSparseView& view) {
  TransposedIndex index;
  index.by_run = view.block_cols < kMinGatheredCols;
  index.flat = view.block_rows < 4 && view.block_cols > view.block_rows;
  if (!index.by_run || index.flat) sort_by_column(view, index);
  index.part_cols = split_columns(view, index);
  if (index.by_run) make_tiles(view, index);
  return index;
}

}  // namespace pybsp
