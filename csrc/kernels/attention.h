// SPDX-License-Identifier: Apache-2.0
// One head of softmax(scale Q K^T + bias) V for a piece of the queries of a sequence.
//
// Queries, keys and values lie in token tiles, [feature of the head][token]. The tokens
// of a sequence need not begin or end where a tile does: they come in runs, tokens with
// consecutive lanes of one tile. A query is a lane of the product with the keys and a
// row of it a key, so that softmax reduces over rows and a key or value is a broadcast
// scalar, as weights are in block_sparse_gemm.h.
//
// A query's bits depend on its sequence alone: not on how it is cut into runs, nor, as
// long as these are finite, on the queries beside it.
#pragma once

#include <cstdint>

namespace pybsp {

// Keys and values of consecutive tokens; feature d of token j at [d * stride + j].
struct KeyRun {
  const float* keys;
  const float* values;
  int64_t stride;
  int64_t count;
  const int64_t* positions;  // of the tokens, ascending; only differences count
};

struct AttentionPiece {
  const float* queries;  // as KeyRun::keys
  int64_t stride;
  int64_t count;             // 1 to lanes x max_vectors
  const int64_t* positions;  // of the queries, as KeyRun::positions
  const KeyRun* runs;
  int64_t num_runs;   // with at least one key
  int64_t sequence;   // its tokens, also those that are not in the runs
  int64_t first_key;  // how many of them come before the first run
  bool same_keys;     // as those of the call before, with the same scratch
  bool short_floats;  // errors of 2^-13 of the largest factors are small enough
  int64_t head_dim;
  float scale;
  // bias[query position - key position], readable for max_vectors x lanes - 1 more than
  // the largest of them; or null: positions are not read. -infinity hides a key.
  const float* bias;
  // Variants::attention_scratch floats, 64-byte aligned; overlaps nothing.
  float* scratch;
  // Feature d of query i at [d * y_stride + i]; may be `queries` itself.
  float* y;
  int64_t y_stride;
};

}  // namespace pybsp
