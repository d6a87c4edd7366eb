// SPDX-License-Identifier: Apache-2.0
// Activation functions on vectors. Relative error under (16 + 3 z) 2^-24 with z the
// magnitude of the exponent that a negative x meets (silu: 6 * 2^-24), absolute error
// under 2e-36 where that is more; tests compare against float64.
#pragma once

#include "kernels/block_sparse_gemm.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Added to a number under 2^22 it leaves no bits for a fraction: the sum is rounded to
// an integer n, which is then in its low bits.
constexpr float kShift = 12582912.0f;  // 1.5 * 2^23

// e^a for a <= 0; zero under `lowest`, at least -87.3, where the result would no longer
// be a normal float (so that no tail is left that a huge factor could lift). Cody-Waite
// reduction a = n ln 2 + r, |r| <= ln 2 / 2, and a degree-6 polynomial fitted to e^r
// with relative error 3e-9.
inline Vec exp(Vec exponent, float lowest = -87.3f) {
  const Vec a = max(exponent, set1(lowest));
  const Vec shifted = fma(a, set1(1.44269504f), set1(kShift));
  const Vec n = sub(shifted, set1(kShift));
  Vec r = fma(n, set1(-0.693359375f), a);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(0.001381393987685442f);
  p = fma(p, r, set1(0.008368910290300846f));
  p = fma(p, r, set1(0.04166841434128978f));
  p = fma(p, r, set1(0.1666651964187622f));
  p = fma(p, r, set1(0.4999999403953552f));
  const Vec e = fma(mul(r, r), p, add(r, set1(1.0f)));
  return select_gt(set1(lowest), exponent, zero(), scale_by_pow2(e, shifted));
}

// 2^a for a <= 0; zero under -126. A polynomial of degree 6 fitted to 2^r, |r| <= 1/2,
// with relative error 2e-9. NaN stays NaN.
inline Vec exp2(Vec exponent) {
  const Vec lowest = set1(-126.0f), a = max(lowest, exponent);
  const Vec shifted = add(a, set1(kShift));
  const Vec r = sub(a, sub(shifted, set1(kShift)));
  Vec p = set1(1.535336196e-4f);
  p = fma(p, r, set1(1.339887502e-3f));
  p = fma(p, r, set1(9.618436918e-3f));
  p = fma(p, r, set1(5.550332367e-2f));
  p = fma(p, r, set1(2.402264774e-1f));
  p = fma(p, r, set1(6.931471825e-1f));
  p = fma(p, r, set1(1.0f));
  return select_gt(lowest, exponent, zero(), scale_by_pow2(p, shifted));
}

// 1 / (1 + e^-a) for a > 0 and e^a / (1 + e^a) otherwise: nothing overflows.
inline Vec sigmoid(Vec a) {
  const Vec e = exp(min(a, sub(zero(), a)));
  return div(select_gt(a, zero(), set1(1.0f), e), add(set1(1.0f), e));
}

// x Phi(x) with the normal tail 1 - Phi(z) = e^{-z^2/2} t Q(t), t = 1 / (1 + 0.21 z),
// z = |x|; Q of degree 8 fitted on z in [0, 14] with relative error 2e-8. The tail is
// formed by multiplication alone, so negative x lose no digits to 1 + erf(x).
inline Vec gelu(Vec x) {
  Vec z = max(x, sub(zero(), x));
  Vec t = div(set1(1.0f), fma(z, set1(0.21f), set1(1.0f)));
  const float coefficients[] = {0.2836235761642456f,  -0.33032768964767456f,
                                0.34948867559432983f, -0.09398797154426575f,
                                0.12490062415599823f, 0.06918466091156006f,
                                0.08506997674703598f, 0.08371150493621826f};
  Vec q = set1(-0.07166333496570587f);
  for (float c : coefficients) q = fma(q, t, set1(c));
  // Zero from z = 12.8 on, before the product with q t is a denormal, which CPUs take a
  // hundred cycles for.
  Vec tail = mul(mul(q, t), exp(mul(mul(z, z), set1(-0.5f)), -82.0f));
  Vec probability = select_gt(x, zero(), sub(set1(1.0f), tail), tail);
  return mul(x, probability);
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
  }
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
