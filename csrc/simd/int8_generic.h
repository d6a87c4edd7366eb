// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/generic.h"

namespace pybsp::generic {
namespace {

// As many bytes as a vector of floats has: four for each lane.
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Halves __attribute__((vector_size(16)));
// A sum for each lane.
using Sums = Ints;

// What the tiles of inputs hold in place of 0.
constexpr int kZeroPoint = 0;
// Accumulators of a tile that is kVectors wide: rows of outputs.
template <int kVectors>
constexpr int kInt8Rows = 4;

inline Bytes load_bytes(const int8_t* p) {
  Bytes a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline void store_bytes(int8_t* p, Bytes a) { std::memcpy(p, &a, sizeof(a)); }
// The bits of sums, where floats will be.
inline Sums load_sums(const float* p) { return (Sums)load(p); }
inline void store_sums(float* p, Sums a) { store(p, (Vec)a); }
inline Sums set1_sums(int32_t a) { return Sums{a, a, a, a}; }
inline Sums add_sums(Sums a, Sums b) { return a + b; }

// Of each 16 bytes of a and b: a0, b0, a1, b1, ... of the lower and the upper half; the
// same for pairs of bytes.
inline Bytes zip8_low(Bytes a, Bytes b) {
  return __builtin_shuffle(
      a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
inline Bytes zip8_high(Bytes a, Bytes b) {
  return __builtin_shuffle(
      a, b, Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
inline Bytes zip16_low(Bytes a, Bytes b) {
  return (Bytes)__builtin_shuffle((Halves)a, (Halves)b,
                                  Halves{0, 8, 1, 9, 2, 10, 3, 11});
}
inline Bytes zip16_high(Bytes a, Bytes b) {
  return (Bytes)__builtin_shuffle((Halves)a, (Halves)b,
                                  Halves{4, 12, 5, 13, 6, 14, 7, 15});
}

// What is needed of four inputs of each lane, and of four weights for all lanes.
using Inputs = Bytes;
inline Inputs prepare(Bytes a) { return a; }
struct Weights {
  Sums w[4];
};
inline Weights broadcast_weights(const int8_t* p) {
  return {{set1_sums(p[0]), set1_sums(p[1]), set1_sums(p[2]), set1_sums(p[3])}};
}
// sums + the four products of each lane, exactly; the inputs without kZeroPoint.
inline Sums add_dots(Sums sums, Inputs x, const Weights& weights) {
  const Words a = (Words)x;
  sums += ((Sums)(a << 24) >> 24) * weights.w[0];
  sums += ((Sums)(a << 16) >> 24) * weights.w[1];
  sums += ((Sums)(a << 8) >> 24) * weights.w[2];
  return sums + ((Sums)a >> 24) * weights.w[3];
}

// Rounded to nearest, ties to even; anything beyond an int32 has the least one.
inline Sums to_ints(Vec a) {
  Sums ints;
  for (int i = 0; i < kLanes; ++i) {
    ints[i] = a[i] >= -2147483648.0f && a[i] < 2147483648.0f
                  ? static_cast<int32_t>(__builtin_rintf(a[i]))
                  : INT32_MIN;
  }
  return ints;
}
inline Vec to_floats(Sums a) { return __builtin_convertvector(a, Vec); }
// The larger bit pattern: of numbers that are not negative the larger, and NaN above
// all.
inline Vec max_bits(Vec a, Vec b) {
  const Ints larger = (Ints)a > (Ints)b;
  return (Vec)(((Ints)a & larger) | ((Ints)b & ~larger));
}
inline Vec magnitude(Vec a) { return (Vec)((Ints)a & 0x7fffffff); }
// Each 16 bytes hold 4 lanes of a, then of b, c and d, limited to [-128, 127], and
// kZeroPoint more.
inline Bytes narrow(Sums a, Sums b, Sums c, Sums d) {
  const Sums all[4] = {a, b, c, d};
  Bytes bytes;
  for (int i = 0; i < 16; ++i) {
    const int32_t value = all[i / 4][i % 4];
    bytes[i] = static_cast<int8_t>(value < -128 ? -128 : value > 127 ? 127 : value);
  }
  return bytes;
}

}  // namespace
}  // namespace pybsp::generic
