// SPDX-License-Identifier: Apache-2.0
// The group-Lasso penalty  lam * sum_b factor_b * ||W_b||  over the blocks of a dense
// weight (Li et al. 2020, with factor_b = 1 / (||W_b|| + eps)), and masks of blocks.
//
// Each pass reads a block row once to get its norms and again, from cache, to apply
// them. Arrays per block are (grid_rows, grid_cols), contiguous. weight and grad must
// not overlap. Safe to call from several threads at once; the same bits for every
// number of threads. Throws std::bad_alloc.
#pragma once

#include <cstdint>

#include "kernels/block_norms.h"

namespace pybsp {

// grad += lam * factor_b * W_b / ||W_b||, zero where ||W_b|| is 0; returns the penalty.
// Rows of grad lie grad_stride floats apart.
double group_lasso_grad(float* grad, int64_t grad_stride, const float* weight,
                        const float* factors, float lam, const BlockGrid& grid,
                        int threads);

// W_b *= max(0, 1 - threshold_b / ||W_b||); +0 where ||W_b|| <= threshold_b, NaN where
// either is NaN.
void group_lasso_prox(float* weight, const float* thresholds, const BlockGrid& grid,
                      int threads);

// W_b = +0 where mask_b is false.
void apply_block_mask(float* weight, const bool* mask, const BlockGrid& grid,
                      int threads);

}  // namespace pybsp
