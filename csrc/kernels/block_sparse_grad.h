// SPDX-License-Identifier: Apache-2.0
// The gradients of y = x W^T (block_sparse_gemm.h), for dy = dL/dy.
//
//   block_sparse_grad_x       dx = dy W                      (tokens, in)
//   block_sparse_grad_values  dW_b = (dy^T x) at the kept blocks, in the layout of
//                             `values`: (nnz, c, r); and dbias = dy summed over tokens
//                             (out), unless that is null
//
//   x, dx   (tokens, in)   row-major, contiguous float32
//   dy      (tokens, out)  the same
//
// `index` is transposed_index of the same pattern. Outputs are overwritten and must not
// overlap the inputs; no alignment is required. Scratch belongs to the calling thread
// and is kept for its next call: for each thread some tiles of transposed dy, or both
// transposed inputs of some hundred tokens. Throws
// std::bad_alloc. Safe to call from several threads at once. The results have the same
// bits for every number of threads.
#pragma once

#include "kernels/block_sparse_gemm.h"
#include "kernels/transposed_index.h"

namespace pybsp {

void block_sparse_grad_x(const BlockSparseView& weight, const TransposedIndex& index,
                         const float* dy, int64_t tokens, float* dx, int threads);

// `weight.values` is not read.
void block_sparse_grad_values(const BlockSparseView& weight,
                              const TransposedIndex& index, const float* dy,
                              const float* x, int64_t tokens, float* dvalues,
                              float* dbias, int threads);

}  // namespace pybsp
