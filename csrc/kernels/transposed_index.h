// SPDX-License-Identifier: Apache-2.0
// How the gradients walk a BSR matrix by columns; derived from the pattern alone. No
// weight is copied: the blocks of W^T are the same bytes.
//
// A block (r, c) is stored column by column, so for W^T, whose outputs are the input
// features, each of its c columns is a run of r consecutive weights.
//
// By run, for c < kMinGatheredCols: W^T is a matrix of blocks (1, r), and up to eight
// runs of one block row share the r rows of dy they multiply. Otherwise by block
// column: up to eight of the c features of a block column own their sums over all its
// blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/block_sparse_gemm.h"

namespace pybsp {

constexpr int64_t kMinGatheredCols = 4;

struct TransposedIndex {
  // Every pattern: the blocks of each block column, from the first block row down.
  std::vector<int32_t> ccol_indices;  // (in/c + 1) boundaries in the two below
  std::vector<int32_t> blocks;        // (nnz) block numbers in BSR order
  std::vector<int32_t> row_indices;   // (nnz) their block rows
  // A part is consecutive block columns: the unit of work of one thread.
  std::vector<int32_t> part_cols;  // (num_parts + 1) boundaries in block columns

  // By run only; the runs of block b are b * c to b * c + c - 1.
  bool by_run = false;
  std::vector<int32_t> run_rows;      // (nnz * c) the block row of every run
  std::vector<int32_t> part_tiles;    // (num_parts + 1) boundaries in tiles
  std::vector<int32_t> tile_ptr;      // (num_tiles + 1) boundaries in the two below
  std::vector<int32_t> runs;          // (nnz * c) run numbers
  std::vector<int32_t> run_features;  // (nnz * c) their input features

  int64_t num_parts() const { return static_cast<int64_t>(part_cols.size()) - 1; }
};

// `view.values` is not read. O(nnz * c + num_parts * out / r).
TransposedIndex transposed_index(const BlockSparseView& view);

}  // namespace pybsp
