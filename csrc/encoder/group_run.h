// SPDX-License-Identifier: Apache-2.0
// One group of sequences on its way through an encoder.
#pragma once

#include <vector>

#include "encoder/encoder.h"
#include "encoder/token_runs.h"
#include "kernels/attention.h"
#include "kernels/variants.h"

namespace pybsp {

class GroupRun {
 public:
  // Keeps references to all of them; allocates the working memory.
  GroupRun(const Encoder& encoder, const EncoderInput& input, const KeptTokens& kept,
           const SequenceGroup& group, int threads);

  // Writes the rows of y that belong to the tokens of the group.
  void run(float* y);

 private:
  // Activations of the group, [tile][feature][lane].
  struct Tiles {
    float* data;
    int64_t features;
  };
  // The queries of one run of a sequence, whose runs are [first, last).
  struct QueryRun {
    size_t run;
    size_t first;
    size_t last;
  };
  struct Rotation {
    const float* cosines;  // which table
    Tiles cosine_tiles;
    Tiles sine_tiles;
  };

  void find_runs();
  void allocate();
  int64_t floats_per_lane() const;
  Tiles take(int64_t features);
  float* at(const Tiles& tiles, const TokenTile& tile, int64_t feature) const;

  void embed(const TokenTile& tile, float* rows);
  void store(const TokenTile& tile, float* rows, float* y) const;
  void attend(const SelfAttention& attention, const Tiles& x, float* residual);
  void attend_head(const SelfAttention& attention, const QueryRun& piece, int64_t head,
                   const Tiles (&qkv)[3], const int64_t (&offsets)[3],
                   const Tiles& context, KeyRun* runs, float* scratch) const;
  void feed_forward(const FeedForward& part, const Tiles& x, float* residual);
  void multiply(const EncoderLinear* linears, int64_t count, const Tiles& x,
                Activation activation, const float* residual, const Tiles* y) const;
  void norm(const LayerNorm& norm, const Tiles& x, const Tiles& y) const;
  void rotate(const SelfAttention& attention, const Tiles& x, int64_t offset);
  const Rotation& rotation(const SelfAttention& attention);
  void make_bias(const SelfAttention& attention);

  const Encoder& encoder_;
  const EncoderInput& input_;
  const KeptTokens& kept_;
  const SequenceGroup& group_;
  const Variants& isa_;
  int threads_;
  std::vector<TokenTile> tiles_;
  int64_t lanes_;
  int64_t longest_ = 0;  // sequence
  std::vector<TokenRun> runs_;
  std::vector<QueryRun> queries_;  // the pieces of a sequence one after the other
  size_t most_runs_ = 0;           // of a sequence
  float* free_ = nullptr;          // working memory that is not taken yet
  float* part_ = nullptr;          // where the memory of a part of a layer begins
  float* thread_scratch_ = nullptr;
  int64_t thread_floats_ = 0;
  Tiles x_{}, normed_{};
  std::vector<Rotation> rotations_;
  std::vector<float> bias_;  // of all heads or one for all of them
  int64_t bias_stride_ = 0;
  std::vector<KeyRun> key_runs_;
};

}  // namespace pybsp
