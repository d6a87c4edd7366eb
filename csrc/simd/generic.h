// SPDX-License-Identifier: Apache-2.0
// Portable: the compiler's four-float vectors, SSE2 on x86-64. Defines what the other
// headers mean, except that fma rounds twice.
#pragma once

#include <cstdint>
#include <cstring>

namespace pybsp::generic {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

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
// a > b ? x : y
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  Ints mask = a > b;
  return (Vec)(((Ints)x & mask) | ((Ints)y & ~mask));
}
// b where either operand is NaN, as on the other instruction sets.
inline Vec min(Vec a, Vec b) { return select_gt(b, a, a, b); }
inline Vec max(Vec a, Vec b) { return select_gt(a, b, a, b); }
// To nearest even for |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
inline Vec round(Vec a) {
  const Vec magic = set1(12582912.0f);
  return (a + magic) - magic;
}
// 2^a for integral a in [-126, 127].
inline Vec pow2(Vec a) { return (Vec)((__builtin_convertvector(a, Ints) + 127) << 23); }
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

// Eight floats: the weights of eight consecutive outputs for one input.
struct Vec8 {
  Vec low, high;
};
inline Vec8 zero8() { return {zero(), zero()}; }
inline Vec8 load8(const float* p) { return {load(p), load(p + 4)}; }
inline void store8(float* p, Vec8 a) {
  store(p, a.low);
  store(p + 4, a.high);
}
// The first n of eight floats, 0 < n < 8; the others are zero and not touched.
inline Vec8 load8(const float* p, int n) {
  float a[8] = {};
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
