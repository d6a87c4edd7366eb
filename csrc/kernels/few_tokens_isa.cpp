// SPDX-License-Identifier: Apache-2.0
// A few tokens: limited by reading the weights once, so outputs (or, for wide
// single-row blocks, inputs) lie in lanes and nothing is transposed.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

template <typename T>
const T* values_of(const BlockSparseView& weight);
template <>
inline const float* values_of(const BlockSparseView& weight) {
  return weight.values;
}
template <>
inline const Bfloat16* values_of(const BlockSparseView& weight) {
  return weight.bfloat16;
}

// Eight outputs, or with kSome the first `some` of eight, 0 < some < 8.
template <bool kSome, typename T>
inline Vec8 load_outputs(const T* p, int some) {
  return kSome ? load8(p, some) : load8(p);
}

// acc[s][t] += the columns of a block times their inputs of token t, for kSubs times
// eight of its outputs. With kAhead, weights `ahead` of them are fetched into L1.
template <int kTokens, int kSubs, bool kSome, bool kAhead, typename T>
inline const T* add_columns(const T* w, int64_t ahead, int64_t cols, int64_t r,
                            const float* const (&x)[kTokens], int64_t first_col,
                            int some, Vec8 (&acc)[kSubs][kTokens]) {
  for (int64_t i = 0; i < cols; ++i, w += r) {
    if constexpr (kAhead) __builtin_prefetch(w + ahead);
    PYBSP_UNROLL
    for (int s = 0; s < kSubs; ++s) {
      const Vec8 weight = load_outputs<kSome>(w + 8 * s, some);
      PYBSP_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        acc[s][t] = fma8(weight, x[t][first_col + i], acc[s][t]);
      }
    }
  }
  return w;
}

// kSubs times eight outputs, from `sub`, of each of kLists consecutive block rows; with
// kSome the last r - sub of them. Each output is one chain of multiply-adds over its
// columns, as in a tile of many tokens, so lists of blocks run side by side to hide the
// latency of the chains. Each has its weights in a page or two, too few for the CPU to
// fetch by itself, so those of the next block rows are fetched meanwhile.
template <typename T, int kTokens, int kLists, int kSubs, bool kSome, bool kOneColumn>
void multiply_outputs(const BlockSparseView& weight, int64_t block_row, int64_t sub,
                      const float* const (&x)[kTokens], const float* bias, float* y) {
  const int64_t r = weight.block_rows, c = kOneColumn ? 1 : weight.block_cols;
  const int some = kSome ? static_cast<int>(r - sub) : 8;
  const int32_t* crow = weight.crow_indices + block_row;
  Vec8 acc[kLists][kSubs][kTokens];
  const int32_t* cols[kLists];
  const T* w[kLists];
  int64_t shared = crow[1] - crow[0];
  const int64_t ahead = (crow[kLists] - crow[0]) * r * c;
  PYBSP_UNROLL
  for (int g = 0; g < kLists; ++g) {
    const int64_t row = (block_row + g) * r + sub;
    PYBSP_UNROLL
    for (int s = 0; s < kSubs; ++s) {
      const Vec8 start = bias ? load_outputs<kSome>(bias + row + 8 * s, some) : zero8();
      PYBSP_UNROLL
      for (int t = 0; t < kTokens; ++t) acc[g][s][t] = start;
    }
    cols[g] = weight.col_indices + crow[g];
    w[g] = values_of<T>(weight) + crow[g] * r * c + sub;
    const int64_t blocks = crow[g + 1] - crow[g];
    if (blocks < shared) shared = blocks;
  }
  // As many blocks of one column as a line has room for.
  constexpr int kLine = 64 / (8 * kSubs * static_cast<int>(sizeof(T)));
  constexpr int kStep = kOneColumn && kLine > 1 ? kLine : 1;
  int64_t b = 0;
  for (; b + kStep <= shared; b += kStep) {
    PYBSP_UNROLL
    for (int g = 0; g < kLists; ++g) {
      if constexpr (kOneColumn) __builtin_prefetch(w[g] + ahead);
      PYBSP_UNROLL
      for (int k = 0; k < kStep; ++k) {
        w[g] = add_columns<kTokens, kSubs, kSome, !kOneColumn>(
            w[g], ahead, c, r, x, cols[g][b + k] * c, some, acc[g]);
      }
    }
  }
  PYBSP_UNROLL
  for (int g = 0; g < kLists; ++g) {
    const int64_t blocks = crow[g + 1] - crow[g];
    for (int64_t rest = b; rest < blocks; ++rest) {
      w[g] = add_columns<kTokens, kSubs, kSome, !kOneColumn>(
          w[g], ahead, c, r, x, cols[g][rest] * c, some, acc[g]);
    }
    float* const out = y + (block_row + g) * r + sub;
    PYBSP_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      PYBSP_UNROLL
      for (int s = 0; s < kSubs; ++s) {
        float* const at = out + t * weight.out_features + 8 * s;
        if (kSome) {
          store8(at, acc[g][s][t], some);
        } else {
          store8(at, acc[g][s][t]);
        }
      }
    }
  }
}

// Single-row blocks: a dot product over each run of inputs.
template <typename T>
float one_row(const BlockSparseView& weight, int64_t row, const float* x) {
  const int64_t c = weight.block_cols;
  Vec sums[2] = {zero(), zero()};
  for (int64_t b = weight.crow_indices[row]; b < weight.crow_indices[row + 1]; ++b) {
    const T* w = values_of<T>(weight) + b * c;
    const float* in = x + weight.col_indices[b] * c;
    int64_t i = 0;
    for (; i + 2 * kLanes <= c; i += 2 * kLanes) {
      sums[0] = fma(load(w + i), load(in + i), sums[0]);
      sums[1] = fma(load(w + i + kLanes), load(in + i + kLanes), sums[1]);
    }
    for (; i + kLanes <= c; i += kLanes) {
      sums[0] = fma(load(w + i), load(in + i), sums[0]);
    }
    if (i < c) {
      const int rest = static_cast<int>(c - i);
      sums[1] = fma(load(w + i, rest), load(in + i, rest), sums[1]);
    }
  }
  return reduce_add(add(sums[0], sums[1]));
}

// Block rows [first, last), kLists at a time.
template <typename T, int kTokens, int kLists, int kSubs, bool kSome, bool kOneColumn>
void multiply_lists(const BlockSparseView& weight, int64_t first, int64_t last,
                    int64_t sub, const float* const (&x)[kTokens], const float* bias,
                    float* y) {
  int64_t row = first;
  for (; row + kLists <= last; row += kLists) {
    multiply_outputs<T, kTokens, kLists, kSubs, kSome, kOneColumn>(weight, row, sub, x,
                                                                   bias, y);
  }
  for (; row < last; ++row) {
    multiply_outputs<T, kTokens, 1, kSubs, kSome, kOneColumn>(weight, row, sub, x, bias,
                                                              y);
  }
}

// Eight sums hide a latency of four cycles at two FMAs a cycle: from one block row
// where it is tall, which shares its inputs, else from several. More than four lists
// have more addresses than there are registers for them.
template <typename T, int kTokens, bool kOneColumn>
void multiply_block_rows(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* const (&x)[kTokens], const float* bias,
                         float* y) {
  constexpr int kTall = kTokens >= 4 ? 2 : 4;
  const int64_t r = weight.block_rows;
  for (int64_t row = first; row < last; row += kTall) {
    const int64_t end = row + kTall < last ? row + kTall : last;
    int64_t sub = 0;
    for (; sub + 8 * kTall <= r; sub += 8 * kTall) {
      multiply_lists<T, kTokens, 1, kTall, false, kOneColumn>(weight, row, end, sub, x,
                                                              bias, y);
    }
    for (; sub + 16 <= r; sub += 16) {
      multiply_lists<T, kTokens, kTall / 2, 2, false, kOneColumn>(weight, row, end, sub,
                                                                  x, bias, y);
    }
    if (sub + 8 <= r) {
      multiply_lists<T, kTokens, kTall, 1, false, kOneColumn>(weight, row, end, sub, x,
                                                              bias, y);
      sub += 8;
    }
    if (sub < r) {
      multiply_lists<T, kTokens, kTall, 1, true, kOneColumn>(weight, row, end, sub, x,
                                                             bias, y);
    }
  }
}

template <typename T, int kTokens>
void multiply_tokens(const BlockSparseView& weight, int64_t first, int64_t last,
                     const float* x, const float* bias, float* y) {
  if (weight.block_rows == 1 && weight.block_cols >= kMinColumnRun) {
    for (int64_t row = first; row < last; ++row) {
      for (int t = 0; t < kTokens; ++t) {
        const float sum = one_row<T>(weight, row, x + t * weight.in_features);
        y[t * weight.out_features + row] = sum + (bias ? bias[row] : 0.0f);
      }
    }
    return;
  }
  const float* tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) tokens[t] = x + t * weight.in_features;
  if (weight.block_cols == 1) {
    multiply_block_rows<T, kTokens, true>(weight, first, last, tokens, bias, y);
  } else {
    multiply_block_rows<T, kTokens, false>(weight, first, last, tokens, bias, y);
  }
}

template <typename T>
void multiply_all_tokens(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x, int64_t tokens, const float* bias, float* y) {
  const int64_t out = weight.out_features, in = weight.in_features;
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) {
    multiply_tokens<T, 4>(weight, first, last, x + token * in, bias, y + token * out);
  }
  if (token + 2 <= tokens) {
    multiply_tokens<T, 2>(weight, first, last, x + token * in, bias, y + token * out);
    token += 2;
  }
  if (token < tokens) {
    multiply_tokens<T, 1>(weight, first, last, x + token * in, bias, y + token * out);
  }
}

}  // namespace

void multiply_few_tokens(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x, int64_t tokens, const float* bias, float* y) {
  if (weight.bfloat16) {
    multiply_all_tokens<Bfloat16>(weight, first, last, x, tokens, bias, y);
  } else {
    multiply_all_tokens<float>(weight, first, last, x, tokens, bias, y);
  }
}

}  // namespace pybsp::PYBSP_ISA
