// SPDX-License-Identifier: Apache-2.0
// AVX-512 F/BW/DQ/VL: 32 registers of 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/bfloat16.h"

namespace pybsp::avx512 {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr bool kLooksUp = true;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float a) { return _mm512_set1_ps(a); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
// The first n of kLanes floats, 0 < n < kLanes; the others are zero and not touched.
inline __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float* p, int n) {
  return _mm512_maskz_loadu_ps(lane_mask(n), p);
}
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lane_mask(n), a); }
// a as it is, rounded: what uses it is not fused with what made it.
inline Vec rounded(Vec a) {
  asm("" : "+v"(a));
  return a;
}
inline void prefetch(const float* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// b where either operand is NaN, as the instruction does.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
// a > b ? x : y
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
// shifted < lowest ? 0 : a 2^n; where not 0, n in [-126, 127], a and a 2^n are normal.
// shifted is n + 1.5 * 2^23.
inline Vec scale_by_pow2(Vec a, Vec n, Vec shifted, Vec lowest) {
  const __mmask16 kept = _mm512_cmp_ps_mask(shifted, lowest, _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, a, n);
}
// table[i mod 32] of the integers i in the low bits of i + 1.5 * 2^23.
inline Vec lookup(const float (&table)[32], Vec shifted) {
  return _mm512_permutex2var_ps(load(table), _mm512_castps_si512(shifted),
                                load(table + 16));
}
inline float reduce_add(Vec a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline void transpose(Vec (&a)[kLanes]) {
  // Four rounds of two-operand shuffles: 32-bit pairs, 64-bit pairs, then 128-bit
  // quarters twice; 64 shuffles for 256 elements.
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  Vec u[16];
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    a[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
  }
}
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
// a <= b ? x : y
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x);
}
// Whether any bit of any lane is set: false for +0 alone.
inline bool any_bit(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  return _mm512_test_epi32_mask(bits, bits) != 0;
}
// a0 + a1, a2 + a3, ..., b0 + b1, ...
inline Vec pair_sums(Vec a, Vec b) {
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b),
                       _mm512_permutex2var_ps(a, odd, b));
}
// a0, a0, a1, a1, ... of the lower and the upper half.
inline Vec twice_low(Vec a) {
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a);
}
inline Vec twice_high(Vec a) {
  return _mm512_permutexvar_ps(
      _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), a);
}
// 1 for true, 0 for false.
inline Vec load(const bool* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// The upper halves of floats. Stores round to nearest even; a NaN stays one.
inline Vec from_bfloat16(__m256i a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
inline __m256i to_bfloat16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_blend_epi32(
      _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_add_epi32(bits, up), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline Vec load(const Bfloat16* p) {
  return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Bfloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a));
}
inline Vec load(const Bfloat16* p, int n) {
  return from_bfloat16(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
inline void store(Bfloat16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), to_bfloat16(a));
}

// A sum of floats in double precision.
struct Sum {
  __m512d low, high;
};
inline Sum zero_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline Sum add(Sum a, Vec b) {
  return {_mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(b))),
          _mm512_add_pd(a.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)))};
}
inline double total(Sum a) {
  double lanes[8], sum = 0.0;
  _mm512_storeu_pd(lanes, _mm512_add_pd(a.low, a.high));
  for (int i = 0; i < 8; ++i) sum += lanes[i];
  return sum;
}

// Eight floats: the weights of eight consecutive outputs for one input.
using Vec8 = __m256;
inline Vec8 zero8() { return _mm256_setzero_ps(); }
inline Vec8 load8(const float* p) { return _mm256_loadu_ps(p); }
inline void store8(float* p, Vec8 a) { _mm256_storeu_ps(p, a); }
// The first n of eight floats, 0 < n < 8; the others are zero and not touched.
inline Vec8 load8(const float* p, int n) {
  return _mm256_maskz_loadu_ps(static_cast<__mmask8>((1 << n) - 1), p);
}
inline Vec8 from_bfloat16(__m128i a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
inline Vec8 load8(const Bfloat16* p) {
  return from_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec8 load8(const Bfloat16* p, int n) {
  return from_bfloat16(_mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << n) - 1), p));
}
inline void store8(float* p, Vec8 a, int n) {
  _mm256_mask_storeu_ps(p, static_cast<__mmask8>((1 << n) - 1), a);
}
inline Vec8 add8(Vec8 a, Vec8 b) { return _mm256_add_ps(a, b); }
inline Vec8 fma8(Vec8 a, float b, Vec8 c) {
  return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c);
}
// a, loaded once into a register: GCC 12 takes an input that several multiply-adds
// share from memory for each of them.
inline Vec in_register(Vec a) {
  asm("" : "+v"(a));
  return a;
}
inline float* in_register(float* p) {
  asm("" : "+r"(p));
  return p;
}
// The sum of each of eight vectors. Every round adds the halves of two vectors into
// one; a blend takes the place of half of the shuffles, which share a port with the
// multiply-adds.
inline Vec8 reduce_add8(const Vec* a) {
  Vec t[4];
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a[i], a[i + 4]),
                         _mm512_shuffle_f32x4(a[i], a[i + 4], 0x4E));
  }
  const __m512i swapped = _mm512_setr_epi64(2, 3, 8, 9, 6, 7, 12, 13);
  Vec u[2];
  for (int i = 0; i < 2; ++i) {
    const Vec crossed = _mm512_castpd_ps(_mm512_permutex2var_pd(
        _mm512_castps_pd(t[i]), swapped, _mm512_castps_pd(t[i + 2])));
    u[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xF0F0, t[i], t[i + 2]), crossed);
  }
  const Vec pairs = _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, u[0], u[1]),
                                  _mm512_shuffle_ps(u[0], u[1], 0x4E));
  const Vec sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(even, sums));
}

}  // namespace
}  // namespace pybsp::avx512
