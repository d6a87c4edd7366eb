// SPDX-License-Identifier: Apache-2.0
// Block-sparse weights of 8 bits, in the order in which the kernels read them.
//
// Symmetric, one scale an output: w[o, k] = scales[o] q[o, k]. Four inputs make a quad,
// for a lane sums four products at once. Where the width of a block is a multiple of
// four, a quad is four consecutive features; else it is any four kept columns of a
// block row, which the kernels bring together at run time, and the last quad of a block
// row is filled up with weights of zero.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/block_sparse_gemm.h"
#include "kernels/token_lane_schedule.h"

namespace pybsp {

// Up to eight consecutive outputs with the same inputs.
struct Int8Tile {
  int32_t row;
  int32_t rows;
  int32_t quads;
  int32_t first_quad;  // among those of all tiles, see `columns`
  int64_t weights;     // [quad][row][4] from here on
};

struct Int8View {
  bool consecutive;  // quads of consecutive features
  const Int8Tile* tiles;
  const int32_t* columns;
  const int8_t* weights;
  const float* scales;
  const int32_t* offsets;
};

struct Int8Weights {
  // Copies what it needs of (crow_indices, col_indices) of `view`, whose values are not
  // read, of q (nnz, c, r) and of scales (out).
  Int8Weights(const BlockSparseView& view, const int8_t* q, const float* scales);

  int64_t bytes() const;
  Int8View view() const {
    return {consecutive,    tiles.data(),  columns.data(),
            weights.data(), scales.data(), offsets.data()};
  }

  bool consecutive;
  Schedule schedule;  // by row; part_tiles are boundaries in `tiles`
  std::vector<Int8Tile> tiles;
  // For each quad the first of its features divided by four, or its four features; all
  // times 16, the bytes of the narrowest row of a tile of inputs.
  std::vector<int32_t> columns;
  std::vector<int8_t> weights;
  std::vector<float> scales;     // (out)
  std::vector<int32_t> offsets;  // (out) 128 times the sum of the weights
};

}  // namespace pybsp
