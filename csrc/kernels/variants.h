// SPDX-License-Identifier: Apache-2.0
// Every function that is compiled once for each instruction set: plain pointers, no
// allocation, no threads, no exceptions. The drivers in <op>.cpp choose a table once a
// call and split the work.
#pragma once

#include <cstdint>

#include "kernels/block_sparse_gemm.h"
#include "runtime/isa.h"

namespace pybsp {

// One block row of a dense weight: `rows` rows of `cols * blocks` floats, `stride`
// floats apart.
struct BlockRow {
  int64_t stride;
  int64_t rows;    // r
  int64_t cols;    // c
  int64_t blocks;  // in / c
};

// The tiles of one part of a schedule by column; block row = output row.
struct ColumnTiles {
  int64_t first_row;
  int64_t last_row;
  int64_t first_tile;
  int64_t last_tile;
  const int32_t* tile_ptr;
  const int32_t* blocks;
  const int32_t* rows;
};

struct Variants {
  int lanes;        // tokens in a vector
  int max_vectors;  // vectors of tokens in the widest tile

  // squares[j] = sum of squares of block j.
  void (*block_squares)(const float* weight, BlockRow shape, float* squares);
  // grad += scale[j] * weight over block j.
  void (*add_scaled_blocks)(float* grad, int64_t grad_stride, const float* weight,
                            BlockRow shape, const float* scale);
  // weight *= scale[j] >= 0 over block j; +0 where scale[j] is 0, NaN where it is NaN.
  void (*scale_blocks)(float* weight, BlockRow shape, const float* scale);

  // Transposes tokens of x, features [first, last), into tile[feature][lane]. Lanes
  // past `tokens` repeat the last token.
  void (*pack_tokens)(const float* x, int64_t in_features, int64_t tokens,
                      int64_t first, int64_t last, int vectors, float* tile);
  // y_tile[row - first * r][lane] = bias + W x over block rows [first, last).
  void (*multiply_rows)(const BlockSparseView& weight, int64_t first, int64_t last,
                        const float* x_tile, int vectors, const float* bias,
                        float* y_tile);
  // The same for one part of a schedule by column.
  void (*multiply_columns)(const BlockSparseView& weight, ColumnTiles tiles,
                           const float* x_tile, int vectors, const float* bias,
                           float* y_tile);
  // Transposes rows of a y_tile back into y (first token, first row), activated.
  void (*unpack_tokens)(const float* y_tile, int64_t rows, int64_t tokens, int vectors,
                        Activation activation, float* y, int64_t out_features);
  // Block rows [first, last) for 1 to 4 tokens, outputs in lanes, no transposition.
  void (*multiply_few_tokens)(const BlockSparseView& weight, int64_t first,
                              int64_t last, const float* x, int64_t tokens,
                              const float* bias, Activation activation, float* y);

  // 12 x rounds vector multiply-adds; the result only keeps them from being removed.
  float (*fma_chains)(int64_t rounds);
  // Reads `count` floats, a multiple of 8 x lanes, `rounds` times over; the sum only
  // keeps the loads from being removed.
  float (*sum_floats)(const float* data, int64_t count, int64_t rounds);
};

const Variants& variants(Isa isa);

namespace generic {
const Variants& variants();
}
namespace avx2 {
const Variants& variants();
}
namespace avx512 {
const Variants& variants();
}
namespace neon {
const Variants& variants();
}

}  // namespace pybsp
