// SPDX-License-Identifier: Apache-2.0
// Tiles of 8-bit inputs and their products; int8_products.h says what is computed.
#include "kernels/variants_isa.h"
#include "simd/int8.h"

namespace pybsp::PYBSP_ISA {
namespace {

constexpr int kVectorBytes = 4 * kLanes;

// The vectors of a quad from the bytes of its four features: a row of bytes holds the
// lanes of up to four vectors as `narrow` puts them.
template <int kVectors>
inline void bring_together(const Bytes (&rows)[4], Bytes (&quad)[kVectors]) {
  const Bytes low_ab = zip8_low(rows[0], rows[1]), low_cd = zip8_low(rows[2], rows[3]);
  quad[0] = zip16_low(low_ab, low_cd);
  if constexpr (kVectors >= 2) quad[1] = zip16_high(low_ab, low_cd);
  if constexpr (kVectors >= 3) {
    quad[2] = zip16_low(zip8_high(rows[0], rows[1]), zip8_high(rows[2], rows[3]));
  }
}

// How the lanes of a tile become integers. `bad` is 0, or NaN where an input is not
// finite.
template <int kVectors, bool kGiven>
struct Quantizer {
  Vec inverse[kVectors];
  Vec bad[kVectors];

  // One feature.
  inline Bytes operator()(const float* x) {
    Sums q[4];
    PYBSP_UNROLL
    for (int v = 0; v < 4; ++v) {
      q[v] = v < kVectors ? lane_values(x, v) : set1_sums(0);
    }
    return narrow(q[0], q[1], q[2], q[3]);
  }

 private:
  inline Sums lane_values(const float* x, int v) {
    const Vec a = load(x + v * kLanes), scaled = mul(a, inverse[v]);
    if constexpr (!kGiven) return to_ints(scaled);
    bad[v] = fma(a, zero(), bad[v]);
    return to_ints(max(min(scaled, set1(127.0f)), set1(-127.0f)));
  }
};

// The largest magnitude in each lane of one vector, NaN above all.
inline Vec largest_magnitude(const float* x, int64_t features, int64_t width) {
  Vec largest[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 <= features; i += 4) {
    PYBSP_UNROLL
    for (int k = 0; k < 4; ++k) {
      largest[k] = max_bits(largest[k], magnitude(load(x + (i + k) * width)));
    }
  }
  for (; i < features; ++i) {
    largest[0] = max_bits(largest[0], magnitude(load(x + i * width)));
  }
  return max_bits(max_bits(largest[0], largest[1]), max_bits(largest[2], largest[3]));
}

template <int kVectors, bool kGiven>
void quantize_tile(const float* x_tile, int64_t features, float input_scale,
                   bool consecutive, int8_t* bytes, float* scales) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Quantizer<kVectors, kGiven> quantized;
  Vec scale[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kGiven) {
      scale[v] = set1(input_scale);
      quantized.inverse[v] = div(set1(1.0f), scale[v]);
      quantized.bad[v] = zero();
    } else {
      const Vec a = largest_magnitude(x_tile + v * kLanes, features, kWidth);
      const Vec least = set1(kLeastInput), most = set1(127.0f);
      scale[v] = select_gt(least, a, zero(), div(a, most));
      quantized.inverse[v] = select_gt(least, a, zero(), div(most, a));
      quantized.bad[v] = sub(a, a);
    }
  }
  if (consecutive) {
    for (int64_t i = 0; i < features; i += 4) {
      Bytes rows[4], quad[kVectors];
      PYBSP_UNROLL
      for (int k = 0; k < 4; ++k) rows[k] = quantized(x_tile + (i + k) * kWidth);
      bring_together<kVectors>(rows, quad);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        store_bytes(bytes + (i / 4 * kVectors + v) * kVectorBytes, quad[v]);
      }
    }
  } else {
    for (int64_t i = 0; i < features; ++i) {
      store_bytes(bytes + i * kVectorBytes, quantized(x_tile + i * kWidth));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(scales + v * kLanes, add(scale[v], quantized.bad[v]));
  }
}

template <int kVectors>
void quantize_width(const float* x_tile, int64_t features, float input_scale,
                    bool consecutive, int8_t* bytes, float* scales) {
  if (input_scale == 0.0f) {
    quantize_tile<kVectors, false>(x_tile, features, 0.0f, consecutive, bytes, scales);
  } else {
    quantize_tile<kVectors, true>(x_tile, features, input_scale, consecutive, bytes,
                                  scales);
  }
}

void quantize(const float* x_tile, int64_t features, int vectors, float input_scale,
              bool consecutive, int8_t* bytes, float* scales) {
  switch (vectors) {
    case 1:
      return quantize_width<1>(x_tile, features, input_scale, consecutive, bytes,
                               scales);
    case 2:
      return quantize_width<2>(x_tile, features, input_scale, consecutive, bytes,
                               scales);
    default:
      return quantize_width<3>(x_tile, features, input_scale, consecutive, bytes,
                               scales);
  }
}

#ifndef PYBSP_ISA_amx

// The inputs of a quad.
template <int kVectors, bool kConsecutive>
inline void load_quad(const int32_t* columns, const int8_t* bytes,
                      Inputs (&in)[kVectors]) {
  Bytes quad[kVectors];
  if constexpr (kConsecutive) {
    const int8_t* x = bytes + int64_t{*columns} * (kVectors * kLanes / 4);
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) quad[v] = load_bytes(x + v * kVectorBytes);
  } else {
    Bytes rows[4];
    PYBSP_UNROLL
    for (int k = 0; k < 4; ++k) {
      rows[k] = load_bytes(bytes + int64_t{columns[k]} * (kLanes / 4));
    }
    bring_together<kVectors>(rows, quad);
  }
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) in[v] = prepare(quad[v]);
}

// Bytes ahead of the weights in use that are fetched into L1.
constexpr int64_t kWeightsAhead = 2048;

// kRows outputs from row `sub` of a tile on. Few sums are kept in several copies: an
// instruction starts before the one that it adds to has finished.
template <int kRows, int kVectors, bool kConsecutive>
void multiply_tile(const Int8Products& products, const Int8Tile& tile, int64_t sub) {
  constexpr int kCopies = kRows * kVectors >= 9 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  constexpr int kStep = kConsecutive ? 1 : 4;
  constexpr int64_t kWidth = kVectors * kLanes;
  const Int8View& weights = products.weights;
  const int32_t* columns = weights.columns + int64_t{tile.first_quad} * kStep;
  const int64_t quad_bytes = 4 * tile.rows;
  const int8_t* w = weights.weights + tile.weights + 4 * sub;
  Sums acc[kCopies][kRows][kVectors];
  PYBSP_UNROLL
  for (int copy = 0; copy < kCopies; ++copy) {
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[copy][row][v] = set1_sums(0);
    }
  }
  const auto add_quad = [&](Sums(&sums)[kRows][kVectors]) {
    Inputs in[kVectors];
    load_quad<kVectors, kConsecutive>(columns, products.bytes, in);
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Weights quad = broadcast_weights(w + 4 * row);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = add_dots(sums[row][v], in[v], quad);
      }
    }
    __builtin_prefetch(w + kWeightsAhead);
    columns += kStep;
    w += quad_bytes;
  };
  int64_t quads = tile.quads;
  for (; quads >= kCopies; quads -= kCopies) {
    PYBSP_UNROLL
    for (int copy = 0; copy < kCopies; ++copy) add_quad(acc[copy]);
  }
  for (; quads > 0; --quads) add_quad(acc[0]);
  const int64_t first_row = weights.tiles[products.first].row;
  for (int row = 0; row < kRows; ++row) {
    const int64_t out = tile.row + sub + row;
    const Sums offset = set1_sums(kZeroPoint ? weights.offsets[out] : 0);
    const Vec scale = set1(weights.scales[out]);
    const Vec bias = set1(products.bias ? products.bias[out] : 0.0f);
    float* const y = products.y_tile + (out - first_row) * kWidth;
    for (int v = 0; v < kVectors; ++v) {
      Sums sum = acc[0][row][v];
      for (int copy = 1; copy < kCopies; ++copy) {
        sum = add_sums(sum, acc[copy][row][v]);
      }
      const Vec scaled = rounded(mul(to_floats(sub_sums(sum, offset)), scale));
      const Vec own = load(products.token_scales + v * kLanes);
      store(y + v * kLanes, add(rounded(mul(scaled, own)), bias));
    }
  }
}

// All rows of a tile, kInt8Rows at a time.
template <int kVectors, bool kConsecutive, int kRows = kInt8Rows<kVectors>>
void multiply_rows_of_tile(const Int8Products& products, const Int8Tile& tile,
                           int64_t sub = 0) {
  for (; sub + kRows <= tile.rows; sub += kRows) {
    multiply_tile<kRows, kVectors, kConsecutive>(products, tile, sub);
  }
  if constexpr (kRows > 1) {
    if (sub < tile.rows) {
      multiply_rows_of_tile<kVectors, kConsecutive, kRows / 2>(products, tile, sub);
    }
  }
}

template <int kVectors>
void multiply_width(const Int8Products& products) {
  const Int8View& weights = products.weights;
  for (int64_t i = products.first; i < products.last; ++i) {
    const Int8Tile& tile = weights.tiles[i];
    if (weights.consecutive) {
      multiply_rows_of_tile<kVectors, true>(products, tile);
    } else {
      multiply_rows_of_tile<kVectors, false>(products, tile);
    }
  }
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

#endif

}  // namespace

const Int8Kernels int8_kernels = {quantize, multiply};

}  // namespace pybsp::PYBSP_ISA
