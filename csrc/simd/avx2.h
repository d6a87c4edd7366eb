// SPDX-License-Identifier: Apache-2.0
// AVX2 + FMA: 16 registers of 8 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/bfloat16.h"

namespace pybsp::avx2 {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kLooksUp = false;  // no lookup()

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float a) { return _mm256_set1_ps(a); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
// The first n of kLanes floats, 0 < n < kLanes; the others are zero and not touched.
inline __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, lane_mask(n)); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, lane_mask(n), a); }
// a as it is, rounded: what uses it is not fused with what made it.
inline Vec rounded(Vec a) {
  asm("" : "+x"(a));
  return a;
}
inline void prefetch(const float* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// b where either operand is NaN, as the instruction does.
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(set1(-0.0f), a); }
// a > b ? x : y
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
// shifted < lowest ? 0 : a 2^n; where not 0, n in [-126, 127], a and a 2^n are normal.
// shifted is n + 1.5 * 2^23.
inline Vec scale_by_pow2(Vec a, Vec, Vec shifted, Vec lowest) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(a), n);
  return _mm256_and_ps(_mm256_castsi256_ps(scaled),
                       _mm256_cmp_ps(shifted, lowest, _CMP_NLT_UQ));
}
inline float reduce_add(Vec a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline void transpose(Vec (&a)[kLanes]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  Vec u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    a[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
// a <= b ? x : y
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
// Whether any bit of any lane is set: false for +0 alone.
inline bool any_bit(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  return !_mm256_testz_si256(bits, bits);
}
// a0 + a1, a2 + a3, ..., b0 + b1, ...
inline Vec pair_sums(Vec a, Vec b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_hadd_ps(a, b));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8));
}
// a0, a0, a1, a1, ... of the lower and the upper half.
inline Vec twice_low(Vec a) {
  return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline Vec twice_high(Vec a) {
  return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}
// 1 for true, 0 for false.
inline Vec load(const bool* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

// The upper halves of floats. Stores round to nearest even; a NaN stays one.
inline Vec load(const Bfloat16* p) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
inline void store(Bfloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, up), quiet, nan);
  const __m256i upper = _mm256_srli_epi32(rounded, 16);
  const __m256i packed =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
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
  __m256d low, high;
};
inline Sum zero_sum() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline Sum add(Sum a, Vec b) {
  return {_mm256_add_pd(a.low, _mm256_cvtps_pd(_mm256_castps256_ps128(b))),
          _mm256_add_pd(a.high, _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)))};
}
inline double total(Sum a) {
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(a.low, a.high));
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// Eight floats: the weights of eight consecutive outputs for one input.
using Vec8 = __m256;
inline Vec8 zero8() { return _mm256_setzero_ps(); }
inline Vec8 load8(const float* p) { return _mm256_loadu_ps(p); }
inline void store8(float* p, Vec8 a) { _mm256_storeu_ps(p, a); }
// The first n of eight floats, 0 < n < 8; the others are zero and not touched.
inline Vec8 load8(const float* p, int n) { return load(p, n); }
inline void store8(float* p, Vec8 a, int n) { store(p, a, n); }
inline Vec8 load8(const Bfloat16* p) { return load(p); }
// In two pieces that need no way through memory.
inline Vec8 load8(const Bfloat16* p, int n) {
  const int tail = n % 4;
  uint64_t last = 0;
  for (int i = 0; i < tail; ++i) last |= uint64_t{p[n - tail + i].bits} << (16 * i);
  __m128i a = _mm_cvtsi64_si128(static_cast<long long>(last));
  if (n >= 4) {
    a = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), a);
  }
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
inline Vec8 add8(Vec8 a, Vec8 b) { return _mm256_add_ps(a, b); }
inline Vec8 fma8(Vec8 a, float b, Vec8 c) {
  return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c);
}
// a, loaded once into a register: GCC 12 takes an input that several multiply-adds
// share from memory for each of them.
inline Vec in_register(Vec a) {
  asm("" : "+x"(a));
  return a;
}
inline float* in_register(float* p) {
  asm("" : "+r"(p));
  return p;
}
// The sum of each of eight vectors.
inline Vec8 reduce_add8(const Vec* a) {
  const Vec low =
      _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const Vec high =
      _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}

}  // namespace
}  // namespace pybsp::avx2
