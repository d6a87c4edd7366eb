// SPDX-License-Identifier: Apache-2.0
#include "encoder/group_run.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
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
  const bool by_position = std::any_of(
      encoder_.layers.begin(), encoder_.layers.end(), [](const EncoderLayer& layer) {
        return layer.attention.window >= 0 || layer.attention.relative_bias;
      });
  for (size_t i = group_.first; i < group_.last; ++i) {
    const Sequence& sequence = kept_.sequences[i];
    const size_t first = runs_.size();
    append_runs(tiles_, sequence.first - group_.first_token,
                kept_.rows.data() + sequence.first, sequence.tokens, input_.length,
                by_position, runs_);
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
  thread_floats_ = in_lines(std::max(attention_scratch(head_dim, longest_, width),
                                     width * encoder_.features));
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

bool GroupRun::rotates_by(const SelfAttention& attention, const Rotation& rotation) {
  return attention.cosines == rotation.cosines && attention.sines == rotation.sines;
}

// The cosines and sines of the tokens of this group, for all layers that share a table.
void GroupRun::make_rotations() {
  for (Rotation& rotation : rotations_) {
    const int64_t half = rotation.cosine_tiles.features;
    const auto gather = [&](const float* table) {
      const Tiles to{part_, half};
      part_ += half * lanes_;
      for (const TokenTile& tile : tiles_) {
        const int64_t* const rows = kept_.rows.data() + group_.first_token + tile.first;
        for (int64_t token = 0; token < tile.tokens; ++token) {
          const float* const row = table + rows[token] % input_.length * half;
          std::copy(row, row + half, thread_scratch_ + token * half);
        }
        isa_.pack_tokens(thread_scratch_, half, tile.tokens, 0, half, tile.vectors,
                         at(to, tile, 0));
      }
      return to;
    };
    rotation.cosine_tiles = gather(rotation.cosines);
    rotation.sine_tiles = gather(rotation.sines);
  }
}

float* GroupRun::at(const Tiles& tiles, const TokenTile& tile, int64_t feature) const {
  return tiles.data + tile.slot * tiles.features +
         feature * tile.vectors * int64_t{isa_.lanes};
}

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
        y[i].data + skipped};
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

// Query, key and value.
void GroupRun::project(const Share& share, const EncoderLayer& layer,
                       PartClock& clock) {
  const SelfAttention& attention = layer.attention;
  const LayerTiles tiles = layer_tiles(layer);
  const bool normed = encoder_.norm_first && layer.attention_norm.weight;
  if (normed) norm(share, layer.attention_norm, x_, normed_, clock);
  clock.enter(Part::query_key_value);
  multiply(share, attention.projections.data(),
           static_cast<int64_t>(attention.projections.size()), normed ? normed_ : x_,
           Activation::none, nullptr, tiles.qkv);
  if (attention.cosines) {
    for (int i = 0; i < 2; ++i) {
      rotate(share, attention, tiles.qkv[i], tiles.offsets[i]);
    }
  }
  if (share.first == 0) make_bias(attention);
}

void GroupRun::rotate(const Share& share, const SelfAttention& attention,
                      const Tiles& x, int64_t offset) const {
  const Rotation& by = *std::find_if(
      rotations_.begin(), rotations_.end(),
      [&](const Rotation& other) { return rotates_by(attention, other); });
  const int64_t half = attention.head_dim / 2;
  for_each_tile(share, [&](const TokenTile& tile, float*) {
    for (int64_t head = 0; head < attention.heads; ++head) {
      const int64_t first = offset + head * attention.head_dim;
      isa_.rotate(at(x, tile, first), at(x, tile, first + half),
                  at(by.cosine_tiles, tile, 0), at(by.sine_tiles, tile, 0),
                  half * tile.vectors * isa_.lanes);
    }
  });
}

// bias_ by query - key + length - 1, a table for each head or one for all; empty where
// every score stays as it is.
void GroupRun::make_bias(const SelfAttention& attention) {
  bias_.clear();
  if (attention.window < 0 && !attention.relative_bias) return;
  const int64_t length = input_.length;
  const int64_t distances = 2 * length - 1;
  const int64_t tables = attention.relative_bias ? attention.heads : 1;
  // A vector of queries reads past the last one.
  const int64_t stride = distances + int64_t{isa_.lanes} * isa_.max_vectors;
  bias_.assign(static_cast<size_t>(tables * stride), 0.0f);
  for (int64_t table = 0; table < tables; ++table) {
    float* const out = bias_.data() + table * stride;
    if (attention.relative_bias) {
      const int64_t all = 2 * attention.bias_positions - 1;
      const float* const from =
          attention.relative_bias + table * all + (attention.bias_positions - length);
      std::copy(from, from + distances, out);
    }
    if (attention.window < 0) continue;
    for (int64_t i = 0; i < distances; ++i) {
      if (std::abs(i - (length - 1)) > attention.window) {
        out[i] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  bias_stride_ = tables == 1 ? 0 : stride;
}

// x += output(context) for the queries in the tiles of the share.
void GroupRun::attend(const Share& share, const EncoderLayer& layer,
                      PartClock& clock) const {
  clock.enter(Part::attention);
  const LayerTiles tiles = layer_tiles(layer);
  const int64_t heads = layer.attention.heads;
  const auto mine = [&](const QueryRun& piece) {
    const size_t tile = static_cast<size_t>(runs_[piece.run].tile);
    return share.first <= tile && tile < share.last;
  };
  const int64_t items = std::count_if(queries_.begin(), queries_.end(), mine) * heads;
  parallel(share.threads, [&](int thread, int threads) {
    const size_t number = static_cast<size_t>(share.thread + thread);
    KeyRun* const runs = key_runs_.data() + number * most_runs_;
    float* const scratch =
        thread_scratch_ + static_cast<int64_t>(number) * thread_floats_;
    const Range range = pybsp::share(items, thread, threads);
    int64_t item = 0;
    // Head after head of a sequence, so that keys and values stay in L1.
    for (size_t begin = 0, end = 0; begin < queries_.size(); begin = end) {
      while (end < queries_.size() && queries_[end].first == queries_[begin].first) {
        ++end;
      }
      for (int64_t head = 0; head < heads; ++head) {
        for (size_t piece = begin; piece < end; ++piece) {
          if (!mine(queries_[piece])) continue;
          if (item >= range.first && item < range.last) {
            attend_head(layer.attention, queries_[piece], head, tiles, runs, scratch);
          }
          ++item;
        }
      }
    }
  });
  clock.enter(Part::output);
  // Before the next phase, which uses the memory of the contexts of all shares.
  multiply(share, &layer.attention.output, 1, tiles.context, Activation::none, x_.data,
           &x_);
  if (!encoder_.norm_first) norm(share, layer.attention_norm, x_, x_, clock);
}

void GroupRun::attend_head(const SelfAttention& attention, const QueryRun& piece,
                           int64_t head, const LayerTiles& in, KeyRun* runs,
                           float* scratch) const {
  const TokenRun& queries = runs_[piece.run];
  const int64_t feature = head * attention.head_dim;
  const auto tile_of = [&](const TokenRun& run) -> const TokenTile& {
    return tiles_[static_cast<size_t>(run.tile)];
  };
  const auto stride = [&](const TokenRun& run) {
    return int64_t{tile_of(run).vectors} * isa_.lanes;
  };
  const auto place = [&](int which, const TokenRun& run) {
    return at(in.qkv[which], tile_of(run), in.offsets[which] + feature) + run.lane;
  };
  int64_t count = 0;
  for (size_t i = piece.first; i < piece.last; ++i) {
    const TokenRun& run = runs_[i];
    int64_t skip = 0, keys = run.count;
    if (attention.window >= 0) {
      const int64_t low = queries.position - attention.window;
      const int64_t high = queries.position + queries.count + attention.window;
      skip = std::max<int64_t>(0, low - run.position);
      keys = std::min<int64_t>(run.count, high - run.position) - skip;
      if (keys <= 0) continue;
    }
    runs[count++] = {place(1, run) + skip, place(2, run) + skip, stride(run), keys,
                     run.position + skip};
  }
  AttentionPiece one{};
  one.queries = place(0, queries);
  one.stride = one.y_stride = stride(queries);
  one.count = queries.count;
  one.position = queries.position;
  one.runs = runs;
  one.num_runs = count;
  one.head_dim = attention.head_dim;
  one.scale = attention.scale;
  if (!bias_.empty()) one.bias = bias_.data() + head * bias_stride_ + input_.length - 1;
  one.scratch = scratch;
  one.y = at(in.context, tile_of(queries), feature) + queries.lane;
  isa_.attention(one);
}

// x += down(activation(up x))
void GroupRun::feed_forward(const Share& share, const EncoderLayer& layer,
                            PartClock& clock) const {
  const LayerTiles tiles = layer_tiles(layer);
  const FeedForward& part = layer.feed_forward;
  const bool normed = encoder_.norm_first && layer.feed_forward_norm.weight;
  if (normed) norm(share, layer.feed_forward_norm, x_, normed_, clock);
  clock.enter(Part::up);
  multiply(share, &part.up, 1, normed ? normed_ : x_,
           part.gated ? Activation::none : part.activation, nullptr, &tiles.up);
  if (part.gated) {
    for_each_tile(share, [&](const TokenTile& tile, float*) {
      isa_.gate(at(tiles.up, tile, 0), at(tiles.up, tile, tiles.down.features),
                tiles.down.features * tile.vectors * isa_.lanes, part.activation,
                at(tiles.down, tile, 0));
    });
  }
  clock.enter(Part::down);
  multiply(share, &part.down, 1, tiles.down, Activation::none, x_.data, &x_);
  if (!encoder_.norm_first) norm(share, layer.feed_forward_norm, x_, x_, clock);
}

}  // namespace pybsp
