// SPDX-License-Identifier: Apache-2.0
// Products of 8-bit tiles on AMX: 16 outputs x 16 tokens x 16 quads an instruction. The
// inputs of 16 quads are brought together in memory, 64 bytes a quad and vector, unless
// they lie so already.
#include "kernels/int8_column_products.h"
#include "kernels/variants_isa.h"
#include "simd/amx.h"

namespace pybsp::PYBSP_ISA {
namespace {

constexpr int kQuads = 16;  // in an instruction
constexpr int kRows = 16;   // outputs, two tiles of weights
constexpr int kInputBytes = kQuads * kVectorBytes;
// Weights are fetched into L2 that far ahead: products take less time than L3.
constexpr int64_t kAhead = 16384;

// Where the inputs of 16 quads lie, and bytes from quad to quad and from vector to
// vector.
struct TileInputs {
  const int8_t* first;
  int64_t quad_step;
  int64_t vector_step;

  const int8_t* vector(int v) const { return first + v * vector_step; }
};

// The inputs of 16 quads, of which `quads` exist, brought together in `inputs` unless
// they are neighbours.
template <int kVectors>
inline TileInputs gather(const Int8Products& products, const uint16_t* columns,
                         int64_t quads, int8_t* inputs) {
  if (products.weights.consecutive && quads >= kQuads &&
      columns[kQuads - 1] - columns[0] == kQuads - 1) {
    return {products.bytes + int64_t{columns[0]} * (kVectors * kVectorBytes),
            kVectors * kVectorBytes, kVectorBytes};
  }
  // Past the last quad any inputs meet weights of zero.
  const int64_t all = quads < kQuads ? quads : kQuads;
  for (int64_t q = 0; q < all; ++q) {
    Bytes quad[kVectors];
    if (products.weights.consecutive) {
      const int8_t* x =
          products.bytes + int64_t{columns[q]} * (kVectors * kVectorBytes);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) quad[v] = load_bytes(x + v * kVectorBytes);
    } else {
      Bytes rows[4];
      PYBSP_UNROLL
      for (int k = 0; k < 4; ++k) {
        rows[k] =
            load_bytes(products.bytes + int64_t{columns[4 * q + k]} * kVectorBytes);
      }
      bring_together<kVectors>(rows, quad);
    }
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store_bytes(inputs + v * kInputBytes + q * kVectorBytes, quad[v]);
    }
  }
  return {inputs, kVectorBytes, kInputBytes};
}

// Outputs [first, first + count) from their sums, [output][vector].
template <int kVectors>
void put_outputs(const Int8Products& products, int64_t first, int64_t count,
                 const float* sums) {
  const OutputTile<kVectors> to(products, first);
  for (int64_t out = 0; out < count; ++out) {
    float* const y = to.at(out);
    const Vec scale = to.scale(out), bias = to.bias(out);
    const Sums more = set1_sums(first_sum(products, first + out));
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      to.put(y, v, add_sums(load_sums(sums + v * kLanes), more), scale, bias);
    }
    sums += kVectors * kLanes;
  }
}

// The products of `rows` outputs from `tile` on, up to 32 in two groups of at most 16.
// Sums are tiles 0 to 2 and, of other outputs, 3 to 5; weights 6, inputs 7.
template <int kVectors, bool kTwo>
void multiply_outputs(const Int8Products& products, const Int8Tile& tile,
                      int64_t rows) {
  const Int8View& weights = products.weights;
  const int step = weights.consecutive ? 1 : 4;
  const uint16_t* columns = weights.columns + int64_t{tile.first_quad} * step;
  const int8_t* w = weights.weights + tile.high_by_row;
  const int64_t stride = tile.stride(), second = kRows * stride;
  alignas(64) int8_t inputs[2][kVectors * kInputBytes];
  _tile_zero(0);
  if constexpr (kVectors >= 2) _tile_zero(1);
  if constexpr (kVectors >= 3) _tile_zero(2);
  if constexpr (kTwo) {
    _tile_zero(3);
    if constexpr (kVectors >= 2) _tile_zero(4);
    if constexpr (kVectors >= 3) _tile_zero(5);
  }
  // Inputs are gathered a step ahead: a tile is loaded from the cache, not from stores
  // that are still on their way.
  int64_t quads = tile.quads;
  TileInputs next{};
  if (quads > 0) next = gather<kVectors>(products, columns, quads, inputs[0]);
  for (int turn = 1; quads > 0; turn ^= 1) {
    const TileInputs in = next;
    quads -= kQuads;
    columns += kQuads * step;
    if (quads > 0) next = gather<kVectors>(products, columns, quads, inputs[turn]);
    for (int64_t row = 0; row < rows; ++row) {
      _mm_prefetch(reinterpret_cast<const char*>(w + row * stride + kAhead),
                   _MM_HINT_T1);
    }
    _tile_loadd(6, w, stride);
    _tile_loadd(7, in.first, in.quad_step);
    _tile_dpbsud(0, 6, 7);
    if constexpr (kTwo) {
      // Each tile of inputs meets both groups of outputs; the weights are read again.
      _tile_loadd(6, w + second, stride);
      _tile_dpbsud(3, 6, 7);
      if constexpr (kVectors >= 2) {
        _tile_loadd(7, in.vector(1), in.quad_step);
        _tile_dpbsud(4, 6, 7);
        _tile_loadd(6, w, stride);
        _tile_dpbsud(1, 6, 7);
      }
      if constexpr (kVectors >= 3) {
        _tile_loadd(7, in.vector(2), in.quad_step);
        _tile_dpbsud(2, 6, 7);
        _tile_loadd(6, w + second, stride);
        _tile_dpbsud(5, 6, 7);
      }
    } else {
      if constexpr (kVectors >= 2) {
        _tile_loadd(7, in.vector(1), in.quad_step);
        _tile_dpbsud(1, 6, 7);
      }
      if constexpr (kVectors >= 3) {
        _tile_loadd(7, in.vector(2), in.quad_step);
        _tile_dpbsud(2, 6, 7);
      }
    }
    w += 4 * kQuads;
  }
  // [output][vector]
  alignas(64) float sums[(kTwo ? 2 : 1) * kRows * kVectors * kLanes];
  constexpr int64_t kStride = kVectors * kVectorBytes;
  float* to = sums;
  _tile_stored(0, to, kStride);
  if constexpr (kVectors >= 2) _tile_stored(1, to + kLanes, kStride);
  if constexpr (kVectors >= 3) _tile_stored(2, to + 2 * kLanes, kStride);
  if constexpr (kTwo) {
    to += kRows * kVectors * kLanes;
    _tile_stored(3, to, kStride);
    if constexpr (kVectors >= 2) _tile_stored(4, to + kLanes, kStride);
    if constexpr (kVectors >= 3) _tile_stored(5, to + 2 * kLanes, kStride);
  }
  put_outputs<kVectors>(products, tile.row, rows, sums);
}

// Outputs from `tile` on that share its inputs and whose weights follow each other: up
// to 16, or 32, for a tile register has one height.
int64_t rows_together(const Int8Tile* tile, const Int8Tile* end) {
  int64_t rows = 0, whole = 0;
  for (const Int8Tile* next = tile;
       next != end && next->first_quad == tile->first_quad &&
       next->quads == tile->quads && next->row == tile->row + rows &&
       rows + next->rows <= 2 * kRows;
       ++next) {
    rows += next->rows;
    if (rows <= kRows || rows == 2 * kRows) whole = rows;
  }
  return whole;
}

template <int kVectors>
void multiply_width(const Int8Products& products) {
  if (products.weights.by_column) return multiply_columns<kVectors>(products);
  const Int8Tile* const end = products.weights.tiles + products.last;
  int64_t configured = 0;
  for (const Int8Tile* tile = products.weights.tiles + products.first; tile != end;) {
    if (!tile->high) {
      multiply_whole_tile<kVectors>(
          products, *tile,
          {products.weights.weights + tile->high_by_row, 4 * tile->rows, 4});
      ++tile;
      continue;
    }
    const int64_t rows = rows_together(tile, end);
    const int64_t height = rows < kRows ? rows : kRows;
    if (height != configured) configure_tiles(height);
    configured = height;
    if (rows > kRows) {
      multiply_outputs<kVectors, true>(products, *tile, rows);
    } else {
      multiply_outputs<kVectors, false>(products, *tile, rows);
    }
    for (int64_t done = 0; done < rows; ++tile) done += tile->rows;
  }
  _tile_release();
}

void multiply(const Int8Products& products) {
  switch (products.vectors) {
    case 1:
      return multiply_width<1>(products);
    case 2:
      return multiply_width<2>(products);
    default:
      return multiply_width<3>(products);
  }
}

}  // namespace

const Int8Kernels int8_kernels = {quantize_inputs, multiply, dot_chains,
                                  Int8Order::high_by_row};

}  // namespace pybsp::PYBSP_ISA
