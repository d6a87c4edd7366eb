// SPDX-License-Identifier: Apache-2.0
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/tile_rows.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;

// Calls function<rows>(...) with rows in [1, kTileRows<kVectors>].
#define PYBSP_WITH_ROWS(rows, function, ...)           \
  switch (rows) {                                      \
    case 1:                                            \
      return function<1, kVectors>(__VA_ARGS__);       \
    case 2:                                            \
      return function<2, kVectors>(__VA_ARGS__);       \
    case 3:                                            \
      return function<3, kVectors>(__VA_ARGS__);       \
    case 4:                                            \
      return function<4, kVectors>(__VA_ARGS__);       \
    default:                                           \
      if constexpr (kTileRows<kVectors> == 8) {        \
        switch (rows) {                                \
          case 5:                                      \
            return function<5, kVectors>(__VA_ARGS__); \
          case 6:                                      \
            return function<6, kVectors>(__VA_ARGS__); \
          case 7:                                      \
            return function<7, kVectors>(__VA_ARGS__); \
          default:                                     \
            return function<8, kVectors>(__VA_ARGS__); \
        }                                              \
      }                                                \
  }

// packed[d][query] = scale log2(e) query, so that softmax is made of powers of two;
// lanes past the last query are zero.
template <int kVectors>
void pack_queries(const AttentionPiece& piece, float* packed) {
  const Vec scale = set1(piece.scale * kLog2E);
  const float* in = piece.queries;
  const int last = static_cast<int>(piece.count - (kVectors - 1) * kLanes);
  for (int64_t d = 0; d < piece.head_dim; ++d) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const float* at = in + v * kLanes;
      const bool whole = v + 1 < kVectors || last == kLanes;
      store(packed + v * kLanes, mul(scale, whole ? load(at) : load(at, last)));
    }
    in += piece.stride;
    packed += kVectors * kLanes;
  }
}

// scores[key][query] = sum over d of keys[d][key] * queries[d][query] for kRows keys.
template <int kRows, int kVectors>
void score_keys(const float* keys, int64_t stride, const float* queries,
                int64_t head_dim, float* scores) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec acc[kRows][kVectors];
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[row][v] = zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec in[kVectors];
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = load(queries + v * kLanes);
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec key = set1(keys[row]);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[row][v] = fma(key, in[v], acc[row][v]);
    }
    keys += stride;
    queries += kWidth;
  }
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store(scores + row * kWidth + v * kLanes, acc[row][v]);
    }
  }
}

template <int kVectors>
void score_some_keys(int64_t rows, const float* keys, int64_t stride,
                     const float* queries, int64_t head_dim, float* scores) {
  PYBSP_WITH_ROWS(rows, score_keys, keys, stride, queries, head_dim, scores)
}

// sums[d][query] += sum over j of values[d][j] * weights[j][query] for kRows features.
template <int kRows, int kVectors>
void add_values(const float* values, int64_t stride, int64_t count,
                const float* weights, float* sums) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const float* w[kRows];
  Vec acc[kRows][kVectors];
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    w[row] = values + row * stride;
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      acc[row][v] = load(sums + row * kWidth + v * kLanes);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    Vec in[kVectors];
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = load(weights + v * kLanes);
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec value = set1(w[row][j]);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[row][v] = fma(value, in[v], acc[row][v]);
    }
    weights += kWidth;
  }
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store(sums + row * kWidth + v * kLanes, acc[row][v]);
    }
  }
}

template <int kVectors>
void add_some_values(int64_t rows, const float* values, int64_t stride, int64_t count,
                     const float* weights, float* sums) {
  PYBSP_WITH_ROWS(rows, add_values, values, stride, count, weights, sums)
}

#undef PYBSP_WITH_ROWS

// scores[key][query] += log2(e) bias[query - key] for the keys of one run.
template <int kVectors>
void add_bias(const float* bias, int64_t distance, int64_t keys, float* scores) {
  for (int64_t key = 0; key < keys; ++key) {
    const float* at = bias + distance - key;
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const score = scores + v * kLanes;
      store(score, fma(load(at + v * kLanes), set1(kLog2E), load(score)));
    }
    scores += kVectors * kLanes;
  }
}

// scores[key] = 2^(scores[key] - max); total = their sum over keys.
template <int kVectors>
void exponentials(float* scores, int64_t keys, Vec (&total)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec largest[kVectors];
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = load(scores + v * kLanes);
    total[v] = zero();
  }
  for (int64_t key = 1; key < keys; ++key) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      largest[v] = max(largest[v], load(scores + key * kWidth + v * kLanes));
    }
  }
  for (int64_t key = 0; key < keys; ++key) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const at = scores + key * kWidth + v * kLanes;
      const Vec e = exp2(sub(load(at), largest[v]));
      store(at, e);
      total[v] = add(total[v], e);
    }
  }
}

template <int kVectors>
void attend(const AttentionPiece& piece) {
  constexpr int64_t kWidth = kVectors * kLanes, kRows = kTileRows<kVectors>;
  const int64_t head_dim = piece.head_dim;
  float* const queries = piece.scratch;
  float* const sums = queries + head_dim * kWidth;
  float* const scores = sums + head_dim * kWidth;
  pack_queries<kVectors>(piece, queries);
  int64_t keys = 0;
  for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
    float* const at = scores + keys * kWidth;
    for (int64_t key = 0; key < run->count; key += kRows) {
      const int64_t left = run->count - key;
      score_some_keys<kVectors>(left < kRows ? left : kRows, run->keys + key,
                                run->stride, queries, head_dim, at + key * kWidth);
    }
    if (piece.bias) {
      add_bias<kVectors>(piece.bias, piece.position - run->position, run->count, at);
    }
    keys += run->count;
  }
  Vec total[kVectors];
  exponentials<kVectors>(scores, keys, total);
  for (int64_t i = 0; i < head_dim * kVectors; ++i) store(sums + i * kLanes, zero());
  keys = 0;
  for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
    for (int64_t d = 0; d < head_dim; d += kRows) {
      const int64_t left = head_dim - d;
      add_some_values<kVectors>(left < kRows ? left : kRows,
                                run->values + d * run->stride, run->stride, run->count,
                                scores + keys * kWidth, sums + d * kWidth);
    }
    keys += run->count;
  }
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) total[v] = div(set1(1.0f), total[v]);
  const int last = static_cast<int>(piece.count - (kVectors - 1) * kLanes);
  for (int64_t d = 0; d < head_dim; ++d) {
    float* const out = piece.y + d * piece.y_stride;
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec a = mul(load(sums + d * kWidth + v * kLanes), total[v]);
      if (v + 1 < kVectors || last == kLanes) {
        store(out + v * kLanes, a);
      } else {
        store(out + v * kLanes, a, last);
      }
    }
  }
}

}  // namespace

void attention(const AttentionPiece& piece) {
  if (piece.count > 2 * kLanes) return attend<3>(piece);
  if (piece.count > kLanes) return attend<2>(piece);
  attend<1>(piece);
}

}  // namespace pybsp::PYBSP_ISA
