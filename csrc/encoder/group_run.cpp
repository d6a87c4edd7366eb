// SPDX-License-Identifier: Apache-2.0
#include "encoder/group_run.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

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
      tiles_(split_tokens(group.last_token - group.first_token, isa_)),
      lanes_(tile_lanes(group.last_token - group.first_token, isa_)) {
  find_runs();
  allocate();
}

void GroupRun::find_runs() {
  for (size_t i = group_.first; i < group_.last; ++i) {
    const Sequence& sequence = kept_.sequences[i];
    const size_t first = runs_.size();
    append_runs(tiles_, sequence.first - group_.first_token,
                kept_.rows.data() + sequence.first, sequence.tokens, input_.length,
                runs_);
    for (size_t run = first; run < runs_.size(); ++run) {
      queries_.push_back({run, first, runs_.size()});
    }
    most_runs_ = std::max(most_runs_, runs_.size() - first);
    longest_ = std::max(longest_, sequence.tokens);
  }
}

// Floats that a lane needs beside the states of the layers.
int64_t GroupRun::floats_per_lane() const {
  int64_t most = 0;
  for (const EncoderLayer& layer : encoder_.layers) {
    const FeedForward& part = layer.feed_forward;
    const int64_t up = part.up.weight.out_features;
    // Of separate matrices the context takes the place of the queries.
    const int64_t attention =
        (layer.attention.projections.size() == 1 ? 4 : 3) * layer.attention.width();
    most = std::max({most, attention, part.gated ? up + up / 2 : up});
  }
  return most;
}

void GroupRun::allocate() {
  const int64_t width = int64_t{isa_.lanes} * isa_.max_vectors;
  int64_t head_dim = 0, rotated = 0;
  std::vector<const float*> tables;
  for (const EncoderLayer& layer : encoder_.layers) {
    const SelfAttention& attention = layer.attention;
    head_dim = std::max(head_dim, attention.head_dim);
    if (attention.cosines &&
        std::find(tables.begin(), tables.end(), attention.cosines) == tables.end()) {
      tables.push_back(attention.cosines);
      rotated += attention.head_dim;  // cosines and sines of half of it
    }
  }
  thread_floats_ = in_lines(std::max(attention_scratch(head_dim, longest_, width),
                                     width * encoder_.features));
  const int64_t states = (encoder_.norm_first ? 2 : 1) * encoder_.features;
  const int64_t floats = lanes_ * (states + rotated + floats_per_lane());
  // Tiles of so few lanes that a vector reaches past them end in memory of the threads.
  free_ =
      scratch_floats(in_lines(floats) + threads_ * thread_floats_, Scratch::encoder);
  thread_scratch_ = free_ + in_lines(floats);
  x_ = take(encoder_.features);
  normed_ = encoder_.norm_first ? take(encoder_.features) : x_;
  key_runs_.resize(static_cast<size_t>(threads_) * most_runs_);
}

GroupRun::Tiles GroupRun::take(int64_t features) {
  const Tiles taken{free_, features};
  free_ += lanes_ * features;
  return taken;
}

float* GroupRun::at(const Tiles& tiles, const TokenTile& tile, int64_t feature) const {
  return tiles.data + tile.slot * tiles.features +
         feature * tile.vectors * int64_t{isa_.lanes};
}

void GroupRun::run(float* y) {
  const auto for_each_tile = [&](auto&& body) {
    parallel(threads_, [&](int thread, int threads) {
      const Range mine = share(static_cast<int64_t>(tiles_.size()), thread, threads);
      for (int64_t i = mine.first; i < mine.last; ++i) {
        body(tiles_[static_cast<size_t>(i)], thread_scratch_ + thread * thread_floats_);
      }
    });
  };
  for_each_tile([&](const TokenTile& tile, float* rows) { embed(tile, rows); });
  if (input_.ids) norm(encoder_.embedding_norm, x_, x_);
  for (const EncoderLayer& layer : encoder_.layers) {
    // The position where rotations end: they are made by the first layer that turns.
    if (layer.attention.cosines) rotation(layer.attention);
  }
  part_ = free_;
  for (const EncoderLayer& layer : encoder_.layers) {
    if (encoder_.norm_first) norm(layer.attention_norm, x_, normed_);
    const bool normed = encoder_.norm_first && layer.attention_norm.weight;
    attend(layer.attention, normed ? normed_ : x_, x_.data);
    if (!encoder_.norm_first) norm(layer.attention_norm, x_, x_);
    const bool again = encoder_.norm_first && layer.feed_forward_norm.weight;
    if (again) norm(layer.feed_forward_norm, x_, normed_);
    feed_forward(layer.feed_forward, again ? normed_ : x_, x_.data);
    if (!encoder_.norm_first) norm(layer.feed_forward_norm, x_, x_);
  }
  norm(encoder_.final_norm, x_, x_);
  for_each_tile([&](const TokenTile& tile, float* rows) { store(tile, rows, y); });
}

// The input of one tile: the sum of the rows of its tokens in the tables, or the rows
// of the hidden states.
void GroupRun::embed(const TokenTile& tile, float* rows) {
  const int64_t features = encoder_.features;
  const int64_t* const tokens = kept_.rows.data() + group_.first_token + tile.first;
  for (int64_t token = 0; token < tile.tokens; ++token) {
    const int64_t row = tokens[token];
    float* const out = rows + token * features;
    if (!input_.ids) {
      std::memcpy(out, input_.hidden + row * features,
                  static_cast<size_t>(features) * sizeof(float));
      continue;
    }
    const float* const word = encoder_.words.rows + input_.ids[row] * features;
    std::memcpy(out, word, static_cast<size_t>(features) * sizeof(float));
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

void GroupRun::store(const TokenTile& tile, float* rows, float* y) const {
  const int64_t features = encoder_.features;
  const int64_t* const tokens = kept_.rows.data() + group_.first_token + tile.first;
  const bool adjacent = tokens[tile.tokens - 1] - tokens[0] == tile.tokens - 1;
  float* const out = adjacent ? y + tokens[0] * features : rows;
  isa_.unpack_tokens(at(x_, tile, 0), features, tile.tokens, tile.vectors,
                     Activation::none, nullptr, out, features);
  if (adjacent) return;
  for (int64_t token = 0; token < tile.tokens; ++token) {
    std::memcpy(y + tokens[token] * features, rows + token * features,
                static_cast<size_t>(features) * sizeof(float));
  }
}

void GroupRun::multiply(const EncoderLinear* linears, int64_t count, const Tiles& x,
                        Activation activation, const float* residual,
                        const Tiles* y) const {
  Product products[3];
  for (int64_t i = 0; i < count; ++i) {
    products[i] = {linears[i].weight,
                   linears[i].schedule,
                   {linears[i].bias, activation, residual},
                   y[i].data};
  }
  block_sparse_gemm_tiles(products, count, x.data,
                          group_.last_token - group_.first_token, threads_);
}

void GroupRun::norm(const LayerNorm& norm, const Tiles& x, const Tiles& y) const {
  if (!norm.weight) return;
  parallel(threads_, [&](int thread, int threads) {
    const Range mine = share(static_cast<int64_t>(tiles_.size()), thread, threads);
    for (int64_t i = mine.first; i < mine.last; ++i) {
      const TokenTile& tile = tiles_[static_cast<size_t>(i)];
      isa_.layer_norm(at(x, tile, 0), x.features, tile.vectors, norm.weight, norm.bias,
                      norm.eps, at(y, tile, 0));
    }
  });
}

// residual += output(attention(x))
void GroupRun::attend(const SelfAttention& attention, const Tiles& x, float* residual) {
  free_ = part_;
  const int64_t width = attention.width();
  const bool one = attention.projections.size() == 1;
  Tiles qkv[3], context;
  int64_t offsets[3] = {0, 0, 0};
  if (one) {
    qkv[0] = take(3 * width);
    for (int i = 1; i < 3; ++i) {
      qkv[i] = qkv[0];
      offsets[i] = i * width;
    }
    context = take(width);
  } else {
    for (Tiles& tiles : qkv) tiles = take(width);
    context = qkv[0];
  }
  multiply(attention.projections.data(),
           static_cast<int64_t>(attention.projections.size()), x, Activation::none,
           nullptr, qkv);
  if (attention.cosines) {
    for (int i = 0; i < 2; ++i) rotate(attention, qkv[i], offsets[i]);
  }
  make_bias(attention);
  const int64_t items = static_cast<int64_t>(queries_.size()) * attention.heads;
  parallel(threads_, [&](int thread, int threads) {
    KeyRun* const runs = key_runs_.data() + static_cast<size_t>(thread) * most_runs_;
    float* const scratch = thread_scratch_ + thread * thread_floats_;
    const Range mine = share(items, thread, threads);
    int64_t item = 0;
    // Head after head of a sequence, so that keys and values stay in L1.
    for (size_t begin = 0, end = 0; begin < queries_.size(); begin = end) {
      while (end < queries_.size() && queries_[end].first == queries_[begin].first) {
        ++end;
      }
      for (int64_t head = 0; head < attention.heads; ++head) {
        for (size_t piece = begin; piece < end; ++piece, ++item) {
          if (item < mine.first || item >= mine.last) continue;
          attend_head(attention, queries_[piece], head, qkv, offsets, context, runs,
                      scratch);
        }
      }
    }
  });
  const Tiles y{residual, encoder_.features};
  multiply(&attention.output, 1, context, Activation::none, residual, &y);
}

void GroupRun::attend_head(const SelfAttention& attention, const QueryRun& piece,
                           int64_t head, const Tiles (&qkv)[3],
                           const int64_t (&offsets)[3], const Tiles& context,
                           KeyRun* runs, float* scratch) const {
  const TokenRun& queries = runs_[piece.run];
  const int64_t feature = head * attention.head_dim;
  const auto tile_of = [&](const TokenRun& run) -> const TokenTile& {
    return tiles_[static_cast<size_t>(run.tile)];
  };
  const auto stride = [&](const TokenRun& run) {
    return int64_t{tile_of(run).vectors} * isa_.lanes;
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
    const int64_t lane = run.lane + skip;
    runs[count++] = {at(qkv[1], tile_of(run), offsets[1] + feature) + lane,
                     at(qkv[2], tile_of(run), offsets[2] + feature) + lane, stride(run),
                     keys, run.position + skip};
  }
  AttentionPiece one{};
  one.queries = at(qkv[0], tile_of(queries), offsets[0] + feature) + queries.lane;
  one.stride = stride(queries);
  one.count = queries.count;
  one.position = queries.position;
  one.runs = runs;
  one.num_runs = count;
  one.head_dim = attention.head_dim;
  one.scale = attention.scale;
  if (!bias_.empty()) one.bias = bias_.data() + head * bias_stride_ + input_.length - 1;
  one.scratch = scratch;
  one.y = at(context, tile_of(queries), feature) + queries.lane;
  one.y_stride = one.stride;
  isa_.attention(one);
}

// residual += down(activation(up x))
void GroupRun::feed_forward(const FeedForward& part, const Tiles& x, float* residual) {
  free_ = part_;
  Tiles up = take(part.up.weight.out_features);
  if (part.gated) {
    multiply(&part.up, 1, x, Activation::none, nullptr, &up);
    const Tiles product = take(up.features / 2);
    parallel(threads_, [&](int thread, int threads) {
      const Range mine = share(static_cast<int64_t>(tiles_.size()), thread, threads);
      for (int64_t i = mine.first; i < mine.last; ++i) {
        const TokenTile& tile = tiles_[static_cast<size_t>(i)];
        isa_.gate(at(up, tile, 0), at(up, tile, product.features),
                  product.features * tile.vectors * isa_.lanes, part.activation,
                  at(product, tile, 0));
      }
    });
    up = product;
  } else {
    multiply(&part.up, 1, x, part.activation, nullptr, &up);
  }
  const Tiles y{residual, encoder_.features};
  multiply(&part.down, 1, up, Activation::none, residual, &y);
}

// The cosines and sines of the tokens of this group, once for all layers that share
// them.
const GroupRun::Rotation& GroupRun::rotation(const SelfAttention& attention) {
  for (const Rotation& known : rotations_) {
    if (known.cosines == attention.cosines) return known;
  }
  const int64_t half = attention.head_dim / 2;
  const Rotation made{attention.cosines, take(half), take(half)};
  const auto gather = [&](const float* table, const Tiles& to) {
    for (const TokenTile& tile : tiles_) {
      for (int64_t token = 0; token < tile.tokens; ++token) {
        const size_t kept =
            static_cast<size_t>(group_.first_token + tile.first + token);
        const float* const row = table + kept_.rows[kept] % input_.length * half;
        std::copy(row, row + half, thread_scratch_ + token * half);
      }
      isa_.pack_tokens(thread_scratch_, half, tile.tokens, 0, half, tile.vectors,
                       at(to, tile, 0));
    }
  };
  gather(attention.cosines, made.cosine_tiles);
  gather(attention.sines, made.sine_tiles);
  rotations_.push_back(made);
  return rotations_.back();
}

void GroupRun::rotate(const SelfAttention& attention, const Tiles& x, int64_t offset) {
  const Rotation& by = rotation(attention);
  const int64_t half = attention.head_dim / 2;
  parallel(threads_, [&](int thread, int threads) {
    const Range mine = share(static_cast<int64_t>(tiles_.size()), thread, threads);
    for (int64_t i = mine.first; i < mine.last; ++i) {
      const TokenTile& tile = tiles_[static_cast<size_t>(i)];
      for (int64_t head = 0; head < attention.heads; ++head) {
        const int64_t first = offset + head * attention.head_dim;
        isa_.rotate(at(x, tile, first), at(x, tile, first + half),
                    at(by.cosine_tiles, tile, 0), at(by.sine_tiles, tile, 0),
                    half * tile.vectors * isa_.lanes);
      }
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
  bias_stride_ = distances + int64_t{isa_.lanes} * isa_.max_vectors;
  bias_.assign(static_cast<size_t>(tables * bias_stride_), 0.0f);
  for (int64_t table = 0; table < tables; ++table) {
    float* const out = bias_.data() + table * bias_stride_;
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
  if (tables == 1) bias_stride_ = 0;
}

}  // namespace pybsp
