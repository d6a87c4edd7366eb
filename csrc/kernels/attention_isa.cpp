// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention.h"
#include "kernels/attention_scores.h"
#include "kernels/tile_rows.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

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

// Where the sums over some of the keys come from and go to.
struct Context {
  const KeyRun* runs;  // those keys
  const KeyRun* end;
  const float* weights;  // [key][query], of the first of them
  bool first;            // of all keys: begins the sums
  float* sums;           // [feature][query], unless the keys are the last
  float* y;              // or null; then [feature][query] with y_stride
  int64_t y_stride;
  int last;  // queries in the last vector of y
  const float* scale;
};

// sums[d][query] += sum over j of values[d][j] * weights[j][query] for kRows features
// from `d` on; with the last keys y = scale sums instead.
template <int kRows, int kVectors>
void add_values(const Context& context, int64_t d) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const float* weights = context.weights;
  float* const sums = context.sums + d * kWidth;
  Vec acc[kRows][kVectors];
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      acc[row][v] = context.first ? zero() : load(sums + row * kWidth + v * kLanes);
    }
  }
  for (const KeyRun* run = context.runs; run != context.end; ++run) {
    const float* values[kRows];
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row)
      values[row] = run->values + (d + row) * run->stride;
    for (int64_t j = 0; j < run->count; ++j) {
      Vec in[kVectors];
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) in[v] = load(weights + v * kLanes);
      PYBSP_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const Vec value = set1(values[row][j]);
        PYBSP_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          acc[row][v] = fma(value, in[v], acc[row][v]);
        }
      }
      weights += kWidth;
    }
  }
  if (!context.y) {
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        store(sums + row * kWidth + v * kLanes, acc[row][v]);
      }
    }
    return;
  }
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec scale = load(context.scale + v * kLanes);
    float* y = context.y + d * context.y_stride + v * kLanes;
    const bool whole = v + 1 < kVectors || context.last == kLanes;
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec a = mul(acc[row][v], scale);
      if (whole) {
        store(y, a);
      } else {
        store(y, a, context.last);
      }
      y += context.y_stride;
    }
  }
}

template <int kVectors>
void add_some_values(int64_t rows, const Context& context, int64_t d) {
  PYBSP_WITH_ROWS(rows, add_values, context, d)
}

#undef PYBSP_WITH_ROWS

// Runs from `run` on whose weights fit L1 beside the values of a few features.
const KeyRun* runs_in_cache(const KeyRun* run, const KeyRun* end, int64_t width) {
  constexpr int64_t kFloats = 8192;
  int64_t keys = run->count;
  for (++run; run != end && (keys + run->count) * width <= kFloats; ++run) {
    keys += run->count;
  }
  return run;
}

template <int kVectors>
void attend(const AttentionPiece& piece) {
  constexpr int64_t kWidth = kVectors * kLanes, kRows = kTileRows<kVectors>;
  const int64_t head_dim = piece.head_dim;
  const KeyRun* const end = piece.runs + piece.num_runs;
  float* const queries = piece.scratch;
  float* const sums = queries + head_dim * kWidth;
  float* const scores = sums + head_dim * kWidth;
  pack_queries<kVectors>(piece, queries);
  int64_t keys = 0;
  for (const KeyRun* run = piece.runs; run != end; ++run) {
    float* const at = scores + keys * kWidth;
    for (int64_t key = 0; key < run->count; key += kRows) {
      const int64_t left = run->count - key;
      score_some_keys<kVectors>(left < kRows ? left : kRows, run->keys + key,
                                run->stride, queries, head_dim, at + key * kWidth);
    }
    if (piece.bias) add_bias<kVectors>(piece, *run, at);
    keys += run->count;
  }
  Vec total[kVectors];
  exponentials<kVectors>(scores, keys, total, [](int, Vec) {});
  float* const scale = queries;  // which are no longer used
  for (int v = 0; v < kVectors; ++v) {
    store(scale + v * kLanes, div(set1(1.0f), total[v]));
  }
  Context context{};
  context.weights = scores;
  context.sums = sums;
  context.y_stride = piece.y_stride;
  context.last = static_cast<int>(piece.count - (kVectors - 1) * kLanes);
  context.scale = scale;
  for (const KeyRun* run = piece.runs; run != end; run = context.end) {
    context.runs = run;
    context.end = runs_in_cache(run, end, kWidth);
    context.first = run == piece.runs;
    context.y = context.end == end ? piece.y : nullptr;
    for (int64_t d = 0; d < head_dim; d += kRows) {
      const int64_t left = head_dim - d;
      add_some_values<kVectors>(left < kRows ? left : kRows, context, d);
    }
    for (; run != context.end; ++run) context.weights += run->count * kWidth;
  }
}

}  // namespace

int64_t attention_scratch(int64_t head_dim, int64_t keys) {
  return (2 * head_dim + keys) * (3 * kLanes);
}

void attention(const AttentionPiece& piece) {
  if (piece.count > 2 * kLanes) return attend<3>(piece);
  if (piece.count > kLanes) return attend<2>(piece);
  attend<1>(piece);
}

}  // namespace pybsp::PYBSP_ISA
