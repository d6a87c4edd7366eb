// SPDX-License-Identifier: Apache-2.0
// Attention in 16 bits of significand by products of bfloat16 on AMX: 16 x 16 sums of
// 32 products an instruction.
//
// A float is nearly the sum of two parts of eight bits, both bfloat16:
//   x y = x0 y0 + x0 y1 + x1 y0
// but for less than 2^-13 of it. With three parts and six products it would be all of
// it, in the time that vectors of floats take. The small products come first, so that
// the many sums add no error to the one of x0 y0.
//
// An instruction wants the first factor as [row][k] and the second as [k / 2][column],
// both with pairs of two k side by side. Any order of k will do: k and k + 16 of 32 are
// a pair, so that a pair of vectors makes a vector of pairs.
#include "kernels/attention_scores.h"
#include "kernels/variants_isa.h"
#include "simd/amx.h"

namespace pybsp::avx512 {
void attention(const AttentionPiece& piece);
}

namespace pybsp::PYBSP_ISA {
namespace {

constexpr int64_t kSide = 16;         // rows and columns of a tile of sums
constexpr int64_t kDepth = 32;        // products added by an instruction
constexpr int64_t kTileFloats = 256;  // of memory, in a tile of any kind
constexpr int kParts = 2;
constexpr int64_t kTileRowBytes = 64;

inline int64_t whole_depths(int64_t k) { return (k + kDepth - 1) / kDepth * kDepth; }

// Row `row` of a tile for each part: pairs of the parts of a and of b.
inline void split(Vec a, Vec b, int64_t row, float* tiles) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  PYBSP_UNROLL
  for (int part = 0; part < kParts; ++part) {
    const __m512i first = _mm512_castps_si512(a), second = _mm512_castps_si512(b);
    // first >> 16 | (second & upper)
    const __m512i pairs =
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(first, 16), second, upper, 0xF8);
    store(tiles + part * kTileFloats + row * kSide, _mm512_castsi512_ps(pairs));
    if (part + 1 == kParts) break;
    a = sub(a, _mm512_castsi512_ps(_mm512_and_si512(first, upper)));
    b = sub(b, _mm512_castsi512_ps(_mm512_and_si512(second, upper)));
  }
}

// Sixteen keys and their values; feature d at [d * stride].
struct KeyGroup {
  const float* keys;
  const float* values;
  int64_t stride;
};

struct Scratch {
  float* queries;  // tiles [32 features][vector][part]
  float* sums;     // [feature][query]
  float* scores;   // [key][query]
  float* keys;     // tiles [32 keys][32 features][16 of the keys][part]
  float* values;   // tiles [32 features][32 keys][16 of the features][part]
  float* weights;  // tiles [32 keys][vector][part]
  KeyGroup* groups;
  float* copies;  // of groups that are not in one run, [group][key or value][feature]
  int64_t floats;
};

// `keys`: a multiple of kDepth, as head_dim is.
Scratch divide(float* scratch, int64_t head_dim, int64_t keys) {
  constexpr int64_t kWidth = 3 * kLanes;
  Scratch at{};
  const auto take = [&](int64_t floats) {
    float* const from = scratch ? scratch + at.floats : nullptr;
    at.floats += floats;
    return from;
  };
  // avx512::attention uses (2 head_dim + keys) kWidth floats.
  at.queries = take(head_dim * kWidth * kParts / 2);  // two bytes a part
  at.sums = take(head_dim * kWidth);
  at.scores = take(keys * kWidth);
  // From here on it leaves them as they are, for the pieces that come next.
  at.keys = take(keys * head_dim * kParts / 2);
  at.values = take(keys * head_dim * kParts / 2);
  at.weights = take(keys * kWidth * kParts / 2);
  static_assert(sizeof(KeyGroup) <= kSide * sizeof(float) / 2);
  at.groups = reinterpret_cast<KeyGroup*>(take(keys / 2));
  at.copies = take(2 * keys * head_dim);
  return at;
}

// to[d][j] = from[d][j] for `count` keys.
void copy_keys(const float* from, int64_t stride, int64_t head_dim, int64_t count,
               float* to) {
  for (int64_t d = 0; d < head_dim; ++d) {
    const int n = static_cast<int>(count);
    store(to + d * kSide, load(from + d * stride, n), n);
  }
}

// The groups of `all` keys, of which those from `skipped` on are of the runs: where
// they lie, or copies among zeros.
void find_groups(const AttentionPiece& piece, int64_t skipped, int64_t all,
                 const Scratch& at) {
  const KeyRun* run = piece.runs;
  const KeyRun* const end = piece.runs + piece.num_runs;
  const int64_t size = piece.head_dim * kSide;
  float* copy = at.copies;
  int64_t begin = skipped;  // of the run
  for (int64_t key = 0; key < all; key += kSide) {
    KeyGroup& group = at.groups[key / kSide];
    while (run != end && begin + run->count <= key) begin += (run++)->count;
    if (run != end && begin <= key && key + kSide <= begin + run->count) {
      const int64_t offset = key - begin;
      group = {run->keys + offset, run->values + offset, run->stride};
      continue;
    }
    group = {copy, copy + size, kSide};
    for (int64_t i = 0; i < 2 * size; i += kLanes) store(copy + i, zero());
    int64_t first = begin;
    for (const KeyRun* part = run; part != end && first < key + kSide; ++part) {
      const int64_t low = first > key ? first : key;
      const int64_t last = first + part->count;
      const int64_t count = (last < key + kSide ? last : key + kSide) - low;
      copy_keys(part->keys + (low - first), part->stride, piece.head_dim, count,
                copy + (low - key));
      copy_keys(part->values + (low - first), part->stride, piece.head_dim, count,
                copy + size + (low - key));
      first = last;
    }
    copy += 2 * size;
  }
}

void split_keys(const Scratch& at, int64_t head_dim, int64_t all) {
  float* tiles = at.keys;
  for (int64_t key = 0; key < all; key += kDepth) {
    for (int64_t d = 0; d < head_dim; d += kDepth) {
      for (int64_t half = 0; half < kDepth; half += kSide) {
        const KeyGroup& group = at.groups[(key + half) / kSide];
        const float* in = group.keys + d * group.stride;
        for (int64_t p = 0; p < kSide; ++p) {
          split(load(in), load(in + kSide * group.stride), p, tiles);
          in += group.stride;
        }
        for (int part = 0; part < kParts; ++part) {
          Vec pairs[kLanes];
          PYBSP_UNROLL
          for (int p = 0; p < kLanes; ++p) pairs[p] = load(tiles + p * kSide);
          transpose(pairs);
          PYBSP_UNROLL
          for (int p = 0; p < kLanes; ++p) store(tiles + p * kSide, pairs[p]);
          tiles += kTileFloats;
        }
      }
    }
  }
}

void split_values(const Scratch& at, int64_t head_dim, int64_t all) {
  float* tiles = at.values;
  for (int64_t d = 0; d < head_dim; d += kDepth) {
    for (int64_t key = 0; key < all; key += kDepth) {
      const KeyGroup* const group = at.groups + key / kSide;
      for (int64_t half = 0; half < kDepth; half += kSide) {
        const float* first = group[0].values + (d + half) * group[0].stride;
        const float* second = group[1].values + (d + half) * group[1].stride;
        for (int64_t row = 0; row < kSide; ++row) {
          split(load(first), load(second), row, tiles);
          first += group[0].stride;
          second += group[1].stride;
        }
        tiles += kParts * kTileFloats;
      }
    }
  }
}

template <int kVectors>
void split_queries(const AttentionPiece& piece, float* tiles) {
  const Vec scale = set1(piece.scale * kLog2E);
  for (int64_t d = 0; d < piece.head_dim; d += kDepth) {
    for (int v = 0; v < kVectors; ++v) {
      const float* in = piece.queries + d * piece.stride + v * kLanes;
      const int64_t left = piece.count - v * kLanes;
      const int count = static_cast<int>(left < kLanes ? left : kLanes);
      const auto query = [&](const float* from) {
        return mul(scale, count == kLanes ? load(from) : load(from, count));
      };
      for (int64_t p = 0; p < kSide; ++p) {
        split(query(in), query(in + kSide * piece.stride), p, tiles);
        in += piece.stride;
      }
      tiles += kParts * kTileFloats;
    }
  }
}

// weights from scores of `all` keys; total = their sums.
template <int kVectors>
void split_weights(const float* scores, int64_t all, const Vec (&shift)[kVectors],
                   float* tiles, Vec (&total)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (int v = 0; v < kVectors; ++v) total[v] = zero();
  for (int64_t key = 0; key < all; key += kDepth) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const float* in = scores + key * kWidth + v * kLanes;
      for (int64_t p = 0; p < kSide; ++p) {
        const Vec a = exp2(load(in), shift[v]);
        const Vec b = exp2(load(in + kSide * kWidth), shift[v]);
        total[v] = add(total[v], add(a, b));
        split(a, b, p, tiles);
        in += kWidth;
      }
      tiles += kParts * kTileFloats;
    }
  }
}

// One part of 32 rows, whose halves are `half` apart, times one of kVectors x 16
// columns.
template <int kVectors>
inline void add_products(const float* a, int64_t half, const float* b, int64_t vector) {
  _tile_loadd(6, a, kTileRowBytes);
  _tile_loadd(7, b, kTileRowBytes);
  _tile_dpbf16ps(0, 6, 7);
  if constexpr (kVectors >= 2) {
    _tile_loadd(7, b + vector, kTileRowBytes);
    _tile_dpbf16ps(1, 6, 7);
  }
  if constexpr (kVectors >= 3) {
    _tile_loadd(7, b + 2 * vector, kTileRowBytes);
    _tile_dpbf16ps(2, 6, 7);
  }
  _tile_loadd(6, a + half, kTileRowBytes);
  if constexpr (kVectors >= 3) {
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(7, b + vector, kTileRowBytes);
  }
  if constexpr (kVectors >= 2) {
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, b, kTileRowBytes);
  }
  _tile_dpbf16ps(3, 6, 7);
}

// y[row][column] = sum over `depth` of a b, 32 rows and kVectors x 16 columns.
template <int kVectors>
void multiply(const float* a, const float* b, int64_t depth, float* y) {
  constexpr int64_t kWidth = kVectors * kLanes, kPart = kTileFloats;
  constexpr int64_t kStepA = 2 * kParts * kPart, kStepB = kVectors * kParts * kPart;
  const int64_t steps = depth / kDepth;
  _tile_zero(0);
  _tile_zero(3);
  if constexpr (kVectors >= 2) {
    _tile_zero(1);
    _tile_zero(4);
  }
  if constexpr (kVectors >= 3) {
    _tile_zero(2);
    _tile_zero(5);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const float* const a_at = a + step * kStepA;
    const float* const b_at = b + step * kStepB;
    const auto add = [&](int64_t i, int64_t j) {
      add_products<kVectors>(a_at + i * kPart, kParts * kPart, b_at + j * kPart,
                             kParts * kPart);
    };
    add(1, 0);
    add(0, 1);
  }
  for (int64_t step = 0; step < steps; ++step) {
    add_products<kVectors>(a + step * kStepA, kParts * kPart, b + step * kStepB,
                           kParts * kPart);
  }
  constexpr int64_t kStride = kWidth * static_cast<int64_t>(sizeof(float));
  // In the order in which they are finished.
  _tile_stored(0, y, kStride);
  if constexpr (kVectors >= 2) _tile_stored(1, y + kLanes, kStride);
  if constexpr (kVectors >= 3) _tile_stored(2, y + 2 * kLanes, kStride);
  y += kSide * kWidth;
  if constexpr (kVectors >= 3) _tile_stored(5, y + 2 * kLanes, kStride);
  if constexpr (kVectors >= 2) _tile_stored(4, y + kLanes, kStride);
  _tile_stored(3, y, kStride);
}

// Whether total and the first queries of each feature are numbers; what is not one in
// values spoils all queries. Lanes past the last query may see no key.
template <int kVectors>
bool are_finite(const Vec (&total)[kVectors], const float* sums,
                const AttentionPiece& piece) {
  constexpr int kAll = (1 << kLanes) - 1;
  const int last = static_cast<int>(piece.count - (kVectors - 1) * kLanes);
  const int used = last == kLanes ? kAll : lane_mask(last);
  Vec spoilt = zero();
  for (int64_t d = 0; d < piece.head_dim; ++d) {
    const Vec a = load(sums + d * kVectors * kLanes);
    spoilt = add(spoilt, sub(a, a));
  }
  spoilt =
      _mm512_maskz_mov_ps(static_cast<__mmask16>(kVectors == 1 ? used : kAll), spoilt);
  for (int v = 0; v < kVectors; ++v) {
    const Vec difference = sub(total[v], total[v]);
    const int lanes = v + 1 == kVectors ? used : kAll;
    spoilt =
        add(spoilt, _mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), difference));
  }
  return !any_bit(spoilt);
}

// y = sums / total
template <int kVectors>
void divide_by(const Vec (&total)[kVectors], const float* sums,
               const AttentionPiece& piece) {
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec scale = div(set1(1.0f), total[v]);
    const float* in = sums + v * kLanes;
    float* y = piece.y + v * kLanes;
    const int64_t left = piece.count - v * kLanes;
    for (int64_t d = 0; d < piece.head_dim; ++d) {
      if (left >= kLanes) {
        store(y, mul(load(in), scale));
      } else {
        store(y, mul(load(in), scale), static_cast<int>(left));
      }
      in += kVectors * kLanes;
      y += piece.y_stride;
    }
  }
}

// False, and y as it was, if something is not finite: infinities have no parts.
template <int kVectors>
bool attend(const AttentionPiece& piece) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t head_dim = piece.head_dim;
  // The same sums of the same keys for every piece, whichever its first key is.
  const int64_t skipped = piece.first_key % kDepth;
  int64_t last = skipped;
  for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
    last += run->count;
  }
  const int64_t all = whole_depths(last);
  const Scratch at = divide(piece.scratch, head_dim, all);
  if (!piece.same_keys) {
    find_groups(piece, skipped, all, at);
    split_keys(at, head_dim, all);
    split_values(at, head_dim, all);
    configure_tiles(kSide);  // for all pieces with these keys
  }
  split_queries<kVectors>(piece, at.queries);
  for (int64_t key = 0; key < all; key += kDepth) {
    multiply<kVectors>(at.keys + key * head_dim * kParts / 2, at.queries, head_dim,
                       at.scores + key * kWidth);
  }
  float* const first = at.scores + skipped * kWidth;
  if (piece.bias) {
    float* scores = first;
    for (const KeyRun* run = piece.runs; run != piece.runs + piece.num_runs; ++run) {
      add_bias<kVectors>(piece, *run, scores);
      scores += run->count * kWidth;
    }
  }
  Vec shift[kVectors], total[kVectors];
  find_shifts<kVectors>(first, last - skipped, shift);
  const Vec none = set1(-__builtin_inff());
  for (float* row = at.scores; row != first; row += kLanes) store(row, none);
  for (int64_t i = last * kWidth; i < all * kWidth; i += kLanes) {
    store(at.scores + i, none);
  }
  split_weights<kVectors>(at.scores, all, shift, at.weights, total);
  for (int64_t d = 0; d < head_dim; d += kDepth) {
    multiply<kVectors>(at.values + d * all * kParts / 2, at.weights, all,
                       at.sums + d * kWidth);
  }
  if (!are_finite<kVectors>(total, at.sums, piece)) return false;
  divide_by<kVectors>(total, at.sums, piece);
  return true;
}

// Not inlined: nothing moves to where the control register is another.
__attribute__((noinline)) bool attend_some(const AttentionPiece& piece) {
  if (piece.count > 2 * kLanes) return attend<3>(piece);
  if (piece.count > kLanes) return attend<2>(piece);
  return attend<1>(piece);
}

bool attend_in_short(const AttentionPiece& piece) {
  // Fewer keys are faster in floats.
  constexpr int64_t kLeastKeys = 64;
  if (!piece.short_floats || piece.head_dim % kDepth != 0 ||
      piece.sequence < kLeastKeys) {
    return false;
  }
  // Subnormal parts are zero to AMX, and slow to make.
  constexpr unsigned kFlushToZero = 1u << 15;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlushToZero);
  const bool done = attend_some(piece);
  _mm_setcsr(control);
  return done;
}

}  // namespace

void attention(const AttentionPiece& piece) {
  if (!attend_in_short(piece)) avx512::attention(piece);
}

void end_attention() { _tile_release(); }

int64_t attention_scratch(int64_t head_dim, int64_t keys) {
  return divide(nullptr, whole_depths(head_dim), whole_depths(keys + kDepth - 1))
      .floats;
}

}  // namespace pybsp::PYBSP_ISA
