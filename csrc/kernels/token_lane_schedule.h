// SPDX-License-Identifier: Apache-2.0
// How the GEMM walks the blocks of a BSR matrix; derived from the pattern alone.
//
// A part is the unit of work of one thread: consecutive block rows whose weights stay
// in L2 while the tiles of tokens pass, up to 64 KB of them, or by column four full
// tiles of every block column.
//
// By row: a tile of up to eight outputs owns its accumulators over all blocks of its
// block row; nothing but the parts is needed. By column, for single-row blocks of at
// least kMinColumnRun inputs (the (1, in/8) groups of Li et al. 2020): up to eight kept
// rows of one block column of a part share their inputs and are added into their rows
// of y.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/block_sparse_gemm.h"

namespace pybsp {

struct Schedule {
  bool by_column = false;
  std::vector<int32_t> part_rows;   // (num_parts + 1) boundaries in block rows
  std::vector<int64_t> part_costs;  // (num_parts) in multiply-adds of one token
  // By column only:
  std::vector<int32_t> part_tiles;  // (num_parts + 1) boundaries in tiles
  std::vector<int32_t> tile_ptr;    // (num_tiles + 1) boundaries in the two below
  std::vector<int32_t> blocks;      // (nnz) block numbers in BSR order
  std::vector<int32_t> rows;        // (nnz) their output rows

  int64_t num_parts() const { return static_cast<int64_t>(part_rows.size()) - 1; }
};

// `view.values` is not read. O(nnz + num_parts * in / c).
Schedule token_lane_schedule(const BlockSparseView& view);

// For bfloat16 weights, which a part widens before it is multiplied: smaller parts by
// row.
Schedule bfloat16_schedule(const BlockSparseView& view);

// For weights of 8 bits: parts by row of four times as many. By column where
// neighbouring rows keep different columns, in single-row blocks of a multiple of four
// inputs.
Schedule int8_schedule(const BlockSparseView& view);

}  // namespace pybsp
