// SPDX-License-Identifier: Apache-2.0
// Single-row blocks, walked by block column; see token_lane_schedule.h.
#include "kernels/tile_rows.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Rows rows[0..kRows) of y += their runs of weights times the shared inputs x.
template <int kRows, int kVectors>
void multiply_row_runs(const int32_t* blocks, const int32_t* rows, int64_t first_row,
                       const float* values, int64_t run, const float* x, float* y) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const float* w[kRows];
  float* out[kRows];
  Vec acc[kRows][kVectors];
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    w[row] = values + blocks[row] * run;
    out[row] = y + (rows[row] - first_row) * kWidth;
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[row][v] = load(out[row] + v * kLanes);
  }
  for (int64_t col = 0; col < run; ++col) {
    Vec in[kVectors];
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = load(x + v * kLanes);
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec weight = set1(w[row][col]);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[row][v] = fma(weight, in[v], acc[row][v]);
      }
    }
    x += kWidth;
  }
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out[row] + v * kLanes, acc[row][v]);
  }
}

using RunsFunction = void (*)(const int32_t*, const int32_t*, int64_t, const float*,
                              int64_t, const float*, float*);

template <int kVectors>
RunsFunction runs_function(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_row_runs<1, kVectors>;
    case 2:
      return multiply_row_runs<2, kVectors>;
    case 3:
      return multiply_row_runs<3, kVectors>;
    case 4:
      return multiply_row_runs<4, kVectors>;
    default:
      break;
  }
  if constexpr (kTileRows<kVectors> == 8) {
    switch (rows) {
      case 5:
        return multiply_row_runs<5, kVectors>;
      case 6:
        return multiply_row_runs<6, kVectors>;
      case 7:
        return multiply_row_runs<7, kVectors>;
      default:
        return multiply_row_runs<8, kVectors>;
    }
  }
  return multiply_row_runs<4, kVectors>;
}

template <int kVectors>
void multiply_column_tiles(const BlockSparseView& weight, ColumnTiles tiles,
                           const float* x_tile, const float* bias, float* y_tile) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int64_t row = tiles.first_row; row < tiles.last_row; ++row) {
    const Vec start = set1(bias ? bias[row] : 0.0f);
    float* y = y_tile + (row - tiles.first_row) * kWidth;
    for (int v = 0; v < kVectors; ++v) store(y + v * kLanes, start);
  }
  for (int64_t tile = tiles.first_tile; tile < tiles.last_tile; ++tile) {
    int64_t i = tiles.tile_ptr[tile];
    const int64_t count = tiles.tile_ptr[tile + 1] - i;
    const float* x =
        x_tile + weight.col_indices[tiles.blocks[i]] * weight.block_cols * kWidth;
    // Five to eight rows on four rows of accumulators: two halves of similar height.
    const int64_t passes = (count + kTileRows<kVectors> - 1) / kTileRows<kVectors>;
    int64_t left = count;
    for (int64_t pass = passes; pass > 0; --pass) {
      const int64_t rows = (left + pass - 1) / pass;
      runs_function<kVectors>(rows)(tiles.blocks + i, tiles.rows + i, tiles.first_row,
                                    weight.values, weight.block_cols, x, y_tile);
      i += rows;
      left -= rows;
    }
  }
}

}  // namespace

void multiply_columns(const BlockSparseView& weight, ColumnTiles tiles,
                      const float* x_tile, int vectors, const float* bias,
                      float* y_tile) {
  switch (vectors) {
    case 1:
      return multiply_column_tiles<1>(weight, tiles, x_tile, bias, y_tile);
    case 2:
      return multiply_column_tiles<2>(weight, tiles, x_tile, bias, y_tile);
    default:
      return multiply_column_tiles<3>(weight, tiles, x_tile, bias, y_tile);
  }
}

}  // namespace pybsp::PYBSP_ISA
