// SPDX-License-Identifier: Apache-2.0
// GELU as one polynomial for each of 32 intervals, computed by the compiler.
//
// x Phi(x) = x / 2 + g(|x|) with g(z) = z (Phi(z) - 1/2), even and smooth. Interval k
// is centred on z = k / 4, and its polynomial of r = 4 z - k, |r| <= 1/2, interpolates
// g at Chebyshev points. That of interval 0 has the factor r^2 of g, so that small x
// keep their digits.
#pragma once

#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

constexpr int kGeluIntervals = 32;
constexpr float kGeluScale = 4.0f;

// (Phi(z) - 1/2) / z for z >= 0: e^{-z^2/2} / sqrt(2 pi) (1 + z^2/3 + z^4/(3 5) + ...),
// which has no cancellation, and e^{z^2/2} is a sum of the same kind.
constexpr double normal_slope(double z) {
  double sum = 0.0, exponential = 0.0, a = 1.0, b = 1.0;
  for (int i = 1; i < 100; ++i) {
    sum += a;
    exponential += b;
    a *= z * z / (2 * i + 1);
    b *= z * z / (2 * i);
  }
  return 0.39894228040143267794 * sum / exponential;
}

// Roots of the Chebyshev polynomial of degree 1 to 5.
constexpr double kChebyshev[5][5] = {{0.0},
                                     {-0.70710678118654752, 0.70710678118654752},
                                     {-0.86602540378443865, 0.0, 0.86602540378443865},
                                     {-0.92387953251128674, -0.38268343236508977,
                                      0.38268343236508977, 0.92387953251128674},
                                     {-0.95105651629515357, -0.58778525229247313, 0.0,
                                      0.58778525229247313, 0.95105651629515357}};

// Coefficients of r^kDegree, ..., r, 1, one row for each power.
template <int kDegree>
struct GeluTable {
  alignas(64) float rows[kDegree + 1][kGeluIntervals];

  constexpr GeluTable() : rows{} {
    for (int k = 0; k < kGeluIntervals; ++k) interpolate(k);
  }

 private:
  constexpr void interpolate(int k) {
    // Of interval 0, g / r^2 on [0, 1/2]; of the others, g on [-1/2, 1/2].
    const int skipped = k ? 0 : 2, points = kDegree + 1 - skipped;
    double r[kDegree + 1] = {}, newton[kDegree + 1] = {};
    for (int i = 0; i < points; ++i) {
      const double root = kChebyshev[points - 1][i];
      r[i] = k ? root / 2 : (root + 1) / 4;
      const double z = (k + r[i]) / kGeluScale;
      newton[i] = normal_slope(z) * (k ? z * z : 1.0 / kGeluScale / kGeluScale);
    }
    for (int order = 1; order < points; ++order) {
      for (int i = points - 1; i >= order; --i) {
        newton[i] = (newton[i] - newton[i - 1]) / (r[i] - r[i - order]);
      }
    }
    double power[kDegree + 1] = {};  // of r^0, r^1, ...
    for (int i = points - 1; i >= 0; --i) {
      for (int j = points - 1; j > 0; --j) power[j] = power[j - 1] - r[i] * power[j];
      power[0] = newton[i] - r[i] * power[0];
    }
    for (int j = 0; j < points; ++j) {
      rows[kDegree - skipped - j][k] = static_cast<float>(power[j]);
    }
  }
};

}  // namespace
}  // namespace pybsp::PYBSP_ISA
