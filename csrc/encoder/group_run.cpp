// SPDX-License-Identifier: Apache-2.0
#include "encoder/group_run.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "runtime/isa.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace pybsp {

GroupRun::GroupRun(const Encoder& encoder, const EncoderInput& input,
                   const KeptTokens& kept, const SequenceGroup& group, int threads)
    : encoder_(encoder),
      input_(input),
      kept_(kept),
      group_(group),
      isa_(variants(active_isa())),
      threads_(std::max(threads, 1)),
      tokens_(group.last_token - group.first_token),
      lanes_(tile_lanes(tokens_, isa_)) {
  share_tiles();
  find_runs();
  allocate();
}

// A share of the tokens for each thread, which keeps them through all layers, where
// there are two vectors for each; else all tiles are one share.
void GroupRun::share_tiles() {
  const int64_t vectors = lanes_ / isa_.lanes;
  const int64_t shares = vectors >= 2 * threads_ ? threads_ : 1;
  int64_t slot = 0;
  for (const std::vector<TokenTile>& tiles : split_groups(tokens_, shares, isa_)) {
    const size_t first = tiles_.size();
    for (TokenTile tile : tiles) {
      tile.slot += slot;
      tiles_.push_back(tile);
    }
    slot = tiles_.back().slot + int64_t{tiles_.back().vectors} * isa_.lanes;
    shares_.push_back({first, tiles_.size(), static_cast<int>(shares_.size()),
                       shares == 1 ? threads_ : 1});
  }
}

void GroupRun::find_runs() {
  for (size_t i = group_.first; i < group_.last; ++i) {
    const Sequence& sequence = kept_.sequences[i];
    const size_t first = runs_.size();
    append_runs(tiles_, sequence.first - group_.first_token, sequence.tokens, runs_);
    for (size_t run = first; run < runs_.size(); ++run) {
      queries_.push_back({run, first, runs_.size()});
    }
    most_runs_ = std::max(most_runs_, runs_.size() - first);
    longest_ = std::max(longest_, sequence.tokens);
  }
}

// Floats that a lane needs for a part of a layer.
int64_t GroupRun::floats_per_lane() const {
  int64_t most = 0;
  for (const EncoderLayer& layer : encoder_.layers) {
    const LayerTiles tiles = layer_tiles(layer);
    const auto end = [&](const Tiles& last) {
      return (last.data - part_) / lanes_ + last.features;
    };
    most = std::max({most, end(tiles.qkv[2]), end(tiles.context), end(tiles.down)});
  }
  return most;
}

// Attention and feed-forward use the same memory. Of separate projections the context
// takes the place of the queries.
GroupRun::LayerTiles GroupRun::layer_tiles(const EncoderLayer& layer) const {
  const int64_t width = layer.attention.width();
  LayerTiles tiles{};
  if (layer.attention.projections.size() == 1) {
    for (int64_t i = 0; i < 3; ++i) {
      tiles.qkv[i] = {part_, 3 * width};
      tiles.offsets[i] = i * width;
    }
    tiles.context = {part_ + 3 * width * lanes_, width};
  } else {
    for (int64_t i = 0; i < 3; ++i) {
      tiles.qkv[i] = {part_ + i * width * lanes_, width};
    }
    tiles.context = tiles.qkv[0];
  }
  const int64_t up = layer.feed_forward.up.weight.out_features;
  tiles.up = {part_, up};
  tiles.down = layer.feed_forward.gated ? Tiles{part_ + up * lanes_, up / 2} : tiles.up;
  return tiles;
}

void GroupRun::allocate() {
  const int64_t width = int64_t{isa_.lanes} * isa_.max_vectors;
  int64_t head_dim = 0, rotated = 0;
  for (const EncoderLayer& layer : encoder_.layers) {
    const SelfAttention& attention = layer.attention;
    head_dim = std::max(head_dim, attention.head_dim);
    const auto known = [&](const Rotation& other) {
      return rotates_by(attention, other);
    };
    if (!attention.cosines ||
        std::any_of(rotations_.begin(), rotations_.end(), known)) {
      continue;
    }
    rotations_.push_back(
        {attention.cosines, attention.sines, {nullptr, attention.head_dim / 2}, {}});
    rotated += attention.head_dim;  // cosines and sines of half of it
  }
  thread_floats_ = in_lines(
      std::max(isa_.attention_scratch(head_dim, longest_), width * encoder_.features));
  const int64_t states = (encoder_.norm_first ? 2 : 1) * encoder_.features;
  const int64_t floats = in_lines(lanes_ * (states + rotated + floats_per_lane()));
  float* const all =
      scratch_floats(floats + threads_ * thread_floats_, Scratch::encoder);
  thread_scratch_ = all + floats;
  x_ = {all, encoder_.features};
  normed_ = {all + (states - encoder_.features) * lanes_, encoder_.features};
  part_ = all + states * lanes_;
  make_rotations();
  key_runs_.resize(static_cast<size_t>(threads_) * most_runs_);
}

float* GroupRun::at(const Tiles& tiles, const TokenTile& tile, int64_t feature) const {
  return tiles.data + tile.slot * tiles.features +
         feature * tile.vectors * int64_t{isa_.lanes};
}

void GroupRun::run(float* y, PartClock& clock) {
  std::atomic<bool> out_of_memory{false};
  const auto phases = [&](int thread, int threads) {
    PartClock idle(nullptr);
    PartClock& mine = thread == 0 ? clock : idle;
    // All threads read keys and values, and the feed-forward part uses their memory:
    // each phase waits for the one before.
    // Nothing may be thrown out of a parallel region, nor a thread be waited for that
    // has left.
    const auto phase = [&](auto&& body) {
      try {
        for (size_t i = static_cast<size_t>(thread);
             i < shares_.size() && !out_of_memory; i += static_cast<size_t>(threads)) {
          body(shares_[i]);
        }
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
      if (threads > 1) wait_for_threads();
    };
    phase([&](const Share& share) { embed(share, mine); });
    for (const EncoderLayer& layer : encoder_.layers) {
      phase([&](const Share& share) { project(share, layer, mine); });
      phase([&](const Share& share) { attend(share, layer, mine); });
      phase([&](const Share& share) { feed_forward(share, layer, mine); });
    }
    phase([&](const Share& share) { store(share, y, mine); });
  };
  if (shares_.size() == 1) {
    phases(0, 1);
  } else {
    parallel(threads_, phases);
  }
  clock.enter(Part::rest);
  if (out_of_memory) throw std::bad_alloc();
}

void GroupRun::embed(const Share& share, PartClock& clock) const {
  clock.enter(Part::embeddings);
  for_each_tile(share,
                [&](const TokenTile& tile, float* rows) { embed_tile(tile, rows); });
  if (input_.ids) norm(share, encoder_.embedding_norm, x_, x_, clock);
}

// The input of one tile: the sum of the rows of its tokens in the tables, or the rows
// of the hidden states.
void GroupRun::embed_tile(const TokenTile& tile, float* rows) const {
  const int64_t features = encoder_.features;
  const int64_t* const tokens = kept_.rows.data() + group_.first_token + tile.first;
  for (int64_t token = 0; token < tile.tokens; ++token) {
    const int64_t row = tokens[token];
    float* const out = rows + token * features;
    const float* const first = input_.ids
                                   ? encoder_.words.rows + input_.ids[row] * features
                                   : input_.hidden + row * features;
    std::copy(first, first + features, out);
    if (!input_.ids) continue;
    const auto add = [&](const EmbeddingTable& table, int64_t entry) {
      if (!table.rows) return;
      const float* const other = table.rows + entry * features;
      for (int64_t i = 0; i < features; ++i) out[i] += other[i];
    };
    add(encoder_.token_types, input_.token_types ? input_.token_types[row] : 0);
    add(encoder_.positions,
        input_.positions ? input_.positions[row] : row % input_.length);
  }
  isa_.pack_tokens(rows, features, tile.tokens, 0, features, tile.vectors,
                   at(x_, tile, 0));
}

void GroupRun::store(const Share& share, float* y, PartClock& clock) const {
  norm(share, encoder_.final_norm, x_, x_, clock);
  clock.enter(Part::storing);
  for_each_tile(share,
                [&](const TokenTile& tile, float* rows) { store_tile(tile, rows, y); });
}

void GroupRun::store_tile(const TokenTile& tile, float* rows, float* y) const {
  const int64_t features = encoder_.features;
  const int64_t* const tokens = kept_.rows.data() + group_.first_token + tile.first;
  const bool adjacent = tokens[tile.tokens - 1] - tokens[0] == tile.tokens - 1;
  float* const out = adjacent ? y + tokens[0] * features : rows;
  isa_.unpack_tokens(at(x_, tile, 0), features, tile.tokens, tile.vectors,
                     Activation::none, nullptr, out, features);
  if (adjacent) return;
  for (int64_t token = 0; token < tile.tokens; ++token) {
    const float* const from = rows + token * features;
    std::copy(from, from + features, y + tokens[token] * features);
  }
}

void GroupRun::multiply(const Share& share, const EncoderLinear* linears, int64_t count,
                        const Tiles& x, Activation activation, const float* residual,
                        const Tiles* y) const {
  const TokenTile& first = tiles_[share.first];
  const TokenTile& last = tiles_[share.last - 1];
  Product products[3];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t skipped = first.slot * y[i].features;
    products[i] = {
        linears[i].weight,
        linears[i].schedule,
        {linears[i].bias, activation, residual ? residual + skipped : nullptr},
        y[i].data + skipped,
        linears[i].int8,
        linears[i].input_scale};
  }
  block_sparse_gemm_tiles(products, count, x.data + first.slot * x.features,
                          last.first + last.tokens - first.first, share.threads);
}

void GroupRun::norm(const Share& share, const LayerNorm& norm, const Tiles& x,
                    const Tiles& y, PartClock& clock) const {
  if (!norm.weight) return;
  clock.enter(Part::norms);
  for_each_tile(share, [&](const TokenTile& tile, float*) {
    isa_.layer_norm(at(x, tile, 0), x.features, tile.vectors, norm.weight, norm.bias,
                    norm.eps, at(y, tile, 0));
  });
}

// x += down(activation(up x)). A thread by itself takes as many tiles at a time, one at
// least, as have the outputs of `up` in half of L2: they are read from there, and their
// memory is that of the next chunk. Threads that share the tiles have a cache each.
void GroupRun::feed_forward(const Share& share, const EncoderLayer& layer,
                            PartClock& clock) const {
  if (share.threads > 1) {
    return feed_forward_chunk(share, layer, layer_tiles(layer), clock);
  }
  const int64_t inner = layer.feed_forward.up.weight.out_features;
  const int64_t fit = l2_cache_bytes() / 2 / (inner * int64_t{sizeof(float)});
  const int64_t start = tiles_[share.first].slot;
  Share chunk = share;
  for (; chunk.first < share.last; chunk.first = chunk.last) {
    const int64_t begin = tiles_[chunk.first].slot;
    const auto end = [&](size_t tile) {
      return tiles_[tile].slot + int64_t{tiles_[tile].vectors} * isa_.lanes;
    };
    chunk.last = chunk.first + 1;
    while (chunk.last < share.last && end(chunk.last) - begin <= fit) ++chunk.last;
    LayerTiles tiles = layer_tiles(layer);
    tiles.up.data -= (begin - start) * tiles.up.features;
    tiles.down.data -= (begin - start) * tiles.down.features;
    feed_forward_chunk(chunk, layer, tiles, clock);
  }
}

void GroupRun::feed_forward_chunk(const Share& share, const EncoderLayer& layer,
                                  const LayerTiles& tiles, PartClock& clock) const {
  const FeedForward& part = layer.feed_forward;
  const bool normed = encoder_.norm_first && layer.feed_forward_norm.weight;
  if (normed) norm(share, layer.feed_forward_norm, x_, normed_, clock);
  clock.enter(Part::up);
  const Activation activation = part.activation != Activation::gelu ? part.activation
                                : part.down.int8 ? Activation::gelu_short
                                                 : Activation::gelu_absolute;
  multiply(share, &part.up, 1, normed ? normed_ : x_,
           part.gated ? Activation::none : activation, nullptr, &tiles.up);
  if (part.gated) {
    for_each_tile(share, [&](const TokenTile& tile, float*) {
      isa_.gate(at(tiles.up, tile, 0), at(tiles.up, tile, tiles.down.features),
                tiles.down.features * tile.vectors * isa_.lanes, activation,
                at(tiles.down, tile, 0));
    });
  }
  clock.enter(Part::down);
  multiply(share, &part.down, 1, tiles.down, Activation::none, x_.data, &x_);
  if (!encoder_.norm_first) norm(share, layer.feed_forward_norm, x_, x_, clock);
}

}  // namespace pybsp
