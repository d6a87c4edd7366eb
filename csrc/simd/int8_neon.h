// SPDX-License-Identifier: Apache-2.0
// NEON, and the same with dot products (Armv8.2).
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "simd/neon.h"

namespace pybsp::PYBSP_ISA {
namespace {

using Bytes = int8x16_t;
using Sums = int32x4_t;

constexpr int kZeroPoint = 0;
template <int kVectors>
constexpr int kInt8Rows = 8;

inline Bytes load_bytes(const int8_t* p) { return vld1q_s8(p); }
inline void store_bytes(int8_t* p, Bytes a) { vst1q_s8(p, a); }
inline Sums load_sums(const float* p) { return vreinterpretq_s32_f32(load(p)); }
inline void store_sums(float* p, Sums a) { store(p, vreinterpretq_f32_s32(a)); }
inline Sums set1_sums(int32_t a) { return vdupq_n_s32(a); }
inline Sums add_sums(Sums a, Sums b) { return vaddq_s32(a, b); }
inline Bytes zip8_low(Bytes a, Bytes b) { return vzip1q_s8(a, b); }
inline Bytes zip8_high(Bytes a, Bytes b) { return vzip2q_s8(a, b); }
inline Bytes zip16_low(Bytes a, Bytes b) {
  return vreinterpretq_s8_s16(
      vzip1q_s16(vreinterpretq_s16_s8(a), vreinterpretq_s16_s8(b)));
}
inline Bytes zip16_high(Bytes a, Bytes b) {
  return vreinterpretq_s8_s16(
      vzip2q_s16(vreinterpretq_s16_s8(a), vreinterpretq_s16_s8(b)));
}

using Inputs = Bytes;
using Weights = Bytes;
inline Inputs prepare(Bytes a) { return a; }
inline Weights broadcast_weights(const int8_t* p) {
  return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(p)));
}
#if defined(PYBSP_ISA_neon_dot)
inline Sums add_dots(Sums sums, Inputs x, Weights w) { return vdotq_s32(sums, x, w); }
#else
// Two products fit 16 bits: an input is never -128.
inline Sums add_dots(Sums sums, Inputs x, Weights w) {
  const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w));
  const int16x8_t high = vmull_high_s8(x, w);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
}
#endif

inline Sums to_ints(Vec a) { return vcvtnq_s32_f32(a); }
inline Vec to_floats(Sums a) { return vcvtq_f32_s32(a); }
inline Vec max_bits(Vec a, Vec b) {
  return vreinterpretq_f32_s32(
      vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
}
inline Vec magnitude(Vec a) { return vabsq_f32(a); }
inline Bytes narrow(Sums a, Sums b, Sums c, Sums d) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(a), vqmovn_s32(b));
  const int16x8_t high = vcombine_s16(vqmovn_s32(c), vqmovn_s32(d));
  return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
