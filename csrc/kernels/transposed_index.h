// SPDX-License-Identifier: Apache-2.0
// How the gradients walk a BSR matrix; derived from the pattern alone. No weight is
// copied: the blocks of W^T are the same bytes.
//
// dx. A block (r, c) is stored column by column, so for W^T, whose outputs are the
// input features, each of its c columns is a run of r consecutive weights. By run, for
// c < kMinGatheredCols: up to eight consecutive runs of one block row share the r rows
// of dy they multiply and are added into their own features of dx. Otherwise by block
// column: up to eight of its c features own their sums over all its blocks.
//
// dW. Up to eight consecutive features of one input meet single features of the other:
// the rows of a block and its columns, or the reverse when the block is flat.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/block_sparse_gemm.h"

namespace pybsp {

constexpr int64_t kMinGatheredCols = 4;

// Runs [first_run, first_run + count) of block row `row`; those of block b are b * c to
// b * c + c - 1.
struct RunTile {
  int32_t first_run;
  int32_t count;
  int32_t row;
};

struct TransposedIndex {
  bool by_run = false;
  bool flat = false;
  // A part is consecutive block columns: the unit of work of one thread for dx.
  std::vector<int32_t> part_cols;  // (num_parts + 1) boundaries in block columns

  // By run only:
  std::vector<int32_t> part_tiles;    // (num_parts + 1) boundaries in tiles
  std::vector<RunTile> tiles;         //
  std::vector<int32_t> run_features;  // (nnz * c) the input feature of every run

  // By block column, or flat: the blocks of each block column from the top down.
  std::vector<int32_t> ccol_indices;  // (in/c + 1) boundaries in the two below
  std::vector<int32_t> blocks;        // (nnz) block numbers in BSR order
  std::vector<int32_t> row_indices;   // (nnz) their block rows

  int64_t num_parts() const { return static_cast<int64_t>(part_cols.size()) - 1; }
};

// `view.values` is not read. O(nnz * c + num_parts * out / r).
TransposedIndex transposed_index(const BlockSparseView& view);

}  // namespace pybsp
