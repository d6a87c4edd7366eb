// SPDX-License-Identifier: Apache-2.0
// AVX2, and the same with AVX-VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simd/avx2.h"

namespace pybsp::PYBSP_ISA {
namespace {

using Bytes = __m256i;
using Sums = __m256i;

inline Bytes load_bytes(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store_bytes(int8_t* p, Bytes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
inline Sums load_sums(const float* p) { return _mm256_castps_si256(load(p)); }
inline void store_sums(float* p, Sums a) { store(p, _mm256_castsi256_ps(a)); }
inline Sums set1_sums(int32_t a) { return _mm256_set1_epi32(a); }
inline Sums add_sums(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline Bytes zip8_low(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes zip8_high(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes zip16_low(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes zip16_high(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline __m256i broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

#if defined(PYBSP_ISA_avx2_vnni)

// The instruction takes inputs without a sign.
constexpr int kZeroPoint = 128;
template <int kVectors>
constexpr int kInt8Rows = kVectors == 1 ? 8 : 4;
using Inputs = Bytes;
using Weights = Bytes;
inline Inputs prepare(Bytes a) { return a; }
inline Weights broadcast_weights(const int8_t* p) { return broadcast_quad(p); }
// GCC 12 copies the accumulators of the intrinsic.
inline Sums add_dots(Sums sums, Inputs x, Weights w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
  return sums;
}
// Sums of two products of 16 bits each.
inline Sums add_pairs(Sums sums, Sums x, Sums w) {
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
  return sums;
}

#else

// Sums of two products of 16 bits, for those of 8 would be saturated: the even and the
// odd bytes of a quad by themselves.
constexpr int kZeroPoint = 0;
template <int kVectors>
constexpr int kInt8Rows = 2;
struct Inputs {
  __m256i even, odd;
};
using Weights = Inputs;
inline Inputs prepare(Bytes a) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)};
}
inline Weights broadcast_weights(const int8_t* p) { return prepare(broadcast_quad(p)); }
inline Sums add_dots(Sums sums, const Inputs& x, const Weights& w) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(x.even, w.even));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(x.odd, w.odd));
}

#endif

inline Sums to_ints(Vec a) { return _mm256_cvtps_epi32(a); }
inline Vec to_floats(Sums a) { return _mm256_cvtepi32_ps(a); }
// The low halves of a and b: a, b, a, b, ...
inline Sums pair(Sums a, Sums b) {
  return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA);
}
inline void store_shorts(int16_t* p, Sums a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, a), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Vec max_bits(Vec a, Vec b) {
  return _mm256_castsi256_ps(
      _mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline Vec magnitude(Vec a) {
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
inline Bytes narrow(Sums a, Sums b, Sums c, Sums d) {
  const Bytes bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  if (kZeroPoint == 0) return bytes;
  return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));  // 128 more, without a sign
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
