// SPDX-License-Identifier: Apache-2.0
// Tiles with tokens in lanes; see block_sparse_gemm.h for the layout.
#include "kernels/tile_rows.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

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

// Columns ahead of the one that is multiplied whose inputs are fetched into L1.
constexpr int64_t kPrefetchColumns = 8;

inline int64_t prefetch_blocks(int64_t block_cols) {
  return block_cols >= kPrefetchColumns ? 1 : kPrefetchColumns / block_cols;
}

// acc[row][v] += sum over blocks and their columns of weight[row] * x[col][v].
// kRows consecutive outputs of one block row; w points at the first of them in the
// first block. kPrefetch reads col_indices prefetch_blocks past the last block.
template <int kRows, int kVectors, int kCols, bool kPrefetch>
void multiply_tile(const int32_t* col_indices, int64_t blocks, const float* w,
                   int64_t block_rows, int64_t block_cols, const float* x_tile,
                   TileStart start, int64_t fetch_ahead, float* y) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t cols = kCols > 0 ? kCols : block_cols;
  const int64_t ahead = kPrefetch ? prefetch_blocks(cols) : 0;
  Vec acc[kRows][kVectors];
  start_sums(start, y, acc);
  const int32_t* const end = col_indices + blocks;
  for (; col_indices != end; ++col_indices) {
    const float* x = x_tile + *col_indices * cols * kWidth;
    const float* later = x_tile + (kPrefetch ? col_indices[ahead] * cols * kWidth : 0);
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
      __builtin_prefetch(reinterpret_cast<const char*>(w) + fetch_ahead);
      w += block_rows;
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

using TileFunction = void (*)(const int32_t*, int64_t, const float*, int64_t, int64_t,
                              const float*, TileStart, int64_t, float*);

template <int kVectors, int kCols, bool kPrefetch>
TileFunction tile_function(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply_tile<1, kVectors, kCols, kPrefetch>;
    case 2:
      return multiply_tile<2, kVectors, kCols, kPrefetch>;
    case 3:
      return multiply_tile<3, kVectors, kCols, kPrefetch>;
    case 4:
      return multiply_tile<4, kVectors, kCols, kPrefetch>;
    default:
      break;
  }
  if constexpr (kTileRows<kVectors> == 8) {
    switch (rows) {
      case 5:
        return multiply_tile<5, kVectors, kCols, kPrefetch>;
      case 6:
        return multiply_tile<6, kVectors, kCols, kPrefetch>;
      case 7:
        return multiply_tile<7, kVectors, kCols, kPrefetch>;
      default:
        return multiply_tile<8, kVectors, kCols, kPrefetch>;
    }
  }
  return multiply_tile<4, kVectors, kCols, kPrefetch>;
}

// Bytes of inputs that the tiles of one block row read one after the other: a part of
// L1 that leaves room for weights and sums.
constexpr int64_t kChunkBytes = 24 * 1024;

// Block rows [first, last). Blocks taller than a tile are taken in chunks whose inputs
// stay in L1 for all tiles of the block row; their sums wait in y_tile.
template <int kVectors, int kCols, bool kPrefetch>
void multiply_block_rows(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x_tile, const float* bias, float* y_tile) {
  constexpr int64_t kRows = kTileRows<kVectors>;
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t r = weight.block_rows, c = weight.block_cols;
  const TileFunction first_tile =
      tile_function<kVectors, kCols, kPrefetch>(r < kRows ? r : kRows);
  const TileFunction whole = tile_function<kVectors, kCols, false>(kRows);
  const TileFunction rest = tile_function<kVectors, kCols, false>(r % kRows);
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
        tile(weight.col_indices + b, blocks, weight.values + b * r * c + sub, r, c,
             x_tile, {bias ? bias + row * r + sub : nullptr, b > begin},
             weight.fetch_ahead, y + sub * kWidth);
      }
      b += blocks;
    } while (b < end);
  }
}

// Eight outputs of a block row: its blocks, its weights of the first of them and where
// the sums go.
struct EightRows {
  const int32_t* cols;
  int64_t blocks;
  const float* w;
  float* y;
  int64_t fetch_ahead;
};

// acc[row] += the columns of the next block of `rows` for one vector of tokens.
template <int kCols, bool kAhead = true>
inline void add_block(EightRows& rows, int64_t block_rows, int64_t block_cols,
                      const float* x_tile, Vec (&acc)[8]) {
  const int64_t cols = kCols > 0 ? kCols : block_cols;
  const float* x = x_tile + *rows.cols++ * cols * kLanes;
  for (int64_t col = 0; col < cols; ++col) {
    const Vec in = load(x + col * kLanes);
    PYBSP_UNROLL
    for (int row = 0; row < 8; ++row) acc[row] = fma(set1(rows.w[row]), in, acc[row]);
    if constexpr (kAhead)
      __builtin_prefetch(reinterpret_cast<const char*>(rows.w) + rows.fetch_ahead);
    rows.w += block_rows;
  }
}

// A tile of one vector has eight sums, just as many as the FMA units keep in flight;
// two tiles side by side, whatever blocks they have, leave room for loads that come
// late.
template <int kCols>
void multiply_two_tiles(EightRows (&tiles)[2], int64_t block_rows, int64_t block_cols,
                        const float* x_tile, const float* bias) {
  Vec acc[2][8];
  PYBSP_UNROLL
  for (int t = 0; t < 2; ++t) {
    PYBSP_UNROLL
    for (int row = 0; row < 8; ++row) {
      acc[t][row] = bias ? set1(bias[8 * t + row]) : zero();
    }
  }
  EightRows first = tiles[0], second = tiles[1];
  const int64_t shared = first.blocks < second.blocks ? first.blocks : second.blocks;
  int64_t b = 0;
  for (; b + 2 <= shared; b += 2) {
    // Two blocks of one column are a line of weights.
    add_block<kCols>(first, block_rows, block_cols, x_tile, acc[0]);
    add_block<kCols, kCols != 1>(second, block_rows, block_cols, x_tile, acc[1]);
    add_block<kCols, kCols != 1>(first, block_rows, block_cols, x_tile, acc[0]);
    add_block<kCols>(second, block_rows, block_cols, x_tile, acc[1]);
  }
  for (; b < shared; ++b) {
    add_block<kCols>(first, block_rows, block_cols, x_tile, acc[0]);
    add_block<kCols>(second, block_rows, block_cols, x_tile, acc[1]);
  }
  for (b = shared; b < first.blocks; ++b) {
    add_block<kCols>(first, block_rows, block_cols, x_tile, acc[0]);
  }
  for (b = shared; b < second.blocks; ++b) {
    add_block<kCols>(second, block_rows, block_cols, x_tile, acc[1]);
  }
  PYBSP_UNROLL
  for (int row = 0; row < 8; ++row) {
    store(first.y + row * kLanes, acc[0][row]);
    store(second.y + row * kLanes, acc[1][row]);
  }
}

// Block rows [first, last) of eight outputs, or of a multiple, for one vector of
// tokens.
template <int kCols>
void multiply_in_pairs(const BlockSparseView& weight, int64_t first, int64_t last,
                       const float* x_tile, const float* bias, float* y_tile) {
  const int64_t r = weight.block_rows, c = weight.block_cols, subs = r / 8;
  // Half of the multiply-adds for a weight: twice as far for the same time.
  const int64_t fetch_ahead = (weight.bfloat16 ? 1 : 2) * weight.fetch_ahead;
  const auto tile = [&](int64_t t) {
    const int64_t row = first + t / subs;
    const int64_t begin = weight.crow_indices[row];
    return EightRows{weight.col_indices + begin, weight.crow_indices[row + 1] - begin,
                     weight.values + begin * r * c + t % subs * 8,
                     y_tile + t * 8 * kLanes, fetch_ahead};
  };
  const int64_t tiles = (last - first) * subs;
  for (int64_t t = 0; t + 1 < tiles; t += 2) {
    EightRows pair[2] = {tile(t), tile(t + 1)};
    multiply_two_tiles<kCols>(pair, r, c, x_tile,
                              bias ? bias + first * r + t * 8 : nullptr);
  }
  if (tiles % 2 == 0) return;
  const EightRows rest = tile(tiles - 1);
  multiply_tile<8, 1, kCols, false>(rest.cols, rest.blocks, rest.w, r, c, x_tile,
                                    {bias ? bias + last * r - 8 : nullptr, false},
                                    weight.fetch_ahead, rest.y);
}

// Bytes of a tile of inputs from which on fetching ahead pays: a few times L1. Under
// that, the three more loads a column cost more than the misses.
constexpr int64_t kPrefetchBytes = 256 * 1024;

template <int kVectors, int kCols>
void multiply_rows_of(const BlockSparseView& weight, int64_t first, int64_t last,
                      const float* x_tile, const float* bias, float* y_tile) {
  constexpr int64_t kWidth = kVectors * kLanes;
  int64_t row = first;
  if constexpr (kVectors == 1 && kRegisters >= 32) {
    if (weight.block_rows % 8 == 0) {
      multiply_in_pairs<kCols>(weight, first, last, x_tile, bias, y_tile);
      return;
    }
  }
  if (weight.in_features * kWidth * int64_t{sizeof(float)} > kPrefetchBytes) {
    // All but the last rows of the matrix have columns to read ahead.
    const int64_t limit = weight.crow_indices[weight.out_features / weight.block_rows] -
                          prefetch_blocks(weight.block_cols);
    row = last;
    while (row > first && weight.crow_indices[row] > limit) --row;
    multiply_block_rows<kVectors, kCols, true>(weight, first, row, x_tile, bias,
                                               y_tile);
    y_tile += (row - first) * weight.block_rows * kWidth;
  }
  multiply_block_rows<kVectors, kCols, false>(weight, row, last, x_tile, bias, y_tile);
}

template <int kVectors>
void multiply_rows_of_width(const BlockSparseView& weight, int64_t first, int64_t last,
                            const float* x_tile, const float* bias, float* y_tile) {
  if (weight.block_cols == 1) {
    multiply_rows_of<kVectors, 1>(weight, first, last, x_tile, bias, y_tile);
  } else if (weight.block_cols == 4) {
    multiply_rows_of<kVectors, 4>(weight, first, last, x_tile, bias, y_tile);
  } else {
    multiply_rows_of<kVectors, 0>(weight, first, last, x_tile, bias, y_tile);
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

}  // namespace pybsp::PYBSP_ISA
