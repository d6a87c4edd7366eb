// SPDX-License-Identifier: Apache-2.0
// AArch64 NEON: 32 registers of 4 floats.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace pybsp::neon {
namespace {

using Vec = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec set1(float a) { return vdupq_n_f32(a); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec a) { vst1q_f32(p, a); }
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
  asm("" : "+w"(a));
  return a;
}
inline void prefetch(const float* p) { __builtin_prefetch(p); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
// a > b ? x : y
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return vbslq_f32(vcgtq_f32(a, b), x, y);
}
// b where either operand is NaN, as on the other instruction sets.
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
// One fmla: this file is compiled with -ffp-contract=fast. GCC 12 takes vfmaq_f32 for a
// call that may touch memory and stores all accumulators in every iteration.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec round(Vec a) { return vrndnq_f32(a); }
// 2^a for integral a in [-126, 127].
inline Vec pow2(Vec a) {
  int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(a), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}
inline float reduce_add(Vec a) { return vaddvq_f32(a); }
inline void transpose(Vec (&a)[kLanes]) {
  float32x4_t ab_lo = vtrn1q_f32(a[0], a[1]), ab_hi = vtrn2q_f32(a[0], a[1]);
  float32x4_t cd_lo = vtrn1q_f32(a[2], a[3]), cd_hi = vtrn2q_f32(a[2], a[3]);
  auto pair = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
  auto back = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
  a[0] = back(vtrn1q_f64(pair(ab_lo), pair(cd_lo)));
  a[1] = back(vtrn1q_f64(pair(ab_hi), pair(cd_hi)));
  a[2] = back(vtrn2q_f64(pair(ab_lo), pair(cd_lo)));
  a[3] = back(vtrn2q_f64(pair(ab_hi), pair(cd_hi)));
}

// Eight floats: the weights of eight consecutive outputs for one input.
struct Vec8 {
  float32x4_t low, high;
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
inline Vec8 add8(Vec8 a, Vec8 b) { return {add(a.low, b.low), add(a.high, b.high)}; }
inline Vec8 fma8(Vec8 a, float b, Vec8 c) {
  return {fma(a.low, set1(b), c.low), fma(a.high, set1(b), c.high)};
}
inline Vec in_register(Vec a) { return a; }
inline float* in_register(float* p) { return p; }
// The sum of each of eight vectors.
inline Vec8 reduce_add8(const Vec* a) {
  return {vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])),
          vpaddq_f32(vpaddq_f32(a[4], a[5]), vpaddq_f32(a[6], a[7]))};
}

}  // namespace
}  // namespace pybsp::neon
