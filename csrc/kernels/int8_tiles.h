// SPDX-License-Identifier: Apache-2.0
// What tiles of 8-bit inputs and their products share.
#pragma once

#include "kernels/int8_products.h"
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

// What the sums of output `out` start from, for inputs that hold kZeroPoint more.
inline int32_t first_sum(const Int8Products& products, int64_t out) {
  return kZeroPoint ? products.weights.offsets[out] : 0;
}

// Where sums become outputs, which are counted from `first` on.
template <int kVectors>
class OutputTile {
 public:
  OutputTile(const Int8Products& products, int64_t first)
      : scales_(products.weights.scales + first),
        bias_(products.bias ? products.bias + first : nullptr),
        y_(products.y_tile + (first - products.first_row) * (kVectors * kLanes)) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v)
      own_[v] = load(products.token_scales + v * kLanes);
  }

  // Output `out` of one vector of tokens.
  inline void put(int64_t out, int v, Sums sums) const {
    put(at(out), v, sums, scale(out), bias(out));
  }

  // The same from what the vectors of an output share.
  float* at(int64_t out) const { return y_ + out * (kVectors * kLanes); }
  Vec scale(int64_t out) const { return set1(scales_[out]); }
  Vec bias(int64_t out) const { return bias_ ? set1(bias_[out]) : zero(); }
  inline void put(float* y, int v, Sums sums, Vec scale, Vec bias) const {
    const Vec scaled = rounded(mul(to_floats(sums), scale));
    store(y + v * kLanes, add(rounded(mul(scaled, own_[v])), bias));
  }

 private:
  const float* scales_;
  const float* bias_;
  float* y_;
  Vec own_[kVectors];
};

}  // namespace
}  // namespace pybsp::PYBSP_ISA
