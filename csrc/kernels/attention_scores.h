// SPDX-License-Identifier: Apache-2.0
// From scores to the weights of values, [key][query].
#pragma once

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;

// scores[key][query] += log2(e) bias[query - key] for the keys of one run.
template <int kVectors>
void add_bias(const AttentionPiece& piece, const KeyRun& run, float* scores) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t first = piece.positions[0], last = piece.positions[piece.count - 1];
  // Else tokens between the queries are left out.
  const bool adjacent = last - first == piece.count - 1;
  alignas(64) float gathered[kWidth] = {};
  for (int64_t key = 0; key < run.count; ++key) {
    const float* bias = piece.bias + (first - run.positions[key]);
    if (!adjacent) {
      for (int64_t i = 0; i < piece.count; ++i) {
        gathered[i] = bias[piece.positions[i] - first];
      }
      bias = gathered;
    }
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const score = scores + v * kLanes;
      store(score, fma(load(bias + v * kLanes), set1(kLog2E), load(score)));
    }
    scores += kWidth;
  }
}

// The largest score of each query.
template <int kVectors>
void find_largest(const float* scores, int64_t keys, Vec (&largest)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec odd[kVectors];  // of every other key: two chains
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) odd[v] = largest[v] = load(scores + v * kLanes);
  int64_t key = 1;
  for (; key + 1 < keys; key += 2) {
    const float* const at = scores + key * kWidth;
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      odd[v] = max(odd[v], load(at + v * kLanes));
      largest[v] = max(largest[v], load(at + kWidth + v * kLanes));
    }
  }
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (key < keys) odd[v] = max(odd[v], load(scores + key * kWidth + v * kLanes));
    largest[v] = max(largest[v], odd[v]);
  }
}

// exp2(scores[key], shift) is 2^(scores[key] - max), but for a factor of up to two that
// all keys of a query share: what is subtracted is the even integer nearest to max,
// which costs nothing where a number is split into integer and fraction.
template <int kVectors>
void find_shifts(float* scores, int64_t keys, Vec (&shift)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec largest[kVectors];
  find_largest<kVectors>(scores, keys, largest);
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec half = sub(fma(largest[v], set1(0.5f), set1(kShift)), set1(kShift));
    shift[v] = sub(set1(kShift), add(half, half));
    // Past 2^21, infinities and NaN among them, floats have too few bits for that.
    const Vec is_small =
        select_gt(set1(2097152.0f), abs(largest[v]), set1(1.0f), zero());
    const Vec is_large = sub(set1(1.0f), is_small);
    if (any_bit(is_large)) {
      const Vec by = select_gt(is_large, zero(), largest[v], zero());
      shift[v] = select_gt(is_large, zero(), set1(kShift), shift[v]);
      for (int64_t key = 0; key < keys; ++key) {
        float* const at = scores + key * kWidth + v * kLanes;
        store(at, sub(load(at), by));
      }
    }
  }
}

// scores become weights; total = their sum. see(v, weights) is called for each vector.
template <int kVectors, typename See>
void exponentials(float* scores, int64_t keys, Vec (&total)[kVectors], See see) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec shift[kVectors];
  find_shifts<kVectors>(scores, keys, shift);
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) total[v] = zero();
  for (int64_t key = 0; key < keys; ++key) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const at = scores + key * kWidth + v * kLanes;
      const Vec e = exp2(load(at), shift[v]);
      store(at, e);
      total[v] = add(total[v], e);
      see(v, e);
    }
  }
}

}  // namespace
}  // namespace pybsp::PYBSP_ISA
