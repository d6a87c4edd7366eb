// SPDX-License-Identifier: Apache-2.0
// AVX-512 BW, and the same with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simd/avx512.h"

namespace pybsp::PYBSP_ISA {
namespace {

using Bytes = __m512i;
using Sums = __m512i;

inline Bytes load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(int8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Sums load_sums(const float* p) { return _mm512_castps_si512(load(p)); }
inline void store_sums(float* p, Sums a) { store(p, _mm512_castsi512_ps(a)); }
inline Sums set1_sums(int32_t a) { return _mm512_set1_epi32(a); }
inline Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Bytes zip8_low(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes zip8_high(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes zip16_low(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes zip16_high(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline __m512i broadcast_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return _mm512_set1_epi32(quad);
}

#if defined(PYBSP_ISA_avx512)

// Sums of two products of 16 bits, for those of 8 would be saturated: the even and the
// odd bytes of a quad by themselves.
constexpr int kZeroPoint = 0;
template <int kVectors>
constexpr int kInt8Rows = 4;
struct Inputs {
  __m512i even, odd;
};
using Weights = Inputs;
inline Inputs prepare(Bytes a) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), _mm512_srai_epi16(a, 8)};
}
inline Weights broadcast_weights(const int8_t* p) { return prepare(broadcast_quad(p)); }
inline Sums add_dots(Sums sums, const Inputs& x, const Weights& w) {
  sums = _mm512_add_epi32(sums, _mm512_madd_epi16(x.even, w.even));
  return _mm512_add_epi32(sums, _mm512_madd_epi16(x.odd, w.odd));
}

#else

// The instruction takes inputs without a sign.
constexpr int kZeroPoint = 128;
template <int kVectors>
constexpr int kInt8Rows = 8;
using Inputs = Bytes;
using Weights = Bytes;
inline Inputs prepare(Bytes a) { return a; }
inline Weights broadcast_weights(const int8_t* p) { return broadcast_quad(p); }
// GCC 12 copies the accumulators of the intrinsic.
inline Sums add_dots(Sums sums, Inputs x, Weights w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
  return sums;
}
// Sums of two products of 16 bits each.
inline Sums add_pairs(Sums sums, Sums x, Sums w) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
  return sums;
}

#endif

inline Sums to_ints(Vec a) { return _mm512_cvtps_epi32(a); }
inline Vec to_floats(Sums a) { return _mm512_cvtepi32_ps(a); }
// The low halves of a and b: a, b, a, b, ...
inline Sums pair(Sums a, Sums b) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, a, _mm512_slli_epi32(b, 16));
}
inline void store_shorts(int16_t* p, Sums a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
}
inline Vec max_bits(Vec a, Vec b) {
  return _mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
inline Bytes narrow(Sums a, Sums b, Sums c, Sums d) {
  const Bytes bytes =
      _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  if (kZeroPoint == 0) return bytes;
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));  // 128 more, without a sign
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
