// SPDX-License-Identifier: Apache-2.0
// norms[i][j] = sqrt(sum of squares of block (i, j)) of a dense weight.
//
//   weight  (grid_rows * r, grid_cols * c) of T; rows contiguous, row_stride apart
//   norms   (grid_rows, grid_cols) contiguous
//
// T is float or Bfloat16; the squares are summed in float. They overflow above
// |w| = 1.8e19 and vanish under 1e-23, but for blocks of one element, whose norm is
// |w|. NaN propagates to its block. The weight is read once and nothing is allocated.
// No alignment required; safe to call from several threads at once; the same bits for
// every number of threads.
#pragma once

#include <cstdint>

namespace pybsp {

// A dense matrix as a grid of blocks.
struct BlockGrid {
  int64_t grid_rows;
  int64_t grid_cols;
  int64_t block_rows;  // r
  int64_t block_cols;  // c
  int64_t row_stride;  // elements between rows
};

template <typename T>
void block_norms(const T* weight, const BlockGrid& grid, float* norms, int threads);

}  // namespace pybsp
