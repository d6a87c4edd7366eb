// SPDX-License-Identifier: Apache-2.0
// The attention part of a layer.
#include <algorithm>
#include <cstdlib>
#include <limits>

#include "encoder/group_run.h"

namespace pybsp {

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
        bool same_keys = false;
        for (size_t piece = begin; piece < end; ++piece) {
          if (!mine(queries_[piece])) continue;
          if (item >= range.first && item < range.last) {
            attend_head(layer.attention, queries_[piece], head, tiles, runs, scratch,
                        same_keys);
            same_keys = layer.attention.window < 0;
          }
          ++item;
        }
      }
    }
    isa_.end_attention();
  });
  clock.enter(Part::output);
  // Before the next phase, which uses the memory of the contexts of all shares.
  multiply(share, &layer.attention.output, 1, tiles.context, Activation::none, x_.data,
           &x_);
  if (!encoder_.norm_first) norm(share, layer.attention_norm, x_, x_, clock);
}

void GroupRun::attend_head(const SelfAttention& attention, const QueryRun& piece,
                           int64_t head, const LayerTiles& in, KeyRun* runs,
                           float* scratch, bool same_keys) const {
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
  // Rows of the padded batch, which differ within a sequence as positions do.
  const auto positions = [&](const TokenRun& run) {
    return kept_.rows.data() + group_.first_token + tile_of(run).first + run.lane;
  };
  const int64_t* const queried = positions(queries);
  int64_t count = 0, passed = 0, first_key = 0;
  for (size_t i = piece.first; i < piece.last; ++i) {
    const TokenRun& run = runs_[i];
    const int64_t* first = positions(run);
    const int64_t* last = first + run.count;
    if (attention.window >= 0) {
      const int64_t low = queried[0] - attention.window;
      const int64_t high = queried[queries.count - 1] + attention.window;
      first = std::lower_bound(first, last, low);
      last = std::upper_bound(first, last, high);
    }
    const int64_t skip = first - positions(run);
    passed += run.count;
    if (first == last) continue;
    if (count == 0) first_key = passed - run.count + skip;
    runs[count++] = {place(1, run) + skip, place(2, run) + skip, stride(run),
                     last - first, first};
  }
  AttentionPiece one{};
  one.queries = place(0, queries);
  one.stride = one.y_stride = stride(queries);
  one.count = queries.count;
  one.positions = queried;
  one.runs = runs;
  one.num_runs = count;
  one.sequence = passed;
  one.first_key = first_key;
  one.same_keys = same_keys;
  const auto& projections = attention.projections;
  one.short_floats = std::all_of(projections.begin(), projections.end(),
                                 [](const EncoderLinear& of) { return of.int8; });
  one.head_dim = attention.head_dim;
  one.scale = attention.scale;
  if (!bias_.empty()) one.bias = bias_.data() + head * bias_stride_ + input_.length - 1;
  one.scratch = scratch;
  one.y = at(in.context, tile_of(queries), feature) + queries.lane;
  isa_.attention(one);
}

}  // namespace pybsp
