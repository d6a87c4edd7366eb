// SPDX-License-Identifier: Apache-2.0
// A stack of transformer encoder layers on token tiles, from embeddings to the last
// hidden states.
//
//   norm after:  x = norm(x + attention(x));   x = norm(x + feed_forward(x))
//   norm first:  x = x + attention(norm(x));   x = x + feed_forward(norm(x))
//
// attention.h and block_sparse_gemm.h say what the parts compute. Padding is not
// computed: the kept tokens of all sequences follow each other (token_runs.h). A
// token's result depends on its sequence alone, not on the batch around it nor on the
// number of threads.
//
// Working memory belongs to the threads and is kept for their next call. For each token
// of a group, of about 256 tokens or one sequence: features, twice where the norm comes
// first, and the larger of 3 x the width of attention and that of the feed-forward
// part, in floats. For each thread: the widest tile of features, or of the scores of
// one head; with AMX also two copies of the keys and values of one.
#pragma once

#include <cstdint>
#include <vector>

#include "encoder/part_times.h"
#include "kernels/block_sparse_gemm.h"

namespace pybsp {

// Pointers into arrays that the binding keeps alive and has checked.
struct EncoderLinear {
  BlockSparseView weight;
  const Schedule* schedule;
  const float* bias;  // or null
  const Int8Weights* int8 = nullptr;
  float input_scale = 0.0f;  // see int8_products.h
};

struct LayerNorm {
  const float* weight;  // null: no norm
  const float* bias;    // or null
  float eps;
};

struct SelfAttention {
  // Query, key and value; or one matrix whose outputs are the three after each other.
  std::vector<EncoderLinear> projections;
  EncoderLinear output;
  int64_t heads;
  int64_t head_dim;
  float scale;
  int64_t window;  // keys at most so many positions away; negative: all
  // (positions, head_dim / 2), or null: no rotation.
  const float* cosines;
  const float* sines;
  int64_t rotary_positions;
  // (heads, 2 x bias_positions - 1) by query - key + bias_positions - 1, or null.
  const float* relative_bias;
  int64_t bias_positions;

  int64_t width() const { return heads * head_dim; }
};

// down(activation(up x)), or down(activation(a) b) where up gives a and then b.
struct FeedForward {
  EncoderLinear up;
  Activation activation;
  EncoderLinear down;
  bool gated;
};

struct EncoderLayer {
  SelfAttention attention;
  LayerNorm attention_norm;
  FeedForward feed_forward;
  LayerNorm feed_forward_norm;
};

struct EmbeddingTable {
  const float* rows;  // (count, features); null: no such table
  int64_t count;
};

struct Encoder {
  int64_t features;
  bool norm_first;
  std::vector<EncoderLayer> layers;
  EmbeddingTable words, positions, token_types;
  LayerNorm embedding_norm;
  LayerNorm final_norm;
};

// A padded batch. `ids` or `hidden`; the others may be null: no padding, type 0, the
// place in the row.
struct EncoderInput {
  int64_t batch;
  int64_t length;
  const int64_t* ids;          // (batch, length)
  const float* hidden;         // (batch, length, features)
  const bool* mask;            // (batch, length), false: padding
  const int64_t* token_types;  // (batch, length)
  const int64_t* positions;    // (batch, length)
};

// y (batch, length, features), zero where there is padding. Throws std::out_of_range
// for an id, a type or a position that its table does not have, before anything is
// written, and std::bad_alloc. Safe to call from several threads at once. Adds to
// `times` where the time went, unless it is null.
void run_encoder(const Encoder& encoder, const EncoderInput& input, float* y,
                 int threads, PartTimes* times = nullptr);

}  // namespace pybsp
