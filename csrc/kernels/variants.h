// SPDX-License-Identifier: Apache-2.0
// Every function that is compiled once for each instruction set: plain pointers, no
// allocation, no threads, no exceptions. The drivers in <op>.cpp choose a table once a
// call and split the work.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/block_sparse_gemm.h"
#include "kernels/int8_products.h"
#include "kernels/transposed_index.h"
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

// Block columns [first, last) of a transposed index.
struct BlockColumns {
  int64_t first;
  int64_t last;
  const int32_t* ccol_indices;
  const int32_t* blocks;
  const int32_t* row_indices;
};

// The tiles of one part of a transposed index by run.
struct RunTiles {
  int64_t first_feature;
  int64_t last_feature;
  const RunTile* begin;
  const RunTile* end;
  const int32_t* features;
};

// Products of features of two panels, summed over the first `vectors` vectors of tokens
// of each: out[dst[k] + i * stride] += a_i . b_features[k] for i in [0, rows) and k in
// [0, count). Vector v of a_i is at a + v * a_step + i * lanes, that of b_j at
// b + j * width + v * lanes.
struct SampledProducts {
  const float* a;
  int64_t a_step;
  int64_t rows;
  const float* b;
  const int32_t* features;
  const int64_t* dst;
  int64_t count;
  int64_t width;
  int64_t vectors;
  int64_t stride;
  float* out;
};

struct Variants {
  int lanes;        // tokens in a vector
  int max_vectors;  // vectors of tokens in the widest tile

  const BlockRowKernels<float>* float32;
  const BlockRowKernels<Bfloat16>* bfloat16;
  const Int8Kernels* int8;

  // Transposes tokens of x, features [first, last), into tile[feature][lane]. Lanes
  // past `tokens` repeat the last token.
  void (*pack_tokens)(const float* x, int64_t in_features, int64_t tokens,
                      int64_t first, int64_t last, int vectors, float* tile);
  // floats[i] = values[i]
  void (*widen)(const Bfloat16* values, int64_t count, float* floats);
  // For float32 weights: y_tile[row - first * r][lane] = bias + W x over block rows
  // [first, last).
  void (*multiply_rows)(const BlockSparseView& weight, int64_t first, int64_t last,
                        const float* x_tile, int vectors, const float* bias,
                        float* y_tile);
  // The same for one part of a schedule by column.
  void (*multiply_columns)(const BlockSparseView& weight, ColumnTiles tiles,
                           const float* x_tile, int vectors, const float* bias,
                           float* y_tile);
  // Transposes rows of a y_tile back into y (first token, first row), activated and
  // with the residual, laid out as y, added unless it is null.
  void (*unpack_tokens)(const float* y_tile, int64_t rows, int64_t tokens, int vectors,
                        Activation activation, const float* residual, float* y,
                        int64_t out_features);
  // y[i] = activation(sums[i]) + residual[i]; residual may be null, and both may be y.
  void (*finish)(const float* sums, int64_t count, Activation activation,
                 const float* residual, float* y);
  // y = bias + W x over block rows [first, last) for a few tokens, outputs in lanes;
  // also for bfloat16 weights.
  void (*multiply_few_tokens)(const BlockSparseView& weight, int64_t first,
                              int64_t last, const float* x, int64_t tokens,
                              const float* bias, float* y);

  // One head for one piece of queries, see attention.h.
  void (*attention)(const AttentionPiece& piece);
  // After the last piece of a thread, which may hold registers from piece to piece.
  void (*end_attention)();
  // Floats that it needs for at most so many features of a head and keys.
  int64_t (*attention_scratch)(int64_t head_dim, int64_t keys);
  // y = (x - mean) / sqrt(variance + eps) * weight + bias over the features of each
  // lane; bias may be null and y_tile be x_tile.
  void (*layer_norm)(const float* x_tile, int64_t features, int vectors,
                     const float* weight, const float* bias, float eps, float* y_tile);
  // first, second = first cos - second sin, second cos + first sin, of `count` lanes.
  void (*rotate)(float* first, float* second, const float* cosines, const float* sines,
                 int64_t count);
  // y[i] = activation(a[i]) b[i] of `count` lanes; y may be a.
  void (*gate)(const float* a, const float* b, int64_t count, Activation activation,
               float* y);

  // dx_tile[feature - first_feature][lane] = W^T dy over one part of a transposed
  // index.
  void (*multiply_runs)(const BlockSparseView& weight, RunTiles tiles,
                        const float* dy_tile, int vectors, float* dx_tile);
  void (*multiply_block_columns)(const BlockSparseView& weight, BlockColumns columns,
                                 const float* dy_tile, int vectors, float* dx_tile);
  void (*sampled_products)(const SampledProducts& products);
  // sums[i] += feature i of a panel, summed over tokens: its vector v is at
  // panel + i * feature_step + v * vector_step.
  void (*add_feature_sums)(const float* panel, int64_t features, int64_t feature_step,
                           int64_t vectors, int64_t vector_step, float* sums);

  // 24 x rounds vector multiply-adds; the result only keeps them from being removed.
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

// Instruction sets that add 8-bit products to another one.
namespace avx2_vnni {
extern const Int8Kernels int8_kernels;
void attention(const AttentionPiece& piece);
int64_t attention_scratch(int64_t head_dim, int64_t keys);
}  // namespace avx2_vnni
namespace avx512_vnni {
extern const Int8Kernels int8_kernels;
void attention(const AttentionPiece& piece);
int64_t attention_scratch(int64_t head_dim, int64_t keys);
}  // namespace avx512_vnni
namespace amx {
extern const Int8Kernels int8_kernels;
void attention(const AttentionPiece& piece);
void end_attention();
int64_t attention_scratch(int64_t head_dim, int64_t keys);
}  // namespace amx
namespace neon_dot {
extern const Int8Kernels int8_kernels;
}

}  // namespace pybsp
