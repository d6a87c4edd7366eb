// SPDX-License-Identifier: Apache-2.0
// Portable: the compiler's four-float vectors, SSE2 on x86-64. Defines what the other
// headers mean, except that fma rounds twice.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/bfloat16.h"

namespace pybsp::generic {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
constexpr bool kLooksUp = false;  // no lookup()

inline Vec set1(float a) { return Vec{a, a, a, a}; }
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }
// The first n of kLanes floats, 0 < n < kLanes; the others are zero and not touched.
inline Vec load(const float* p, int n) {
  float a[kLanes] = {};
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return load(a);
}
inline void store(float* p, Vec a, int n) {
  float b[kLanes];
  store(b, a);
  for (int i = 0; i < n; ++i) p[i] = b[i];
}
// a as it is, rounded: what uses it is not fused with what made it.
inline Vec rounded(Vec a) {
  asm("" : "+m"(a));
  return a;
}
inline void prefetch(const float* p) { __builtin_prefetch(p); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec abs(Vec a) { return (Vec)((Ints)a & 0x7fffffff); }
// a > b ? x : y
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  Ints mask = a > b;
  return (Vec)(((Ints)x & mask) | ((Ints)y & ~mask));
}
// b where either operand is NaN, as on the other instruction sets.
inline Vec min(Vec a, Vec b) { return select_gt(b, a, a, b); }
inline Vec max(Vec a, Vec b) { return select_gt(a, b, a, b); }
// shifted < lowest ? 0 : a 2^n; where not 0, n in [-126, 127], a and a 2^n are normal.
// shifted is n + 1.5 * 2^23.
inline Vec scale_by_pow2(Vec a, Vec, Vec shifted, Vec lowest) {
  return (Vec)(((Words)a + ((Words)shifted << 23)) & ~(Words)(shifted < lowest));
}
inline float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline void transpose(Vec (&a)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = i + 1; j < kLanes; ++j) {
      float swapped = a[i][j];
      a[i][j] = a[j][i];
      a[j][i] = swapped;
    }
  }
}
inline Vec sqrt(Vec a) {
  return Vec{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]),
             __builtin_sqrtf(a[3])};
}
// a <= b ? x : y
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  Ints mask = a <= b;
  return (Vec)(((Ints)x & mask) | ((Ints)y & ~mask));
}
// Whether any bit of any lane is set: false for +0 alone.
inline bool any_bit(Vec a) {
  uint64_t halves[2];
  std::memcpy(halves, &a, sizeof(a));
  return (halves[0] | halves[1]) != 0;
}
// a0 + a1, a2 + a3, ..., b0 + b1, ...
inline Vec pair_sums(Vec a, Vec b) {
  return Vec{a[0], a[2], b[0], b[2]} + Vec{a[1], a[3], b[1], b[3]};
}
// a0, a0, a1, a1, ... of the lower and the upper half.
inline Vec twice_low(Vec a) { return Vec{a[0], a[0], a[1], a[1]}; }
inline Vec twice_high(Vec a) { return Vec{a[2], a[2], a[3], a[3]}; }
// 1 for true, 0 for false.
inline Vec load(const bool* p) {
  return Vec{p[0] ? 1.0f : 0.0f, p[1] ? 1.0f : 0.0f, p[2] ? 1.0f : 0.0f,
             p[3] ? 1.0f : 0.0f};
}

// The upper halves of floats. Stores round to nearest even; a NaN stays one.
inline Vec load(const Bfloat16* p) {
  return (Vec)(Words{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
inline void store(Bfloat16* p, Vec a) {
  const Words bits = (Words)a, nan = (Words)(a != a);
  const Words up = bits + (((bits >> 16) & 1) + 0x7fff), quiet = bits | 0x400000;
  const Words rounded = ((quiet & nan) | (up & ~nan)) >> 16;
  for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(rounded[i]);
}
inline Vec load(const Bfloat16* p, int n) {
  Bfloat16 lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store(Bfloat16* p, Vec a, int n) {
  Bfloat16 lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// A sum of floats in double precision.
struct Sum {
  double lanes[kLanes];
};
inline Sum zero_sum() { return {}; }
inline Sum add(Sum a, Vec b) {
  for (int i = 0; i < kLanes; ++i) a.lanes[i] += static_cast<double>(b[i]);
  return a;
}
inline double total(Sum a) {
  return (a.lanes[0] + a.lanes[2]) + (a.lanes[1] + a.lanes[3]);
}

// Eight floats: the weights of eight consecutive outputs for one input.
struct Vec8 {
  Vec low, high;
};
inline Vec8 zero8() { return {zero(), zero()}; }
template <typename T>  // float or Bfloat16
inline Vec8 load8(const T* p) {
  return {load(p), load(p + 4)};
}
inline void store8(float* p, Vec8 a) {
  store(p, a.low);
  store(p + 4, a.high);
}
// The first n of eight floats, 0 < n < 8; the others are zero and not touched.
template <typename T>
inline Vec8 load8(const T* p, int n) {
  T a[8] = {};
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return load8(a);
}
inline void store8(float* p, Vec8 a, int n) {
  float b[8];
  store8(b, a);
  for (int i = 0; i < n; ++i) p[i] = b[i];
}
inline Vec8 add8(Vec8 a, Vec8 b) { return {a.low + b.low, a.high + b.high}; }
inline Vec8 fma8(Vec8 a, float b, Vec8 c) {
  return {fma(a.low, set1(b), c.low), fma(a.high, set1(b), c.high)};
}
inline Vec in_register(Vec a) { return a; }
inline float* in_register(float* p) { return p; }
// The sum of each of eight vectors.
inline Vec8 reduce_add8(const Vec* a) {
  float sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = reduce_add(a[i]);
  return load8(sums);
}

}  // namespace
}  // namespace pybsp::generic
