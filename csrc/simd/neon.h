// SPDX-License-Identifier: Apache-2.0
// AArch64 NEON: 32 registers of 4 floats.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "simd/bfloat16.h"

namespace pybsp::neon {
namespace {

using Vec = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
constexpr bool kLooksUp = false;  // no lookup()

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec set1(float a) { return vdupq_n_f32(a); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec a) { vst1q_f32(p, a); }
// The first n of kLanes floats, 0 < n < kLanes; the others are zero and not touched.
inline Vec load(const float* p, int n) {
  if (n == 1) return vld1q_lane_f32(p, zero(), 0);
  const Vec a = vcombine_f32(vld1_f32(p), vdup_n_f32(0.0f));
  return n == 2 ? a : vld1q_lane_f32(p + 2, a, 2);
}
inline void store(float* p, Vec a, int n) {
  if (n == 1) return vst1q_lane_f32(p, a, 0);
  vst1_f32(p, vget_low_f32(a));
  if (n == 3) vst1q_lane_f32(p + 2, a, 2);
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
inline Vec abs(Vec a) { return vabsq_f32(a); }
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
// shifted < lowest ? 0 : a 2^n; where not 0, n in [-126, 127], a and a 2^n are normal.
// shifted is n + 1.5 * 2^23.
inline Vec scale_by_pow2(Vec a, Vec, Vec shifted, Vec lowest) {
  const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
  const uint32x4_t scaled = vaddq_u32(vreinterpretq_u32_f32(a), n);
  return vreinterpretq_f32_u32(vbicq_u32(scaled, vcltq_f32(shifted, lowest)));
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
inline Vec sqrt(Vec a) { return vsqrtq_f32(a); }
// a <= b ? x : y
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return vbslq_f32(vcleq_f32(a, b), x, y);
}
// Whether any bit of any lane is set: false for +0 alone.
inline bool any_bit(Vec a) { return vmaxvq_u32(vreinterpretq_u32_f32(a)) != 0; }
// a0 + a1, a2 + a3, ..., b0 + b1, ...
inline Vec pair_sums(Vec a, Vec b) { return vpaddq_f32(a, b); }
// a0, a0, a1, a1, ... of the lower and the upper half.
inline Vec twice_low(Vec a) { return vzip1q_f32(a, a); }
inline Vec twice_high(Vec a) { return vzip2q_f32(a, a); }
// 1 for true, 0 for false.
inline Vec load(const bool* p) {
  const uint32_t flags[kLanes] = {p[0], p[1], p[2], p[3]};
  return vcvtq_f32_u32(vld1q_u32(flags));
}

// The upper halves of floats. Stores round to nearest even; a NaN stays one.
inline Vec load(const Bfloat16* p) {
  const uint16x4_t a = vld1_u16(&p->bits);
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(a), 16));
}
inline void store(Bfloat16* p, Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t rounded = vbslq_u32(vceqq_f32(a, a), up, quiet);
  vst1_u16(&p->bits, vshrn_n_u32(rounded, 16));
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
  float64x2_t low, high;
};
inline Sum zero_sum() { return {vdupq_n_f64(0.0), vdupq_n_f64(0.0)}; }
inline Sum add(Sum a, Vec b) {
  return {vaddq_f64(a.low, vcvt_f64_f32(vget_low_f32(b))),
          vaddq_f64(a.high, vcvt_high_f64_f32(b))};
}
inline double total(Sum a) { return vaddvq_f64(vaddq_f64(a.low, a.high)); }

// Eight floats: the weights of eight consecutive outputs for one input.
struct Vec8 {
  float32x4_t low, high;
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
  if (n < 4) return {load(p, n), zero()};
  return {load(p), n == 4 ? zero() : load(p + 4, n - 4)};
}
inline void store8(float* p, Vec8 a, int n) {
  if (n < 4) return store(p, a.low, n);
  store(p, a.low);
  if (n > 4) store(p + 4, a.high, n - 4);
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
