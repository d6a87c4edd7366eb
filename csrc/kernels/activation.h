// SPDX-License-Identifier: Apache-2.0
// Activation functions on vectors. Relative error, but for gelu_absolute and
// gelu_short, under (16 + 3 z) 2^-24 with z the magnitude of the exponent that a
// negative x meets (silu: 6 * 2^-24), absolute error under 2e-36 where that is more;
// tests compare against float64.
#pragma once

#include "kernels/block_sparse_gemm.h"
#include "kernels/gelu_table.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Added to a number under 2^22 it leaves no bits for a fraction: the sum is rounded to
// an integer n, which is then in its low bits.
constexpr float kShift = 12582912.0f;  // 1.5 * 2^23

// e^(factor a) <= 1, with a power of two, perhaps negative, for a factor. Zero where
// the nearest power of two is under 2^lowest, lowest >= -125, so that no tail is left
// that a huge factor could lift. Cody-Waite reduction factor a = n ln 2 + r, |r| <= ln
// 2 / 2, and a degree-6 polynomial fitted to e^r with relative error 3e-9. What is far
// below lowest is computed with the rest and then dropped.
inline Vec exp(Vec a, float factor, float lowest) {
  const float f = factor, f2 = f * f;  // all products with them are exact
  const Vec shifted = fma(a, set1(1.44269504f * f), set1(kShift));
  const Vec n = sub(shifted, set1(kShift));
  Vec r = fma(n, set1(-0.693359375f / f), a);
  r = fma(n, set1(2.12194440e-4f / f), r);
  Vec p = set1(0.001381393987685442f * f2 * f2 * f2);
  p = fma(p, r, set1(0.008368910290300846f * f2 * f2 * f));
  p = fma(p, r, set1(0.04166841434128978f * f2 * f2));
  p = fma(p, r, set1(0.1666651964187622f * f2 * f));
  p = fma(p, r, set1(0.4999999403953552f * f2));
  p = fma(p, r, set1(f));
  p = fma(p, r, set1(1.0f));
  return scale_by_pow2(p, n, shifted, set1(kShift + lowest));
}

// 2^(a + shift - kShift) under 2^22; zero under 2^-125.5, whatever a is, -infinity too,
// of which r is NaN and dropped. shift is an even integer with which the sum has no
// bits for a fraction. A polynomial of degree 6 fitted to 2^r, |r| <= 1/2, with
// relative error 2e-9. NaN without a payload, as operations make it, stays NaN. AVX-512
// has one instruction for r, but Zen 4's waits for what was in its destination, here
// for the exponential before.
inline Vec exp2(Vec a, Vec shift) {
  const Vec shifted = add(a, shift);
  const Vec r = sub(a, sub(shifted, shift));
  Vec p = set1(1.535336196e-4f);
  p = fma(p, r, set1(1.339887502e-3f));
  p = fma(p, r, set1(9.618436918e-3f));
  p = fma(p, r, set1(5.550332367e-2f));
  p = fma(p, r, set1(2.402264774e-1f));
  p = fma(p, r, set1(6.931471825e-1f));
  p = fma(p, r, set1(1.0f));
  return scale_by_pow2(p, sub(shifted, set1(kShift)), shifted, set1(kShift - 125.0f));
}

// 1 / (1 + e^-a) for a > 0 and e^a / (1 + e^a) otherwise: nothing overflows.
inline Vec sigmoid(Vec a) {
  const Vec e = exp(abs(a), -1.0f, -125.0f);
  return div(select_gt(a, zero(), set1(1.0f), e), add(set1(1.0f), e));
}

// x Phi(x) with the normal tail 1 - Phi(z) = e^{-z^2/2} t Q(t), t = 1 / (1 + 0.305 z),
// z = |x|; Q of degree 7 fitted on z in [0, 13] with relative error 1e-7. The tail is
// formed by multiplication alone, so negative x lose no digits to 1 + erf(x).
inline Vec gelu(Vec x) {
  const Vec t = div(set1(1.0f), fma(abs(x), set1(0.305f), set1(1.0f)));
  const float coefficients[] = {-0.15298430621623993f, 0.18571026623249054f,
                                -0.03797098621726036f, 0.12101873010396957f,
                                0.10342171788215637f,  0.12246669083833694f,
                                0.12163974344730377f};
  Vec q = set1(0.03669818863272667f);
  for (float c : coefficients) q = fma(q, t, set1(c));
  // Zero from z = 12.8 on, before the product with q t is a denormal, which CPUs take a
  // hundred cycles for.
  const Vec tail = rounded(mul(mul(q, t), exp(rounded(mul(x, x)), -0.5f, -118.0f)));
  const Vec probability = select_gt(x, zero(), sub(set1(1.0f), tail), tail);
  return mul(x, probability);
}

// x Phi(x) by a table of polynomials, and max(0, x) past the last of them.
template <int kDegree, typename Lanes>
inline Lanes gelu_by_table(Lanes x) {
  static constexpr GeluTable<kDegree> kTable;
  constexpr float kEnd = (kGeluIntervals - 1) / kGeluScale;
  const Lanes z = abs(x), scale = set1(kGeluScale), shift = set1(kShift);
  const Lanes shifted = fma(z, scale, shift);
  const Lanes r = fma(z, scale, sub(shift, shifted));
  Lanes p = lookup(kTable.rows[0], shifted);
  PYBSP_UNROLL
  for (int i = 1; i <= kDegree; ++i) p = fma(p, r, lookup(kTable.rows[i], shifted));
  return select_gt(z, set1(kEnd), max(zero(), x), fma(x, set1(0.5f), p));
}

// x Phi(x) with an error under 1e-7 (1 + |x|), for half of the time where there is a
// table.
template <typename Lanes>
inline Lanes gelu_absolute(Lanes x) {
  if constexpr (kLooksUp) return gelu_by_table<4>(x);
  return gelu(x);
}

// x Phi(x) with an error under 5e-6, and 1e-6 x of a positive x. Without a table:
// Phi(z)
// - 1/2 = z P(t), t = 2 (z / 4.8)^2 - 1, with P of degree 10 fitted on |z| <= 4.8,
// beyond which Phi is 0 or 1.
template <typename Lanes>
inline Lanes gelu_short(Lanes x) {
  if constexpr (kLooksUp) return gelu_by_table<3>(x);
  // Phi(-4.8) is 3e-8 here, of a large x too much.
  const Vec bounded = max(set1(-4.8f), x), z = min(bounded, set1(4.8f));
  const Vec t = fma(mul(z, z), set1(0.08680555f), set1(-1.0f));
  const float coefficients[] = {-4.195191038e-03f, 5.392703822e-03f,  -7.442357418e-03f,
                                1.386338234e-02f,  -2.218810766e-02f, 3.072124054e-02f,
                                -4.056583101e-02f, 5.290401761e-02f,  -7.297975620e-02f,
                                1.472127800e-01f};
  Vec p = set1(1.443781546e-03f);
  for (float c : coefficients) p = fma(p, t, set1(c));
  return mul(bounded, fma(p, z, set1(0.5f)));
}

// x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), equal to 0.5 x (1 + tanh(...)).
inline Vec gelu_tanh(Vec x) {
  Vec cubic = fma(mul(x, x), set1(0.07135481282f), set1(1.595769122f));
  return mul(x, sigmoid(mul(x, cubic)));
}

inline Vec silu(Vec x) { return mul(x, sigmoid(x)); }

template <Activation kActivation>
inline Vec activate(Vec x) {
  if constexpr (kActivation == Activation::relu) return max(zero(), x);
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::silu) return silu(x);
  if constexpr (kActivation == Activation::gelu_absolute) return gelu_absolute(x);
  if constexpr (kActivation == Activation::gelu_short) return gelu_short(x);
  return x;
}

template <Activation kActivation>
struct FixedActivation {
  static constexpr Activation value = kActivation;
};

// body(FixedActivation<activation>{}): a loop is compiled once for each activation.
template <typename Body>
inline void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::none:
      return body(FixedActivation<Activation::none>{});
    case Activation::relu:
      return body(FixedActivation<Activation::relu>{});
    case Activation::gelu:
      return body(FixedActivation<Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(FixedActivation<Activation::gelu_tanh>{});
    case Activation::silu:
      return body(FixedActivation<Activation::silu>{});
    case Activation::gelu_absolute:
      return body(FixedActivation<Activation::gelu_absolute>{});
    case Activation::gelu_short:
      return body(FixedActivation<Activation::gelu_short>{});
  }
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
