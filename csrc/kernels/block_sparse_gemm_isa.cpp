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

// Where a tile starts: its first row of y, set to the bias or, past the first chunk of
// blocks, as the chunk before left it.
struct TileStart {
  const float* bias;
  bool resume;
};

template <int kRows, int kVectors>
inline void start_sums(TileStart start, const float* y, Vec (&acc)[kRows][kVectors]) {
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const Vec bias = start.bias ? set1(start.bias[row]) : zero();
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      acc[row][v] = start.resume ? load(y + (row * kVectors + v) * kLanes) : bias;
    }
  }
}

// The extents of a block, and the floats from the inputs of one block column to those
// of the next. As a variable, x costs one multiplication, on a port without an FMA
// unit; as a constant it would become shifts and additions that compete with the FMAs.
// 32 bits: kMaxInFeatures.
struct BlockSteps {
  int64_t rows;
  int64_t cols;
  uint32_t x;
};

// Columns ahead of the one that is multiplied whose inputs are fetched into L1.
constexpr int64_t kPrefetchColumns = 8;

inline int64_t prefetch_blocks(int64_t block_cols) {
  return block_cols >= kPrefetchColumns ? 1 : kPrefetchColumns / block_cols;
}

// acc[row][v] += sum over blocks and their columns of weight[row] * x[col][v].
// kRows consecutive outputs of one block row; w points at the first of them in the
// first block. kPrefetch reads col_indices prefetch_blocks past the last block.
template <int kRows, int kVectors, bool kOneColumn, bool kPrefetch>
void multiply_tile(const int32_t* col_indices, int64_t blocks, const float* w,
                   BlockSteps steps, const float* x_tile, TileStart start, float* y) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t cols = kOneColumn ? 1 : steps.cols;
  const int64_t ahead = kPrefetch ? prefetch_blocks(cols) : 0;
  const auto inputs = [&](int32_t col) {
    return x_tile + static_cast<uint32_t>(col) * steps.x;
  };
  Vec acc[kRows][kVectors];
  start_sums(start, y, acc);
  const int32_t* const end = col_indices + blocks;
  for (; col_indices != end; ++col_indices) {
    const float* x = inputs(*col_indices);
    const float* later = kPrefetch ? inputs(col_indices[ahead]) : nullptr;
    for (int64_t col = 0; col < cols; ++col) {
      if constexpr (kPrefetch) {
        PYBSP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          prefetch(later + col * kWidth + v * kLanes);
        }
      }
      Vec in[kVectors];
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) in[v] = load(x + v * kLanes);
      PYBSP_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const Vec weight = set1(w[row]);
        PYBSP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          acc[row][v] = fma(weight, in[v], acc[row][v]);
        }
      }
      w += steps.rows;
      x += kWidth;
    }
  }
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store(y + row * kWidth + v * kLanes, acc[row][v]);
    }
  }
}

using TileFunction = void (*)(const int32_t*, int64_t, const float*, BlockSteps,
                              const float*, TileStart, float*);

template <int kVectors, bool kOneColumn, bool kPrefetch>
TileFunction tile_function(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_tile<1, kVectors, kOneColumn, kPrefetch>;
    case 2:
      return multiply_tile<2, kVectors, kOneColumn, kPrefetch>;
    case 3:
      return multiply_tile<3, kVectors, kOneColumn, kPrefetch>;
    case 4:
      return multiply_tile<4, kVectors, kOneColumn, kPrefetch>;
    default:
      break;
  }
  if constexpr (kTileRows<kVectors> == 8) {
    switch (rows) {
      case 5:
        return multiply_tile<5, kVectors, kOneColumn, kPrefetch>;
      case 6:
        return multiply_tile<6, kVectors, kOneColumn, kPrefetch>;
      case 7:
        return multiply_tile<7, kVectors, kOneColumn, kPrefetch>;
      default:
        return multiply_tile<8, kVectors, kOneColumn, kPrefetch>;
    }
  }
  return multiply_tile<4, kVectors, kOneColumn, kPrefetch>;
}

// Bytes of inputs that the tiles of one block row read one after the other: a part of
// L1 that leaves room for weights and sums.
constexpr int64_t kChunkBytes = 24 * 1024;

// Block rows [first, last). Blocks taller than a tile are taken in chunks whose inputs
// stay in L1 for all tiles of the block row; their sums wait in y_tile.
template <int kVectors, bool kOneColumn, bool kPrefetch>
void multiply_block_rows(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x_tile, const float* bias, float* y_tile) {
  constexpr int64_t kRows = kTileRows<kVectors>;
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t r = weight.block_rows, c = weight.block_cols;
  const TileFunction first_tile =
      tile_function<kVectors, kOneColumn, kPrefetch>(r < kRows ? r : kRows);
  const TileFunction whole = tile_function<kVectors, kOneColumn, false>(kRows);
  const TileFunction rest = tile_function<kVectors, kOneColumn, false>(r % kRows);
  const BlockSteps steps{r, c, static_cast<uint32_t>(c * kWidth)};
  const int64_t fit = kChunkBytes / (c * kWidth * int64_t{sizeof(float)});
  const int64_t all = weight.in_features / c;
  const int64_t chunk = r <= kRows ? all + 1 : fit > 0 ? fit : 1;
  for (int64_t row = first; row < last; ++row) {
    const int64_t begin = weight.crow_indices[row], end = weight.crow_indices[row + 1];
    float* y = y_tile + (row - first) * r * kWidth;
    int64_t b = begin;
    do {
      const int64_t blocks = end - b < chunk ? end - b : chunk;
      for (int64_t sub = 0; sub < r; sub += kRows) {
        const TileFunction tile = sub == 0           ? first_tile
                                  : sub + kRows <= r ? whole
                                                     : rest;
        tile(weight.col_indices + b, blocks, weight.values + b * r * c + sub, steps,
             x_tile, {bias ? bias + row * r + sub : nullptr, b > begin},
             y + sub * kWidth);
      }
      b += blocks;
    } while (b < end);
  }
}

// Bytes of a tile of inputs from which on fetching ahead pays: a few times L1. Under
// that, the three more loads a column cost more than the misses.
constexpr int64_t kPrefetchBytes = 256 * 1024;

template <int kVectors, bool kOneColumn>
void multiply_rows_of(const BlockSparseView& weight, int64_t first, int64_t last,
                      const float* x_tile, const float* bias, float* y_tile) {
  constexpr int64_t kWidth = kVectors * kLanes;
  int64_t row = first;
  if (weight.in_features * kWidth * int64_t{sizeof(float)} > kPrefetchBytes) {
    // All but the last rows of the matrix have columns to read ahead.
    const int64_t limit = weight.crow_indices[weight.out_features / weight.block_rows] -
                          prefetch_blocks(weight.block_cols);
    row = last;
    while (row > first && weight.crow_indices[row] > limit) --row;
    multiply_block_rows<kVectors, kOneColumn, true>(weight, first, row, x_tile, bias,
                                                    y_tile);
    y_tile += (row - first) * weight.block_rows * kWidth;
  }
  multiply_block_rows<kVectors, kOneColumn, false>(weight, row, last, x_tile, bias,
                                                   y_tile);
}

template <int kVectors>
void multiply_rows_of_width(const BlockSparseView& weight, int64_t first, int64_t last,
                            const float* x_tile, const float* bias, float* y_tile) {
  if (weight.block_cols == 1) {
    multiply_rows_of<kVectors, true>(weight, first, last, x_tile, bias, y_tile);
  } else {
    multiply_rows_of<kVectors, false>(weight, first, last, x_tile, bias, y_tile);
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
