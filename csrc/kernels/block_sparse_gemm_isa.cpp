// SPDX-License-Identifier: Apache-2.0
// Tiles with tokens in lanes; see block_sparse_gemm.h for the layout.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Rows of accumulators for a tile that is kVectors wide. Thirty-two registers hold
// 8 x 3 accumulators, 3 inputs and a weight. Sixteen hold 4 x 3 + 3 + 1 (or 8 x 1); the
// two halves of eight outputs are then two passes over the inputs: 7 loads for 12 FMAs
// leaves the FMA units the limit, where 8 x 1 alone would need 9 loads for 8.
template <int kVectors>
constexpr int kTileRows = kRegisters >= 32 || kVectors == 1 ? 8 : 4;

// acc[row][v] += sum over blocks and their columns of weight[row] * x[col][v].
// kRows consecutive outputs of one block row; w points at the first of them in the
// first block.
template <int kRows, int kVectors, bool kOneColumn>
inline void multiply_tile(const int32_t* col_indices, int64_t blocks, const float* w,
                          int64_t block_rows, int64_t block_cols, const float* x_tile,
                          const float* bias, float* y) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec acc[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) acc[row][v] = set1(bias ? bias[row] : 0.0f);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const float* x = x_tile + col_indices[b] * (kOneColumn ? 1 : block_cols) * kWidth;
    for (int64_t col = 0; col < (kOneColumn ? 1 : block_cols); ++col) {
      Vec in[kVectors];
      for (int v = 0; v < kVectors; ++v) in[v] = load(x + v * kLanes);
      for (int row = 0; row < kRows; ++row) {
        const Vec weight = set1(w[row]);
        for (int v = 0; v < kVectors; ++v) {
          acc[row][v] = fma(weight, in[v], acc[row][v]);
        }
      }
      w += block_rows;
      x += kWidth;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v)
      store(y + row * kWidth + v * kLanes, acc[row][v]);
  }
}

using TileFunction = void (*)(const int32_t*, int64_t, const float*, int64_t, int64_t,
                              const float*, const float*, float*);

template <int kVectors, bool kOneColumn>
TileFunction tile_function(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_tile<1, kVectors, kOneColumn>;
    case 2:
      return multiply_tile<2, kVectors, kOneColumn>;
    case 3:
      return multiply_tile<3, kVectors, kOneColumn>;
    case 4:
      return multiply_tile<4, kVectors, kOneColumn>;
    default:
      break;
  }
  if constexpr (kTileRows<kVectors> == 8) {
    switch (rows) {
      case 5:
        return multiply_tile<5, kVectors, kOneColumn>;
      case 6:
        return multiply_tile<6, kVectors, kOneColumn>;
      case 7:
        return multiply_tile<7, kVectors, kOneColumn>;
      default:
        return multiply_tile<8, kVectors, kOneColumn>;
    }
  }
  return multiply_tile<4, kVectors, kOneColumn>;
}

template <int kVectors, bool kOneColumn>
void multiply_block_rows(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x_tile, const float* bias, float* y_tile) {
  constexpr int64_t kRows = kTileRows<kVectors>;
  const int64_t r = weight.block_rows;
  const TileFunction whole = tile_function<kVectors, kOneColumn>(kRows);
  const TileFunction rest = tile_function<kVectors, kOneColumn>(r % kRows);
  for (int64_t row = first; row < last; ++row) {
    const int64_t begin = weight.crow_indices[row];
    const int64_t blocks = weight.crow_indices[row + 1] - begin;
    const float* w = weight.values + begin * r * weight.block_cols;
    for (int64_t sub = 0; sub < r; sub += kRows) {
      (sub + kRows <= r ? whole : rest)(
          weight.col_indices + begin, blocks, w + sub, r, weight.block_cols, x_tile,
          bias ? bias + row * r + sub : nullptr,
          y_tile + ((row - first) * r + sub) * kVectors * kLanes);
    }
  }
}

template <int kVectors>
void multiply_rows_of_width(const BlockSparseView& weight, int64_t first, int64_t last,
                            const float* x_tile, const float* bias, float* y_tile) {
  if (weight.block_cols == 1) {
    multiply_block_rows<kVectors, true>(weight, first, last, x_tile, bias, y_tile);
  } else {
    multiply_block_rows<kVectors, false>(weight, first, last, x_tile, bias, y_tile);
  }
}

}  // namespace

void multiply_rows(const BlockSparseView& weight, int64_t first, int64_t last,
                   const float* x_tile, int vectors, const float* bias, float* y_tile) {
  switch (vectors) {
    case 1:
      return multiply_rows_of_width<1>(weight, first, last, x_tile, bias, y_tile);
    case 2:
      return multiply_rows_of_width<2>(weight, first, last, x_tile, bias, y_tile);
    default:
      return multiply_rows_of_width<3>(weight, first, last, x_tile, bias, y_tile);
  }
}

namespace {

// Rows rows[0..kRows) of y += their runs of weights times the shared inputs x.
template <int kRows, int kVectors>
inline void multiply_runs(const int32_t* blocks, const int32_t* rows, int64_t first_row,
                          const float* values, int64_t run, const float* x, float* y) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const float* w[kRows];
  float* out[kRows];
  Vec acc[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    w[row] = values + blocks[row] * run;
    out[row] = y + (rows[row] - first_row) * kWidth;
    for (int v = 0; v < kVectors; ++v) acc[row][v] = load(out[row] + v * kLanes);
  }
  for (int64_t col = 0; col < run; ++col) {
    Vec in[kVectors];
    for (int v = 0; v < kVectors; ++v) in[v] = load(x + v * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const Vec weight = set1(w[row][col]);
      for (int v = 0; v < kVectors; ++v) {
        acc[row][v] = fma(weight, in[v], acc[row][v]);
      }
    }
    x += kWidth;
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) store(out[row] + v * kLanes, acc[row][v]);
  }
}

using RunsFunction = void (*)(const int32_t*, const int32_t*, int64_t, const float*,
                              int64_t, const float*, float*);

template <int kVectors>
RunsFunction runs_function(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_runs<1, kVectors>;
    case 2:
      return multiply_runs<2, kVectors>;
    case 3:
      return multiply_runs<3, kVectors>;
    case 4:
      return multiply_runs<4, kVectors>;
    default:
      break;
  }
  if constexpr (kTileRows<kVectors> == 8) {
    switch (rows) {
      case 5:
        return multiply_runs<5, kVectors>;
      case 6:
        return multiply_runs<6, kVectors>;
      case 7:
        return multiply_runs<7, kVectors>;
      default:
        return multiply_runs<8, kVectors>;
    }
  }
  return multiply_runs<4, kVectors>;
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
