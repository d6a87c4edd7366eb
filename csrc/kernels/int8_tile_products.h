// SPDX-License-Identifier: Apache-2.0
// Products of one tile of 8-bit weights with all sums in registers.
#pragma once

#include "kernels/int8_tiles.h"

namespace pybsp::PYBSP_ISA {
namespace {

// The inputs of a quad.
template <int kVectors, bool kConsecutive>
inline void load_quad(const uint16_t* columns, const int8_t* bytes,
                      Inputs (&in)[kVectors]) {
  Bytes quad[kVectors];
  if constexpr (kConsecutive) {
    const int8_t* x = bytes + int64_t{*columns} * (kVectors * kVectorBytes);
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) quad[v] = load_bytes(x + v * kVectorBytes);
  } else {
    Bytes rows[4];
    PYBSP_UNROLL
    for (int k = 0; k < 4; ++k) {
      rows[k] = load_bytes(bytes + int64_t{columns[k]} * kVectorBytes);
    }
    bring_together<kVectors>(rows, quad);
  }
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) in[v] = prepare(quad[v]);
}

// Bytes ahead of the weights in use that are fetched into L1.
constexpr int64_t kWeightsAhead = 2048;

// Where the weights of some rows of a tile lie, and bytes from quad to quad and from
// row to row.
struct TileWeights {
  const int8_t* first;
  int64_t quad_step;
  int64_t row_step;

  TileWeights from_row(int64_t row) const {
    return {first + row * row_step, quad_step, row_step};
  }
};

// Adds `quads` quads to the sums of kRows outputs; load_next loads the inputs of the
// next one. Few sums are kept in several copies: an instruction starts before the one
// that it adds to has finished.
template <int kRows, int kVectors, class LoadNext>
inline void add_quads(TileWeights weights, int64_t quads, LoadNext load_next,
                      Sums (&sums)[kRows][kVectors]) {
  constexpr int kCopies = kRows * kVectors >= 9 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  const int64_t quad_step = weights.quad_step, row_step = weights.row_step;
  const int8_t* w = weights.first;
  const auto add_quad = [&](Sums(&into)[kRows][kVectors]) {
    Inputs in[kVectors];
    load_next(in);
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Weights quad = broadcast_weights(w + row * row_step);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        into[row][v] = add_dots(into[row][v], in[v], quad);
      }
    }
    __builtin_prefetch(w + kWeightsAhead);
    w += quad_step;
  };
  if constexpr (kCopies > 1) {
    Sums copies[kCopies - 1][kRows][kVectors];
    PYBSP_UNROLL
    for (int copy = 0; copy < kCopies - 1; ++copy) {
      PYBSP_UNROLL
      for (int row = 0; row < kRows; ++row) {
        PYBSP_UNROLL
        for (int v = 0; v < kVectors; ++v) copies[copy][row][v] = set1_sums(0);
      }
    }
    for (; quads >= kCopies; quads -= kCopies) {
      add_quad(sums);
      PYBSP_UNROLL
      for (int copy = 0; copy < kCopies - 1; ++copy) add_quad(copies[copy]);
    }
    PYBSP_UNROLL
    for (int copy = 0; copy < kCopies - 1; ++copy) {
      PYBSP_UNROLL
      for (int row = 0; row < kRows; ++row) {
        PYBSP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sums[row][v] = add_sums(sums[row][v], copies[copy][row][v]);
        }
      }
    }
  }
  for (; quads > 0; --quads) add_quad(sums);
}

// kRows outputs from row `sub` of a tile on.
template <int kRows, int kVectors, bool kConsecutive>
void multiply_tile(const Int8Products& products, const Int8Tile& tile,
                   const TileWeights& weights, int64_t sub) {
  constexpr int kStep = kConsecutive ? 1 : 4;
  const int64_t first = tile.row + sub;
  const uint16_t* columns = products.weights.columns + int64_t{tile.first_quad} * kStep;
  Sums sums[kRows][kVectors];
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const Sums start = set1_sums(first_sum(products, first + row));
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[row][v] = start;
  }
  const auto load_next = [&](Inputs(&in)[kVectors]) {
    load_quad<kVectors, kConsecutive>(columns, products.bytes, in);
    columns += kStep;
  };
  add_quads<kRows, kVectors>(weights, tile.quads, load_next, sums);
  const OutputTile<kVectors> out(products, first);
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) out.put(row, v, sums[row][v]);
  }
}

// All rows of a tile, kInt8Rows at a time.
template <int kVectors, bool kConsecutive, int kRows = kInt8Rows<kVectors>>
void multiply_rows_of_tile(const Int8Products& products, const Int8Tile& tile,
                           TileWeights weights, int64_t sub = 0) {
  for (; sub + kRows <= tile.rows; sub += kRows) {
    multiply_tile<kRows, kVectors, kConsecutive>(products, tile, weights.from_row(sub),
                                                 sub);
  }
  if constexpr (kRows > 1) {
    if (sub < tile.rows) {
      multiply_rows_of_tile<kVectors, kConsecutive, kRows / 2>(products, tile, weights,
                                                               sub);
    }
  }
}

template <int kVectors>
void multiply_whole_tile(const Int8Products& products, const Int8Tile& tile,
                         TileWeights weights) {
  if (products.weights.consecutive) {
    multiply_rows_of_tile<kVectors, true>(products, tile, weights);
  } else {
    multiply_rows_of_tile<kVectors, false>(products, tile, weights);
  }
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
