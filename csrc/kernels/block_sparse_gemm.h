// SPDX-License-Identifier: Apache-2.0
// y = activation(x W^T + bias) + residual for block-sparse W.
//
//   x         (tokens, in)   row-major, contiguous float32
//   W         (out, in)      BSR, blocks (r, c) stored column by column, float32 or
//                            bfloat16, which is widened exactly
//   bias      (out)          or null
//   residual  (tokens, out)  row-major, contiguous, or null; may be y itself
//   y         (tokens, out)  row-major, contiguous; overlaps no other input
//
// No alignment is required. Scratch belongs to the calling thread and is kept for its
// next call: inputs of a group of token tiles (a third of L2, at least one tile a
// thread), one part of the outputs for each thread and one part of bfloat16 weights in
// float32. Throws std::bad_alloc. Safe to call from several threads at once. The result
// has the same bits for every number of threads.
//
// Inside, a tile of tokens lies transposed, [in][lanes x vectors]: a SIMD lane is a
// token and a weight is a broadcast scalar, so that any block shape multiplies without
// wasted work and the output rows of a block are contiguous vectors.
#pragma once

#include <cstdint>

#include "simd/bfloat16.h"

namespace pybsp {

// gelu_absolute is gelu for outputs that are summed next, small with large ones, and
// gelu_short for outputs that are rounded to 8 bits next.
enum class Activation : int {
  none,
  relu,
  gelu,
  gelu_tanh,
  silu,
  gelu_absolute,
  gelu_short
};

// Single-row blocks of at least so many columns are multiplied along their rows.
constexpr int64_t kMinColumnRun = 8;

// Plain pointers into arrays that the binding has checked.
struct BlockSparseView {
  int64_t out_features;
  int64_t in_features;
  int64_t block_rows;           // r
  int64_t block_cols;           // c
  const int32_t* crow_indices;  // (out/r + 1)
  const int32_t* col_indices;   // (nnz)
  const float* values;          // (nnz, c, r), or null and
  const Bfloat16* bfloat16 = nullptr;
  // Bytes from the weight that a tile multiplies to what is fetched into L1 meanwhile.
  // A model's weights stream from beyond L2, and the CPU's own prefetching stops at the
  // end of each page.
  int64_t fetch_ahead = 4096;
};

inline int64_t kept_weights(const BlockSparseView& weight) {
  const int64_t grid_rows = weight.out_features / weight.block_rows;
  return weight.crow_indices[grid_rows] * weight.block_rows * weight.block_cols;
}

struct Schedule;
class Int8Weights;

struct Epilogue {
  const float* bias;
  Activation activation;
  const float* residual;
};

// One matrix and where its product goes; `schedule` is token_lane_schedule of it. With
// `int8` the weights are those, `weight.values` is not read and `schedule` is int8's;
// int8_products.h says what input_scale is.
struct Product {
  BlockSparseView weight;
  const Schedule* schedule;
  Epilogue epilogue;
  float* y;
  const Int8Weights* int8 = nullptr;
  float input_scale = 0.0f;
};

// Every product of the same x, which is transposed once. All have the same in_features.
void block_sparse_gemm(const Product* products, int64_t count, const float* x,
                       int64_t tokens, int threads);

// The same for x, y and residual in tiles, see token_tiles.h.
void block_sparse_gemm_tiles(const Product* products, int64_t count,
                             const float* x_tiles, int64_t tokens, int threads);

}  // namespace pybsp
