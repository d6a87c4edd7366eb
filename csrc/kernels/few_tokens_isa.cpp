// SPDX-License-Identifier: Apache-2.0
// One to four tokens: limited by reading the weights once, so outputs (or, for
// single-row blocks, inputs) lie in lanes and nothing is transposed.
#include "kernels/activation.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Partial sums for each token: enough chains to hide the FMA latency at one load a
// cycle, few enough for sixteen registers.
template <int kTokens>
constexpr int kChains = 4 / kTokens;

struct Inputs {
  const float* x;
  int64_t stride;
};

// One column of eight outputs for every token.
template <int kTokens>
inline void add_column(const float* w, Inputs in, int64_t col, Vec8 (&acc)[kTokens]) {
  const Vec8 weight = load8(w);
  for (int t = 0; t < kTokens; ++t) {
    acc[t] = fma8(weight, in.x[t * in.stride + col], acc[t]);
  }
}

// Eight consecutive outputs of one block row.
template <int kTokens>
void eight_outputs(const BlockSparseView& weight, int64_t block_row, int64_t sub,
                   Inputs in, Vec8 (&sums)[kTokens]) {
  constexpr int kParts = kChains<kTokens>;
  const int64_t r = weight.block_rows, c = weight.block_cols;
  Vec8 acc[kParts][kTokens];
  for (auto& part : acc) {
    for (auto& sum : part) sum = zero8();
  }
  const int64_t begin = weight.crow_indices[block_row];
  const int64_t end = weight.crow_indices[block_row + 1];
  const int32_t* cols = weight.col_indices;
  const float* w = weight.values + begin * r * c + sub;
  if (c == 1) {
    int64_t b = begin;
    for (; b + kParts <= end; b += kParts, w += kParts * r) {
      for (int p = 0; p < kParts; ++p) {
        add_column<kTokens>(w + p * r, in, cols[b + p], acc[p]);
      }
    }
    for (; b < end; ++b, w += r) add_column<kTokens>(w, in, cols[b], acc[0]);
  } else {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = cols[b] * c;
      int64_t i = 0;
      for (; i + kParts <= c; i += kParts, w += kParts * r) {
        for (int p = 0; p < kParts; ++p) {
          add_column<kTokens>(w + p * r, in, first + i + p, acc[p]);
        }
      }
      for (; i < c; ++i, w += r) add_column<kTokens>(w, in, first + i, acc[0]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    sums[t] = acc[0][t];
    for (int p = 1; p < kParts; ++p) sums[t] = add8(sums[t], acc[p][t]);
  }
}

// The outputs of a block row past the last whole eight.
float one_output(const BlockSparseView& weight, int64_t block_row, int64_t sub,
                 const float* x) {
  const int64_t r = weight.block_rows, c = weight.block_cols;
  float sum = 0.0f;
  for (int64_t b = weight.crow_indices[block_row];
       b < weight.crow_indices[block_row + 1]; ++b) {
    const float* w = weight.values + b * r * c + sub;
    const float* in = x + weight.col_indices[b] * c;
    for (int64_t i = 0; i < c; ++i) sum += w[i * r] * in[i];
  }
  return sum;
}

// Single-row blocks: a dot product over each run of inputs.
float one_row(const BlockSparseView& weight, int64_t row, const float* x) {
  const int64_t c = weight.block_cols;
  Vec sums[2] = {zero(), zero()};
  float tail = 0.0f;
  for (int64_t b = weight.crow_indices[row]; b < weight.crow_indices[row + 1]; ++b) {
    const float* w = weight.values + b * c;
    const float* in = x + weight.col_indices[b] * c;
    int64_t i = 0;
    for (; i + 2 * kLanes <= c; i += 2 * kLanes) {
      sums[0] = fma(load(w + i), load(in + i), sums[0]);
      sums[1] = fma(load(w + i + kLanes), load(in + i + kLanes), sums[1]);
    }
    for (; i + kLanes <= c; i += kLanes) {
      sums[0] = fma(load(w + i), load(in + i), sums[0]);
    }
    for (; i < c; ++i) tail += w[i] * in[i];
  }
  return reduce_add(add(sums[0], sums[1])) + tail;
}

template <int kTokens>
void multiply_tokens(const BlockSparseView& weight, int64_t first, int64_t last,
                     const float* x, const float* bias, float* y) {
  const int64_t r = weight.block_rows;
  const Inputs in{x, weight.in_features};
  for (int64_t block_row = first; block_row < last; ++block_row) {
    int64_t sub = 0;
    for (; sub + 8 <= r; sub += 8) {
      const int64_t row = block_row * r + sub;
      Vec8 sums[kTokens];
      eight_outputs<kTokens>(weight, block_row, sub, in, sums);
      for (int t = 0; t < kTokens; ++t) {
        if (bias) sums[t] = add8(sums[t], load8(bias + row));
        store8(y + t * weight.out_features + row, sums[t]);
      }
    }
    for (; sub < r; ++sub) {
      const int64_t row = block_row * r + sub;
      for (int t = 0; t < kTokens; ++t) {
        const float* token = x + t * weight.in_features;
        const float sum = r == 1 ? one_row(weight, row, token)
                                 : one_output(weight, block_row, sub, token);
        y[t * weight.out_features + row] = sum + (bias ? bias[row] : 0.0f);
      }
    }
  }
}

template <Activation kActivation>
void activate_in_place(float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, activate<kActivation>(load(y + i)));
  }
  if (i == count) return;
  float rest[kLanes] = {};
  for (int64_t k = i; k < count; ++k) rest[k - i] = y[k];
  store(rest, activate<kActivation>(load(rest)));
  for (int64_t k = i; k < count; ++k) y[k] = rest[k - i];
}

void activate_in_place(Activation activation, float* y, int64_t count) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return activate_in_place<Activation::relu>(y, count);
    case Activation::gelu:
      return activate_in_place<Activation::gelu>(y, count);
    case Activation::gelu_tanh:
      return activate_in_place<Activation::gelu_tanh>(y, count);
    case Activation::silu:
      return activate_in_place<Activation::silu>(y, count);
  }
}

}  // namespace

void multiply_few_tokens(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x, int64_t tokens, const float* bias,
                         Activation activation, float* y) {
  const int64_t out = weight.out_features, in = weight.in_features;
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) {
    multiply_tokens<4>(weight, first, last, x + token * in, bias, y + token * out);
  }
  for (; token + 2 <= tokens; token += 2) {
    multiply_tokens<2>(weight, first, last, x + token * in, bias, y + token * out);
  }
  if (token < tokens) {
    multiply_tokens<1>(weight, first, last, x + token * in, bias, y + token * out);
  }
  const int64_t row = first * weight.block_rows;
  const int64_t rows = (last - first) * weight.block_rows;
  for (token = 0; token < tokens; ++token) {
    activate_in_place(activation, y + token * out + row, rows);
  }
}

}  // namespace pybsp::PYBSP_ISA
