// SPDX-License-Identifier: Apache-2.0
// One group of sequences on its way through an encoder.
#pragma once

#include <algorithm>
#include <vector>

#include "encoder/encoder.h"
#include "encoder/token_runs.h"
#include "kernels/attention.h"
#include "kernels/variants.h"
#include "runtime/threads.h"

namespace pybsp {

class GroupRun {
 public:
  // Keeps references to all of them; allocates the working memory.
  GroupRun(const Encoder& encoder, const EncoderInput& input, const KeptTokens& kept,
           const SequenceGroup& group, int threads);

  // Writes the rows of y that belong to the tokens of the group. The clock follows the
  // calling thread.
  void run(float* y, PartClock& clock);

 private:
  // Activations of the group, [tile][feature][lane].
  struct Tiles {
    float* data;
    int64_t features;
  };
  // The tiles [first, last) and who computes them: `threads` threads, operation by
  // operation, with the working memory from number `thread` on.
  struct Share {
    size_t first;
    size_t last;
    int thread;
    int threads;
  };
  // The queries of one run of a sequence, whose runs are [first, last).
  struct QueryRun {
    size_t run;
    size_t first;
    size_t last;
  };
  struct Rotation {
    const float* cosines;  // which tables
    const float* sines;
    Tiles cosine_tiles;
    Tiles sine_tiles;
  };
  // Where the parts of a layer are kept; features of query, key and value begin at
  // `offsets`.
  struct LayerTiles {
    Tiles qkv[3];
    int64_t offsets[3];
    Tiles context;
    Tiles up;
    Tiles down;  // the input of the down projection
  };

  void share_tiles();
  void find_runs();
  void allocate();
  int64_t floats_per_lane() const;
  LayerTiles layer_tiles(const EncoderLayer& layer) const;
  float* at(const Tiles& tiles, const TokenTile& tile, int64_t feature) const;
  template <typename Body>
  void for_each_tile(const Share& share, Body body) const;

  void embed(const Share& share, PartClock& clock) const;
  void embed_tile(const TokenTile& tile, float* rows) const;
  void store(const Share& share, float* y, PartClock& clock) const;
  void store_tile(const TokenTile& tile, float* rows, float* y) const;
  void project(const Share& share, const EncoderLayer& layer, PartClock& clock);
  void attend(const Share& share, const EncoderLayer& layer, PartClock& clock) const;
  void attend_head(const SelfAttention& attention, const QueryRun& piece, int64_t head,
                   const LayerTiles& in, KeyRun* runs, float* scratch,
                   bool same_keys) const;
  void feed_forward(const Share& share, const EncoderLayer& layer,
                    PartClock& clock) const;
  void feed_forward_chunk(const Share& share, const EncoderLayer& layer,
                          const LayerTiles& tiles, PartClock& clock) const;
  void multiply(const Share& share, const EncoderLinear* linears, int64_t count,
                const Tiles& x, Activation activation, const float* residual,
                const Tiles* y) const;
  void norm(const Share& share, const LayerNorm& norm, const Tiles& x, const Tiles& y,
            PartClock& clock) const;
  void rotate(const Share& share, const SelfAttention& attention, const Tiles& x,
              int64_t offset) const;
  static bool rotates_by(const SelfAttention& attention, const Rotation& rotation);
  void make_rotations();
  void make_bias(const SelfAttention& attention);

  const Encoder& encoder_;
  const EncoderInput& input_;
  const KeptTokens& kept_;
  const SequenceGroup& group_;
  const Variants& isa_;
  int threads_;
  int64_t tokens_;
  int64_t lanes_;
  std::vector<TokenTile> tiles_;
  std::vector<Share> shares_;
  int64_t longest_ = 0;  // sequence
  std::vector<TokenRun> runs_;
  std::vector<QueryRun> queries_;  // the pieces of a sequence one after the other
  size_t most_runs_ = 0;           // of a sequence
  float* part_ = nullptr;          // where the memory of a part of a layer begins
  float* thread_scratch_ = nullptr;
  int64_t thread_floats_ = 0;
  Tiles x_{}, normed_{};
  std::vector<Rotation> rotations_;
  std::vector<float> bias_;  // of all heads or one for all of them
  int64_t bias_stride_ = 0;
  mutable std::vector<KeyRun> key_runs_;  // most_runs_ for each thread
};

// body(tile, working memory of its thread)
template <typename Body>
void GroupRun::for_each_tile(const Share& share, Body body) const {
  const int64_t count = static_cast<int64_t>(share.last - share.first);
  parallel(static_cast<int>(std::min<int64_t>(share.threads, count)),
           [&](int thread, int threads) {
             const Range mine = pybsp::share(count, thread, threads);
             for (int64_t i = mine.first; i < mine.last; ++i) {
               body(tiles_[share.first + static_cast<size_t>(i)],
                    thread_scratch_ + (share.thread + thread) * thread_floats_);
             }
           });
}

}  // namespace pybsp
