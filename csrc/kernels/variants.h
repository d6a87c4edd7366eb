// SPDX-License-Identifier: Apache-2.0
// Every function that is compiled once for each instruction set: plain pointers, no
// allocation, no threads, no exceptions. The drivers in <op>.cpp choose a table once a
// call and split the work.
#pragma once

#include <cstdint>

#include "kernels/block_sparse_gemm.h"
#include "runtime/isa.h"
#include "simd/bfloat16.h"

namespace pybsp {

// A panel: consecutive blocks of one block row of a dense weight. `cols * blocks` is at
// most kPanelCols unless `blocks` is 1.
constexpr int64_t kPanelCols = 2048;
struct BlockRow {
  int64_t stride;  // elements between rows
  int64_t rows;    // r
  int64_t cols;    // c
  int64_t blocks;
  int64_t next_rows;  // from here to the panel that comes next, for prefetching;
  int64_t next_cols;  // both 0 for the last
};

// Operations on one panel of a weight of type T, in float. Arrays per block hold
// shape.blocks entries. group_lasso.h says what each computes.
template <typename T>
struct BlockRowKernels {
  void (*block_norms)(const T* weight, const BlockRow& shape, float* norms);
  double (*group_lasso_grad)(T* grad, int64_t grad_stride, const T* weight,
                             const BlockRow& shape, const float* factors, float lam);
  void (*group_lasso_prox)(T* weight, const BlockRow& shape, const float* thresholds,
                           float step);
  void (*apply_block_mask)(T* weight, const BlockRow& shape, const bool* mask);
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

  const BlockRowKernels<float>* float32;
  const BlockRowKernels<Bfloat16>* bfloat16;

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
