// SPDX-License-Identifier: Apache-2.0
// Block-sparse weights of 8 bits, in the order in which the kernels read them.
//
// Symmetric, one scale an output: w[o, k] = scales[o] q[o, k]. Four inputs make a quad,
// for a lane sums four products at once. Where the width of a block is a multiple of
// four, a quad is four consecutive features; else it is any four kept columns of a
// block row, which the kernels bring together at run time, and the last quad of a block
// row is filled up with weights of zero.
//
// By row, a tile is consecutive outputs with the same inputs. By column, for single-row
// blocks whose rows keep different columns, it is kept blocks of one block column.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/block_sparse_gemm.h"
#include "kernels/token_lane_schedule.h"

namespace pybsp {

// The order of the weights of a tile: [quad][row][4]; or, of high blocks,
// [row][quad][4] with the quads of a row filled up with zeros to whole cache lines.
enum class Int8Order { by_quad, high_by_row };

// Up to eight outputs with the same inputs. By row they are consecutive; tiles of one
// block row follow each other and have one first_quad.
struct Int8Tile {
  int32_t row;  // the first output; by column, where in Int8View::rows they are listed
  int32_t rows;
  int32_t quads;
  int32_t first_quad;  // among those of all tiles, see `columns`
  bool high;           // by row in Int8Order::high_by_row
  int64_t by_quad;     // where its weights begin in each order
  int64_t high_by_row;

  // Bytes from row to row in the order by row.
  int64_t stride() const { return (int64_t{quads} * 4 + 63) / 64 * 64; }
};

struct Int8View {
  bool consecutive;  // quads of consecutive features
  bool by_column;    // consecutive, and no tile is high
  const Int8Tile* tiles;
  // For each quad the first of its features divided by four, or its four features. By
  // column, for the first quad of each tile, which the others follow.
  const uint16_t* columns;
  const int32_t* rows;  // by column, the outputs of all tiles
  const int8_t* weights;
  const float* scales;     // (out)
  const int32_t* offsets;  // (out) -128 times the sum of the weights
};

class Int8Weights {
 public:
  // Copies what it needs of (crow_indices, col_indices) of `pattern`, whose values are
  // not read, of q (nnz, c, r) and of scales (out).
  Int8Weights(const BlockSparseView& pattern, const int8_t* q, const float* scales);

  bool consecutive() const { return consecutive_; }
  // part_tiles are boundaries in the tiles, whose own pointers and blocks are left out.
  const Schedule& schedule() const { return schedule_; }
  // Made in the order of the active instruction set, and in the other one when that is
  // asked for. Safe to call from several threads; throws std::bad_alloc.
  Int8View view(Int8Order order) const;
  int64_t bytes() const;

 private:
  struct Free {
    void operator()(int8_t* p) const;
  };
  using Bytes = std::unique_ptr<int8_t[], Free>;

  void pack_rows(const BlockSparseView& pattern, const int8_t* q);
  void pack_columns(const BlockSparseView& pattern, const int8_t* q);
  void append_tiles(const BlockSparseView& pattern, int64_t first, int64_t last);
  void append_columns(const BlockSparseView& pattern, int64_t row);
  static int64_t begin(const Int8Tile& tile, Int8Order order, int64_t row,
                       int64_t quad);
  int64_t size(Int8Order order) const;
  Int8Order other_order() const;
  Bytes zeros(Int8Order order) const;

  bool consecutive_;
  Schedule schedule_;
  std::vector<Int8Tile> tiles_;
  std::vector<uint16_t> columns_;
  std::vector<float> scales_;
  std::vector<int32_t> offsets_;
  Int8Order order_;
  Bytes weights_;
  mutable std::once_flag other_once_;
  mutable Bytes other_;
};

}  // namespace pybsp
