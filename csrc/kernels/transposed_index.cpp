// SPDX-License-Identifier: Apache-2.0
#include "kernels/transposed_index.h"

#include <algorithm>

namespace pybsp {
namespace {

constexpr int32_t kTileRuns = 8;
// Features whose sums, three vectors each, stay in L1 while the runs are added to them.
constexpr int64_t kRunFeatures = 128;
// Weights of a part by block column, 64 KB, and its features.
constexpr int64_t kPartValues = 16384;
constexpr int64_t kPartFeatures = 256;

size_t at(int64_t i) { return static_cast<size_t>(i); }

void sort_by_column(const BlockSparseView& view, TransposedIndex& index) {
  const int64_t grid_rows = view.out_features / view.block_rows;
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
  for (int32_t row = 0; row < static_cast<int32_t>(grid_rows); ++row) {
    for (int32_t b = view.crow_indices[row]; b < view.crow_indices[row + 1]; ++b) {
      const int32_t slot = next[at(view.col_indices[b])]++;
      index.blocks[at(slot)] = b;
      index.row_indices[at(slot)] = row;
    }
  }
}

void split_columns(const BlockSparseView& view, TransposedIndex& index) {
  const int64_t grid_cols = view.in_features / view.block_cols;
  const int64_t block_size = view.block_rows * view.block_cols;
  const int64_t total = index.ccol_indices.back() * block_size;
  const int64_t values = std::clamp<int64_t>(total / 16, 2048, kPartValues);
  index.part_cols.push_back(0);
  for (int64_t col = 1; col <= grid_cols; ++col) {
    const int64_t first = index.part_cols.back();
    const int64_t features = (col - first) * view.block_cols;
    const int64_t held =
        (index.ccol_indices[at(col)] - index.ccol_indices[at(first)]) * block_size;
    const bool full = index.by_run ? features >= kRunFeatures
                                   : held >= values || features >= kPartFeatures;
    if (full || col == grid_cols) index.part_cols.push_back(static_cast<int32_t>(col));
  }
}

// Groups the runs of block columns [first, last) by block row, kTileRuns to a tile.
// Whole tiles come first and then those of every other size, so that the jump to the
// kernel of a size is predicted.
void append_tiles(const BlockSparseView& view, int32_t first, int32_t last,
                  TransposedIndex& index) {
  const int32_t grid_rows = static_cast<int32_t>(view.out_features / view.block_rows);
  const int32_t cols = static_cast<int32_t>(view.block_cols);
  std::vector<int32_t> count(at(grid_rows), 0);
  const int32_t begin = index.ccol_indices[at(first)];
  const int32_t end = index.ccol_indices[at(last)];
  for (int32_t i = begin; i < end; ++i) count[at(index.row_indices[at(i)])] += cols;
  // Where the next run of a block row goes, and the place at which it jumps from the
  // end of its whole tiles to its last one.
  std::vector<int32_t> next(at(grid_rows)), jump(at(grid_rows)), rest(at(grid_rows));
  int32_t slot = static_cast<int32_t>(index.runs.size());
  for (int32_t row = 0; row < grid_rows; ++row) {
    next[at(row)] = slot;
    for (int32_t n = count[at(row)]; n >= kTileRuns; n -= kTileRuns) {
      index.tile_ptr.push_back(slot += kTileRuns);
    }
    jump[at(row)] = slot;
  }
  for (int32_t size = kTileRuns - 1; size > 0; --size) {
    for (int32_t row = 0; row < grid_rows; ++row) {
      if (count[at(row)] % kTileRuns != size) continue;
      rest[at(row)] = slot;
      index.tile_ptr.push_back(slot += size);
    }
  }
  for (int32_t row = 0; row < grid_rows; ++row) {
    if (next[at(row)] == jump[at(row)]) next[at(row)] = rest[at(row)];
  }
  index.runs.resize(at(slot));
  index.run_features.resize(at(slot));
  for (int32_t col = first; col < last; ++col) {
    const int32_t last_block = index.ccol_indices[at(col + 1)];
    for (int32_t i = index.ccol_indices[at(col)]; i < last_block; ++i) {
      const size_t row = at(index.row_indices[at(i)]);
      for (int32_t j = 0; j < cols; ++j) {
        index.runs[at(next[row])] = index.blocks[at(i)] * cols + j;
        index.run_features[at(next[row])] = col * cols + j;
        if (++next[row] == jump[row]) next[row] = rest[row];
      }
    }
  }
}

}  // namespace

TransposedIndex transposed_index(const BlockSparseView& view) {
  TransposedIndex index;
  index.by_run = view.block_cols < kMinGatheredCols;
  sort_by_column(view, index);
  split_columns(view, index);
  if (!index.by_run) return index;
  index.run_rows.resize(index.blocks.size() * at(view.block_cols));
  for (size_t i = 0; i < index.blocks.size(); ++i) {
    for (int64_t j = 0; j < view.block_cols; ++j) {
      index.run_rows[at(index.blocks[i] * view.block_cols + j)] = index.row_indices[i];
    }
  }
  index.part_tiles.push_back(0);
  index.tile_ptr.push_back(0);
  for (int64_t part = 0; part < index.num_parts(); ++part) {
    append_tiles(view, index.part_cols[at(part)], index.part_cols[at(part + 1)], index);
    index.part_tiles.push_back(static_cast<int32_t>(index.tile_ptr.size()) - 1);
  }
  return index;
}

}  // namespace pybsp
