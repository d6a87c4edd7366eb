// SPDX-License-Identifier: Apache-2.0
#include "kernels/token_lane_schedule.h"

#include <algorithm>

namespace pybsp {
namespace {

constexpr int32_t kTileRows = 8;
// Parts end where the largest square of outputs that is transposed in registers ends.
constexpr int64_t kSquare = 16;
// Columns of single-row blocks of 8 bits from which on they are multiplied by column.
constexpr int64_t kMinInt8Run = 16;

// Weights of bfloat16 by row: their float32 form stays in L1 while it is multiplied.
constexpr int64_t kWideValues = 2048;

// Values and output rows after which a part ends.
struct PartLimits {
  int64_t values;
  int64_t rows;
};

bool is_by_column(const BlockSparseView& view) {
  return view.block_rows == 1 && view.block_cols >= kMinColumnRun;
}

// At least 16 parts where the matrix allows it, so that a few threads balance. By
// column, enough blocks that every block column has four full tiles of them, because a
// tile of few rows loads its inputs for few multiply-adds, and few enough that the sums
// of the part stay near.
PartLimits part_limits(const BlockSparseView& view, bool by_column) {
  const int64_t block_size = view.block_rows * view.block_cols;
  const int64_t grid_rows = view.out_features / view.block_rows;
  const int64_t total = view.crow_indices[grid_rows] * block_size;
  if (by_column) return {4 * kTileRows * view.in_features, 1024};
  return {std::clamp<int64_t>(total / 16, 2048, 16384), 128};
}

std::vector<int32_t> split_rows(const BlockSparseView& view, PartLimits limits) {
  const int64_t grid_rows = view.out_features / view.block_rows;
  const int64_t block_size = view.block_rows * view.block_cols;
  std::vector<int32_t> boundaries{0};
  for (int64_t row = 1; row <= grid_rows; ++row) {
    const int64_t first = boundaries.back();
    const int64_t held =
        (view.crow_indices[row] - view.crow_indices[first]) * block_size;
    const bool full =
        held >= limits.values || (row - first) * view.block_rows >= limits.rows;
    const bool whole =
        row * view.block_rows % kSquare == 0 || view.block_rows > 4 * kSquare;
    if ((full && whole) || row == grid_rows) {
      boundaries.push_back(static_cast<int32_t>(row));
    }
  }
  return boundaries;
}

// Groups the blocks of block rows [first, last) by block column, in tiles of at most
// kTileRows and of similar height.
void append_column_tiles(const BlockSparseView& view, int32_t first, int32_t last,
                         Schedule& schedule) {
  const size_t grid_cols = static_cast<size_t>(view.in_features / view.block_cols);
  std::vector<int32_t> next(grid_cols + 1, 0);
  for (int32_t b = view.crow_indices[first]; b < view.crow_indices[last]; ++b) {
    ++next[static_cast<size_t>(view.col_indices[b]) + 1];
  }
  const int32_t begin = static_cast<int32_t>(schedule.blocks.size());
  for (size_t col = 0; col < grid_cols; ++col) {
    const int32_t count = next[col + 1];
    next[col + 1] = next[col] + count;
    const int32_t tiles = (count + kTileRows - 1) / kTileRows;
    for (int32_t tile = 1; tile <= tiles; ++tile) {
      schedule.tile_ptr.push_back(begin + next[col] + count * tile / tiles);
    }
  }
  schedule.blocks.resize(static_cast<size_t>(begin + next[grid_cols]));
  schedule.rows.resize(schedule.blocks.size());
  for (int32_t row = first; row < last; ++row) {
    for (int32_t b = view.crow_indices[row]; b < view.crow_indices[row + 1]; ++b) {
      const size_t col = static_cast<size_t>(view.col_indices[b]);
      const size_t slot = static_cast<size_t>(begin + next[col]++);
      schedule.blocks[slot] = b;
      schedule.rows[slot] = row;
    }
  }
}

std::vector<int64_t> costs_of_parts(const BlockSparseView& view,
                                    const std::vector<int32_t>& rows) {
  std::vector<int64_t> costs;
  for (size_t part = 0; part + 1 < rows.size(); ++part) {
    const int64_t blocks =
        view.crow_indices[rows[part + 1]] - view.crow_indices[rows[part]];
    // Storing and transposing an output costs about eight multiply-adds.
    costs.push_back((blocks * view.block_cols + (rows[part + 1] - rows[part]) * 8) *
                    view.block_rows);
  }
  return costs;
}

Schedule schedule_of_parts(const BlockSparseView& view, bool by_column,
                           PartLimits limits) {
  Schedule schedule;
  schedule.by_column = by_column;
  schedule.part_rows = split_rows(view, limits);
  schedule.part_costs = costs_of_parts(view, schedule.part_rows);
  if (!by_column) return schedule;
  schedule.part_tiles.push_back(0);
  schedule.tile_ptr.push_back(0);
  for (int64_t part = 0; part < schedule.num_parts(); ++part) {
    append_column_tiles(view, schedule.part_rows[static_cast<size_t>(part)],
                        schedule.part_rows[static_cast<size_t>(part) + 1], schedule);
    schedule.part_tiles.push_back(static_cast<int32_t>(schedule.tile_ptr.size()) - 1);
  }
  return schedule;
}

// By row a tile is one row unless its neighbours keep the same columns, as those of a
// dense layer do, and loads its inputs for single products. By column tiles are full,
// but load and store their sums, which 16 inputs are enough for.
bool int8_by_column(const BlockSparseView& view) {
  if (view.block_rows != 1 || view.block_cols % 4 != 0 ||
      view.block_cols < kMinInt8Run) {
    return false;
  }
  int64_t alike = 0;
  for (int64_t row = 1; row < view.out_features; ++row) {
    const int32_t* const columns = view.col_indices + view.crow_indices[row - 1];
    const int32_t* const own = view.col_indices + view.crow_indices[row];
    const int32_t* const end = view.col_indices + view.crow_indices[row + 1];
    alike += std::equal(columns, own, own, end);
  }
  return 2 * alike < view.out_features - 1;
}

}  // namespace

Schedule token_lane_schedule(const BlockSparseView& view) {
  const bool by_column = is_by_column(view);
  return schedule_of_parts(view, by_column, part_limits(view, by_column));
}

Schedule bfloat16_schedule(const BlockSparseView& view) {
  const bool by_column = is_by_column(view);
  PartLimits limits = part_limits(view, by_column);
  if (!by_column) limits.values = kWideValues;
  return schedule_of_parts(view, by_column, limits);
}

Schedule int8_schedule(const BlockSparseView& view) {
  const bool by_column = int8_by_column(view);
  PartLimits limits = part_limits(view, by_column);
  if (!by_column) limits.values *= 4;
  return schedule_of_parts(view, by_column, limits);
}

}  // namespace pybsp
