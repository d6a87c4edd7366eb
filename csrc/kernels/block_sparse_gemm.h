// SPDX-License-Identifier: Apache-2.0
// y = activation(x W^T + bias) for a block-sparse W.
//
//   x      (tokens, in)   row-major, contiguous float32
//   W      (out, in)      blocks (r, c); BSR with every block stored column by column
//   bias   (out) or null
//   y      (tokens, out)  row-major, contiguous; must not overlap the inputs
//
// No alignment is required. Scratch is allocated for the call: the transposed inputs of
// a group of token tiles (about 2 MB, at least one tile a thread) and one part of the
// outputs for each thread. Throws std::bad_alloc. Safe to call from several threads at
// once. The result has the same bits for every number of threads.
//
// Inside, a tile of tokens lies transposed, [in][lanes x vectors]: a SIMD lane is a
// token and a weight is a broadcast scalar, so that any block shape multiplies without
// wasted work and the output rows of a block are contiguous vectors.
#pragma once

#include <cstdint>

namespace pybsp {

enum class Activation : int { none, relu, gelu, gelu_tanh, silu };

// Plain pointers into arrays that the binding has checked.
struct BlockSparseView {
  int64_t out_features;
  int64_t in_features;
  int64_t block_rows;           // r
  int64_t block_cols;           // c
  const int32_t* crow_indices;  // (out/r + 1)
  const int32_t* col_indices;   // (nnz)
  const float* values;          // (nnz, c, r)
};

struct Schedule;

// `schedule` is token_lane_schedule of the same pattern.
void block_sparse_gemm(const BlockSparseView& weight, const Schedule& schedule,
                       const float* x, int64_t tokens, const float* bias,
                       Activation activation, float* y, int threads);

}  // namespace pybsp
