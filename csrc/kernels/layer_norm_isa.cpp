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

template <int kVectors>
struct Sums {
  Vec plain[kVectors];
  Vec squares[kVectors];
};

// The sums over features of x - shift, and of its square, of kVectors vectors of
// tokens.
template <int kVectors, bool kSquares>
inline Sums<kVectors> sum_rows(const float* x, int64_t features, int64_t width,
                               const Vec (&shift)[kVectors]) {
  Vec plain[kSums][kVectors], squares[kSums][kVectors];
  PYBSP_UNROLL
  for (int i = 0; i < kSums; ++i) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) plain[i][v] = squares[i][v] = zero();
  }
  const auto add_row = [&](int i, int64_t row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec a = sub(load(x + row * width + v * kLanes), shift[v]);
      plain[i][v] = add(plain[i][v], a);
      if constexpr (kSquares) squares[i][v] = fma(a, a, squares[i][v]);
    }
  };
  int64_t row = 0;
  for (; row + kSums <= features; row += kSums) {
    PYBSP_UNROLL
    for (int i = 0; i < kSums; ++i) add_row(i, row + i);
  }
  for (; row < features; ++row) add_row(0, row);
  const auto total = [](const Vec(&sums)[kSums][kVectors], int v) {
    return add(add(sums[0][v], sums[1][v]), add(sums[2][v], sums[3][v]));
  };
  Sums<kVectors> all;
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    all.plain[v] = total(plain, v);
    all.squares[v] = total(squares, v);
  }
  return all;
}

// kVectors vectors of a tile whose rows are `width` floats apart.
template <int kVectors>
void norm_vectors(const float* x, int64_t features, int64_t width, const float* weight,
                  const float* bias, float eps, float* y) {
  const Vec count = set1(static_cast<float>(features));
  // The first row is near the mean for rows that are far from zero: it keeps digits.
  // Where it is far from all others, what is left of x - mean in the sum corrects.
  Vec first[kVectors], mean[kVectors], scale[kVectors], offset[kVectors];
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) first[v] = load(x + v * kLanes);
  const Sums<kVectors> rough = sum_rows<kVectors, false>(x, features, width, first);
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v)
    mean[v] = add(first[v], div(rough.plain[v], count));
  const Sums<kVectors> sums = sum_rows<kVectors, true>(x, features, width, mean);
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec left = div(sums.plain[v], count);
    const Vec variance =
        max(zero(), sub(div(sums.squares[v], count), rounded(mul(left, left))));
    scale[v] = div(set1(1.0f), sqrt(add(variance, set1(eps))));
    offset[v] = sub(zero(), rounded(mul(left, scale[v])));
  }
  for (int64_t row = 0; row < features; ++row) {
    const Vec factor = set1(weight[row]), shift = bias ? set1(bias[row]) : zero();
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = row * width + v * kLanes;
      const Vec a = fma(sub(load(x + at), mean[v]), scale[v], offset[v]);
      store(y + at, fma(a, factor, shift));
    }
  }
}

}  // namespace

// With 32 registers all vectors of a row at once, which lie side by side.
void layer_norm(const float* x_tile, int64_t features, int vectors, const float* weight,
                const float* bias, float eps, float* y_tile) {
  const int64_t width = int64_t{vectors} * kLanes;
  if (kRegisters >= 32 && vectors == 3) {
    return norm_vectors<3>(x_tile, features, width, weight, bias, eps, y_tile);
  }
  if (kRegisters >= 32 && vectors == 2) {
    return norm_vectors<2>(x_tile, features, width, weight, bias, eps, y_tile);
  }
  for (int v = 0; v < vectors; ++v) {
    norm_vectors<1>(x_tile + v * kLanes, features, width, weight, bias, eps,
                    y_tile + v * kLanes);
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
