// SPDX-License-Identifier: Apache-2.0
// The group-Lasso penalty  lam * sum_b factor_b * ||W_b||  over the blocks of a dense
// weight (Li et al. 2020, with factor_b = 1 / (||W_b|| + eps)), and masks of blocks.
//
// T is float or Bfloat16. Everything is computed in float from the elements as they
// are, and rounded once, to nearest even, when it is stored.
//
// One pass over memory: of a panel of blocks the norms are taken and applied while it
// stays in cache. Arrays per block are (grid_rows, grid_cols), contiguous. weight and
// grad are one and the same or do not overlap. Safe to call from several threads at
// once; the same bits for every number of threads. Throws std::bad_alloc.
#pragma once

#include <cstdint>

#include "kernels/block_norms.h"
#include "simd/bfloat16.h"

namespace pybsp {

// grad += lam * factor_b * W_b / ||W_b||, zero where ||W_b|| is 0; returns the penalty.
// Rows of grad lie grad_stride elements apart.
template <typename T>
double group_lasso_grad(T* grad, int64_t grad_stride, const T* weight,
                        const float* factors, float lam, const BlockGrid& grid,
                        int threads);

// W_b *= max(0, 1 - step * threshold_b / ||W_b||); +0 where ||W_b|| is at most
// step * threshold_b, NaN where either is NaN.
template <typename T>
void group_lasso_prox(T* weight, const float* thresholds, float step,
                      const BlockGrid& grid, int threads);

// W_b = +0 where mask_b is false. Writes only vectors in which something changes.
template <typename T>
void apply_block_mask(T* weight, const bool* mask, const BlockGrid& grid, int threads);

}  // namespace pybsp
