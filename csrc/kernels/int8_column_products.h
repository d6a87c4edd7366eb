// SPDX-License-Identifier: Apache-2.0
// Products by block column of 8-bit weights; see int8_weights.h. The sums of a part
// wait in its outputs' memory until its last tile is added.
#pragma once

#include "kernels/int8_tile_products.h"

namespace pybsp::PYBSP_ISA {
namespace {

constexpr int64_t kQuadBytes = 4;  // the weights of a row

// Rows rows[0..kRows) of the sums += their weights times the consecutive inputs x. A
// TileWeights would go through the stack in halves and be waited for.
template <int kRows, int kVectors>
void add_to_rows(const int8_t* w, int64_t quad_step, int64_t quads, const int8_t* x,
                 const int32_t* rows, float* sums) {
  if (quads < 1) __builtin_unreachable();  // else GCC keeps a copy of all sums
  float* at[kRows];
  Sums acc[kRows][kVectors];
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    at[row] = sums + int64_t{rows[row]} * (kVectors * kLanes);
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[row][v] = load_sums(at[row] + v * kLanes);
  }
  const auto load_next = [&](Inputs(&in)[kVectors]) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      in[v] = prepare(load_bytes(x + v * kVectorBytes));
    }
    x += kVectors * kVectorBytes;
  };
  add_quads<kRows, kVectors>({w, quad_step, kQuadBytes}, quads, load_next, acc);
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) store_sums(at[row] + v * kLanes, acc[row][v]);
  }
}

using AddToRows = void (*)(const int8_t*, int64_t, int64_t, const int8_t*,
                           const int32_t*, float*);

// add_to_rows<rows, kVectors>, for up to kRows.
template <int kVectors, int kRows = kInt8Rows<kVectors>>
AddToRows add_to_rows_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return add_to_rows_of<kVectors, kRows - 1>(rows);
  }
  return add_to_rows<kRows, kVectors>;
}

template <int kVectors>
void multiply_columns(const Int8Products& products) {
  const Int8View& weights = products.weights;
  constexpr int64_t kWidth = kVectors * kLanes, kMost = kInt8Rows<kVectors>;
  float* const sums = products.y_tile - products.first_row * kWidth;
  for (int64_t row = products.first_row; row < products.last_row; ++row) {
    const Sums start = set1_sums(first_sum(products, row));
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_sums(sums + row * kWidth + v * kLanes, start);
    }
  }
  for (int64_t i = products.first; i < products.last; ++i) {
    const Int8Tile& tile = weights.tiles[i];
    const int8_t* x = products.bytes + int64_t{weights.columns[tile.first_quad]} *
                                           (kVectors * kVectorBytes);
    const int8_t* w = weights.weights + tile.by_quad;
    for (int64_t done = 0; done < tile.rows; done += kMost) {
      const int64_t left = tile.rows - done;
      add_to_rows_of<kVectors>(left < kMost ? left : kMost)(
          w + done * kQuadBytes, tile.rows * kQuadBytes, tile.quads, x,
          weights.rows + tile.row + done, sums);
    }
  }
  const OutputTile<kVectors> out(products, products.first_row);
  for (int64_t row = 0; row < products.last_row - products.first_row; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      out.put(row, v, load_sums(products.y_tile + row * kWidth + v * kLanes));
    }
  }
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
