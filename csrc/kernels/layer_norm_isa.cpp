// SPDX-License-Identifier: Apache-2.0
// What an encoder layer does between its products, on tiles: reductions over features
// are sums of rows, so nothing is added across lanes.
#include "kernels/activation.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Sums of four rows apart: one alone would wait for each addition.
constexpr int kSums = 4;

struct Sums {
  Vec plain;
  Vec squares;
};

// The sums over features of x - shift, and of its square, of one vector of tokens.
template <bool kSquares>
inline Sums sum_rows(const float* x, int64_t features, int64_t width, Vec shift) {
  Vec plain[kSums], squares[kSums];
  PYBSP_UNROLL
  for (int i = 0; i < kSums; ++i) plain[i] = squares[i] = zero();
  const auto add_row = [&](int i, int64_t row) {
    const Vec a = sub(load(x + row * width), shift);
    plain[i] = add(plain[i], a);
    if constexpr (kSquares) squares[i] = fma(a, a, squares[i]);
  };
  int64_t row = 0;
  for (; row + kSums <= features; row += kSums) {
    PYBSP_UNROLL
    for (int i = 0; i < kSums; ++i) add_row(i, row + i);
  }
  for (; row < features; ++row) add_row(0, row);
  return {add(add(plain[0], plain[1]), add(plain[2], plain[3])),
          add(add(squares[0], squares[1]), add(squares[2], squares[3]))};
}

}  // namespace

void layer_norm(const float* x_tile, int64_t features, int vectors, const float* weight,
                const float* bias, float eps, float* y_tile) {
  const int64_t width = int64_t{vectors} * kLanes;
  const Vec count = set1(static_cast<float>(features));
  for (int v = 0; v < vectors; ++v) {
    const float* const x = x_tile + v * kLanes;
    float* const y = y_tile + v * kLanes;
    // The first row is near the mean for rows that are far from zero: it keeps digits.
    // Where it is far from all others, what is left of x - mean in the sum corrects.
    const Vec first = load(x);
    const Vec mean =
        add(first, div(sum_rows<false>(x, features, width, first).plain, count));
    const Sums sums = sum_rows<true>(x, features, width, mean);
    const Vec left = div(sums.plain, count);
    const Vec variance =
        max(zero(), sub(div(sums.squares, count), rounded(mul(left, left))));
    const Vec scale = div(set1(1.0f), sqrt(add(variance, set1(eps))));
    const Vec offset = sub(zero(), rounded(mul(left, scale)));
    for (int64_t row = 0; row < features; ++row) {
      const Vec a = fma(sub(load(x + row * width), mean), scale, offset);
      const Vec shift = bias ? set1(bias[row]) : zero();
      store(y + row * width, fma(a, set1(weight[row]), shift));
    }
  }
}

void rotate(float* first, float* second, const float* cosines, const float* sines,
            int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec a = load(first + i), b = load(second + i);
    const Vec cosine = load(cosines + i), sine = load(sines + i);
    // Rounded, so that it is the other product that is fused, on every instruction set.
    store(first + i, fma(sub(zero(), b), sine, rounded(mul(a, cosine))));
    store(second + i, fma(a, sine, rounded(mul(b, cosine))));
  }
}

namespace {

template <Activation kActivation>
void gate_all(const float* a, const float* b, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(y + i, mul(activate<kActivation>(load(a + i)), load(b + i)));
  }
}

}  // namespace

void gate(const float* a, const float* b, int64_t count, Activation activation,
          float* y) {
  with_activation(activation, [&](auto fixed) {
    gate_all<decltype(fixed)::value>(a, b, count, y);
  });
}

}  // namespace pybsp::PYBSP_ISA
