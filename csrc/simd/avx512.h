// SPDX-License-Identifier: Apache-2.0
// AVX-512 F/BW/DQ/VL: 32 registers of 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pybsp::avx512 {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float a) { return _mm512_set1_ps(a); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
// The first n of kLanes floats, 0 < n < kLanes; the others are zero and not touched.
inline Vec load(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), p);
}
inline void store(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << n) - 1), a);
}
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
inline Vec round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a > b ? x : y
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
// 2^a for integral a in [-126, 127].
inline Vec pow2(Vec a) {
  __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
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

// Eight floats: the weights of eight consecutive outputs for one input.
using Vec8 = __m256;
inline Vec8 zero8() { return _mm256_setzero_ps(); }
inline Vec8 load8(const float* p) { return _mm256_loadu_ps(p); }
inline void store8(float* p, Vec8 a) { _mm256_storeu_ps(p, a); }
// The first n of eight floats, 0 < n < 8; the others are zero and not touched.
inline Vec8 load8(const float* p, int n) {
  return _mm256_maskz_loadu_ps(static_cast<__mmask8>((1 << n) - 1), p);
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
