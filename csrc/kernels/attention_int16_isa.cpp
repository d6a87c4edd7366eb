// SPDX-License-Identifier: Apache-2.0
// Attention by products of 16-bit integers, two an instruction and lane.
//
// Queries, keys, values and weights are rounded to multiples of a step: one of each
// query for itself and for its weights, one of all keys of a head and one of each
// feature of its values. Steps are as small as sums of 32 bits let them be. A score is
// a sum of head_dim products, which leaves queries and keys 12 bits and a sign for 64,
// 11 for 256. Values have 13 bits and a sign. Weights have 15, or fewer where those of
// a query would add up to more than 2^18; what they add up to once they are rounded
// divides the result. Integers add up exactly, in any order. Magnitudes under 2^-100
// are 0.
#include "kernels/attention_scores.h"
#include "kernels/int8_products.h"
#include "kernels/tile_rows.h"
#include "kernels/variants_isa.h"
#include "simd/int8.h"

// What computes the rest, in floats.
#if defined(PYBSP_ISA_avx512_vnni)
#define PYBSP_BASE avx512
#else
#define PYBSP_BASE avx2
#endif

namespace pybsp::PYBSP_BASE {
void attention(const AttentionPiece& piece);
int64_t attention_scratch(int64_t head_dim, int64_t keys);
}  // namespace pybsp::PYBSP_BASE

namespace pybsp::PYBSP_ISA {
namespace {

constexpr float kLargestShort = 32767.0f;
constexpr float kLargestValue = 8191.0f;
// What weights add up to before they are rounded: 2^18 and half of kMostKeys times
// kLargestValue fits 31 bits.
constexpr float kLargestTotal = 261120.0f;
constexpr int64_t kMostKeys = 2048, kMostFeatures = 256;

// The largest integer of which head_dim products of two fit 31 bits.
inline float largest_factor(int64_t head_dim) {
  const double most = __builtin_sqrt(2147483647.0 / static_cast<double>(head_dim));
  const auto whole = static_cast<float>(static_cast<int32_t>(most));
  return whole < kLargestShort ? whole : kLargestShort;
}

struct Scratch {
  float* queries;   // pairs of integers: [two features][query]
  float* scores;    // [key][query]; later pairs of weights: [two keys][query]
  float* keys;      // pairs: [two features][key]
  int16_t* values;  // [feature][key]
  int64_t stride;   // of keys and values
  float* value_steps;
  float* value_inverses;
  float* key_step;  // NaN if a key or value is not finite
  int64_t floats;
};

// The first part is also that of the base, which leaves the others as they are.
Scratch divide(float* scratch, int64_t head_dim, int64_t keys) {
  constexpr int64_t kWidth = 3 * kLanes;
  Scratch at{};
  at.stride = (keys + 2 * kLanes - 1) / kLanes * kLanes;
  const int64_t first = PYBSP_BASE::attention_scratch(head_dim, keys);
  const int64_t half = head_dim / 2 * at.stride;
  const int64_t features = (head_dim + kLanes - 1) / kLanes * kLanes;
  at.floats = first + 2 * half + 2 * features + kLanes;
  if (!scratch) return at;
  at.queries = scratch;
  at.scores = scratch + head_dim * kWidth;  // and past all keys for less than a tile
  at.keys = scratch + first;
  at.values = reinterpret_cast<int16_t*>(at.keys + half);
  at.value_steps = at.keys + 2 * half;
  at.value_inverses = at.value_steps + features;
  at.key_step = at.value_inverses + features;
  return at;
}

inline Vec load_some(const float* p, int64_t count) {
  return count >= kLanes ? load(p) : load(p, static_cast<int>(count));
}

inline Sums to_multiples(Vec a, Vec inverse) { return to_ints(mul(a, inverse)); }

// body(d, first key of a vector, where it is, number of keys in it) for a vector of
// every feature in turn, run after run.
template <typename Body>
inline void for_each_vector(const AttentionPiece& piece, const float* KeyRun::* which,
                            int64_t features, Body body) {
  int64_t begin = 0;
  for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
    for (int64_t d = 0; d < piece.head_dim; d += features) {
      const float* const in = run->*which + d * run->stride;
      for (int64_t j = 0; j < run->count; j += kLanes) {
        body(d, begin + j, in + j, run->count - j, run->stride);
      }
    }
    begin += run->count;
  }
}

// The largest magnitude in each lane; not finite if one is not.
Vec largest_keys(const AttentionPiece& piece) {
  Vec even = zero(), odd = zero();
  for_each_vector(piece, &KeyRun::keys, 2,
                  [&](int64_t, int64_t, const float* in, int64_t left, int64_t stride) {
                    even = max_bits(even, magnitude(load_some(in, left)));
                    odd = max_bits(odd, magnitude(load_some(in + stride, left)));
                  });
  return max_bits(even, odd);
}

// What rounds magnitudes up to `largest` to integers up to `most`; 0 where all are
// small.
inline Vec inverse_step(Vec largest, float most) {
  return select_gt(set1(kLeastInput), largest, zero(), div(set1(most), largest));
}

// The steps of the values of all features; false if one is not finite.
bool find_value_steps(const AttentionPiece& piece, const Scratch& at) {
  Vec spoilt = zero();
  for (int64_t first = 0; first < piece.head_dim; first += kLanes) {
    Vec found[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      found[i] = zero();
      if (first + i >= piece.head_dim) continue;
      for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
        const float* const in = run->values + (first + i) * run->stride;
        for (int64_t j = 0; j < run->count; j += kLanes) {
          found[i] = max_bits(found[i], magnitude(load_some(in + j, run->count - j)));
        }
      }
    }
    transpose(found);
    Vec largest = found[0];
    for (int i = 1; i < kLanes; ++i) largest = max_bits(largest, found[i]);
    store(at.value_steps + first, mul(largest, set1(1.0f / kLargestValue)));
    store(at.value_inverses + first, inverse_step(largest, kLargestValue));
    spoilt = add(spoilt, sub(largest, largest));
  }
  return !any_bit(spoilt);
}

// Keys and values in integers, and their steps.
void round_keys(const AttentionPiece& piece, const Scratch& at, int64_t keys) {
  const float most = largest_factor(piece.head_dim);
  const Vec largest_each = largest_keys(piece);
  if (any_bit(sub(largest_each, largest_each)) || !find_value_steps(piece, at)) {
    *at.key_step = __builtin_nanf("");
    return;
  }
  float lanes[kLanes], largest = 0.0f;
  store(lanes, largest_each);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  *at.key_step = largest / most;
  const Vec inverse = inverse_step(set1(largest), most);
  for_each_vector(
      piece, &KeyRun::keys, 2,
      [&](int64_t d, int64_t key, const float* in, int64_t left, int64_t stride) {
        store_sums(at.keys + d / 2 * at.stride + key,
                   pair(to_multiples(load_some(in, left), inverse),
                        to_multiples(load_some(in + stride, left), inverse)));
      });
  for_each_vector(piece, &KeyRun::values, 1,
                  [&](int64_t d, int64_t key, const float* in, int64_t left, int64_t) {
                    store_shorts(
                        at.values + d * at.stride + key,
                        to_multiples(load_some(in, left), set1(at.value_inverses[d])));
                  });
  // Past the last key, for the rest of a tile and of a pair.
  for (int64_t d = 0; d < piece.head_dim; ++d) {
    if (d % 2 == 0) store_sums(at.keys + d / 2 * at.stride + keys, set1_sums(0));
    store_shorts(at.values + d * at.stride + keys, set1_sums(0));
  }
}

// Queries in integers, and the steps of their products with keys; false if one is not
// finite.
template <int kVectors>
bool round_queries(const AttentionPiece& piece, const Scratch& at,
                   Vec (&step)[kVectors]) {
  const float most = largest_factor(piece.head_dim);
  for (int v = 0; v < kVectors; ++v) {
    const float* const in = piece.queries + v * kLanes;
    const int64_t left = piece.count - v * kLanes;
    Vec largest = zero();
    for (int64_t d = 0; d < piece.head_dim; ++d) {
      largest = max_bits(largest, magnitude(load_some(in + d * piece.stride, left)));
    }
    if (any_bit(sub(largest, largest))) return false;
    const Vec inverse = inverse_step(largest, most);
    step[v] = mul(largest, set1(piece.scale * kLog2E * *at.key_step / most));
    float* out = at.queries + v * kLanes;
    for (int64_t d = 0; d < piece.head_dim; d += 2) {
      const Vec a = load_some(in + d * piece.stride, left);
      const Vec b = load_some(in + (d + 1) * piece.stride, left);
      store_sums(out, pair(to_multiples(a, inverse), to_multiples(b, inverse)));
      out += kVectors * kLanes;
    }
  }
  return true;
}

// sums[row][v] = over `pairs` of both factors: row `row` of the one at rows + row *
// row_step, a pair after the other by pair_step, and the other [pair][vector].
template <int kRows, int kVectors>
inline void add_products(const int32_t* rows, int64_t row_step, int64_t pair_step,
                         const float* vectors, int64_t pairs,
                         Sums (&sums)[kRows][kVectors]) {
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[row][v] = set1_sums(0);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    Sums in[kVectors];
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = load_sums(vectors + v * kLanes);
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Sums both = set1_sums(rows[row * row_step]);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = add_pairs(sums[row][v], in[v], both);
      }
    }
    rows += pair_step;
    vectors += kVectors * kLanes;
  }
}

// scores[key][query] for a tile of keys.
template <int kVectors>
void score_keys(const AttentionPiece& piece, const Scratch& at, int64_t key,
                const Vec (&step)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  constexpr int kRows = kTileRows<kVectors>;
  Sums sums[kRows][kVectors];
  add_products<kRows, kVectors>(reinterpret_cast<const int32_t*>(at.keys) + key, 1,
                                at.stride, at.queries, piece.head_dim / 2, sums);
  PYBSP_UNROLL
  for (int row = 0; row < kRows; ++row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store(at.scores + (key + row) * kWidth + v * kLanes,
            mul(to_floats(sums[row][v]), step[v]));
    }
  }
}

// Scores become pairs of weights, and `inverse` the inverse of what these add up to;
// false if scores have no finite sum.
template <int kVectors>
bool round_weights(float* scores, int64_t keys, Vec (&inverse)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec total[kVectors], largest[kVectors], factor[kVectors];
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) largest[v] = zero();
  exponentials<kVectors>(scores, keys, total,
                         [&](int v, Vec e) { largest[v] = max(largest[v], e); });
  Sums added[kVectors];
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (any_bit(sub(total[v], total[v]))) return false;
    factor[v] =
        min(div(set1(kLargestTotal), total[v]), div(set1(kLargestShort), largest[v]));
    added[v] = set1_sums(0);
  }
  const Sums ones = set1_sums(0x10001);
  for (int64_t key = 0; key < keys; key += 2) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const float* const in = scores + key * kWidth + v * kLanes;
      const Vec b = key + 1 < keys ? load(in + kWidth) : zero();
      const Sums both =
          pair(to_multiples(load(in), factor[v]), to_multiples(b, factor[v]));
      store_sums(scores + key / 2 * kWidth + v * kLanes, both);
      added[v] = add_pairs(added[v], both, ones);
    }
  }
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    inverse[v] = div(set1(1.0f), to_floats(added[v]));
  }
  return true;
}

// y[d][query] for a tile of features.
template <int kVectors>
void add_values(const AttentionPiece& piece, const Scratch& at, int64_t d, int64_t keys,
                const Vec (&inverse)[kVectors]) {
  constexpr int kRows = kTileRows<kVectors>;
  Sums sums[kRows][kVectors];
  add_products<kRows, kVectors>(
      reinterpret_cast<const int32_t*>(at.values + d * at.stride), at.stride / 2, 1,
      at.scores, (keys + 1) / 2, sums);
  const float* const steps = at.value_steps + d;
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    float* y = piece.y + d * piece.y_stride + v * kLanes;
    const int64_t left = piece.count - v * kLanes;
    PYBSP_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Vec a = mul(mul(to_floats(sums[row][v]), inverse[v]), set1(steps[row]));
      if (left >= kLanes) {
        store(y, a);
      } else {
        store(y, a, static_cast<int>(left));
      }
      y += piece.y_stride;
    }
  }
}

// False, and y as it was, if something is not finite.
template <int kVectors>
bool attend(const AttentionPiece& piece, int64_t keys) {
  constexpr int kRows = kTileRows<kVectors>;
  const Scratch at = divide(piece.scratch, piece.head_dim, keys);
  if (!piece.same_keys) round_keys(piece, at, keys);
  if (*at.key_step != *at.key_step) return false;
  Vec step[kVectors], inverse[kVectors];
  if (!round_queries<kVectors>(piece, at, step)) return false;
  for (int64_t key = 0; key < keys; key += kRows) {
    score_keys<kVectors>(piece, at, key, step);
  }
  if (!round_weights<kVectors>(at.scores, keys, inverse)) return false;
  for (int64_t d = 0; d < piece.head_dim; d += kRows) {
    add_values<kVectors>(piece, at, d, keys, inverse);
  }
  return true;
}

bool attend_in_integers(const AttentionPiece& piece) {
  // Fewer keys are faster in floats. Biases may hide keys, which count for the steps.
  constexpr int64_t kLeastKeys = 50;
  if (!piece.short_floats || piece.bias || piece.head_dim % 8 != 0 ||
      piece.head_dim > kMostFeatures || piece.sequence < kLeastKeys ||
      piece.sequence > kMostKeys) {
    return false;
  }
  int64_t keys = 0;
  for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
    keys += run->count;
  }
  if (piece.count > 2 * kLanes) return attend<3>(piece, keys);
  if (piece.count > kLanes) return attend<2>(piece, keys);
  return attend<1>(piece, keys);
}

}  // namespace

void attention(const AttentionPiece& piece) {
  if (!attend_in_integers(piece)) PYBSP_BASE::attention(piece);
}

int64_t attention_scratch(int64_t head_dim, int64_t keys) {
  return divide(nullptr, (head_dim + 7) / 8 * 8, keys).floats;
}

}  // namespace pybsp::PYBSP_ISA
