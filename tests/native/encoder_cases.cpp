// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "encoder/encoder.h"
#include "encoder/token_runs.h"
#include "gemm_cases.h"
#include "kernels/attention.h"
#include "kernels/variants.h"
#include "runtime/isa.h"

namespace selftest {
namespace {

using Doubles = std::vector<double>;

// What differs between architectures.
struct Architecture {
  const char* name;
  bool norm_first, one_projection, gated, dense, rotary, relative_bias;
  int64_t window;  // of every other layer; negative: none
  int64_t heads, head_dim;
  pybsp::Activation activation;
};

constexpr int64_t kFeatures = 24, kInner = 40, kPositions = 160, kWords = 50;

// An encoder of random weights that owns its arrays.
class EncoderCase {
 public:
  explicit EncoderCase(const Architecture& kind);
  void check(Report& report, int64_t batch, int64_t length, bool padded) const;

 private:
  const float* keep(std::vector<float> floats) {
    floats_.push_back(std::make_unique<std::vector<float>>(std::move(floats)));
    return floats_.back()->data();
  }
  pybsp::EncoderLinear linear(int64_t out, int64_t in);
  pybsp::LayerNorm norm();
  std::vector<float> run(const pybsp::EncoderInput& input, int threads,
                         pybsp::PartTimes* times = nullptr) const;

  Architecture kind_;
  Random random_{77};
  std::vector<std::unique_ptr<std::vector<float>>> floats_;
  std::vector<std::unique_ptr<BlockSparse>> weights_;
  std::vector<std::unique_ptr<pybsp::Schedule>> schedules_;
  pybsp::Encoder encoder_{};
};

pybsp::EncoderLinear EncoderCase::linear(int64_t out, int64_t in) {
  const int64_t rows = out % 8 == 0 ? 8 : 2;
  const GemmShape shape =
      kind_.dense ? GemmShape{out, in, 1, in} : GemmShape{out, in, rows, 1};
  weights_.push_back(
      std::make_unique<BlockSparse>(shape, kind_.dense ? 1.0 : 0.4, random_));
  const pybsp::BlockSparseView view = weights_.back()->view();
  schedules_.push_back(
      std::make_unique<pybsp::Schedule>(pybsp::token_lane_schedule(view)));
  return {view, schedules_.back().get(), keep(random_.floats(out))};
}

pybsp::LayerNorm EncoderCase::norm() {
  return {keep(random_.floats(kFeatures)), keep(random_.floats(kFeatures)), 1e-5f};
}

EncoderCase::EncoderCase(const Architecture& kind) : kind_(kind) {
  const int64_t width = kind.heads * kind.head_dim;
  encoder_.features = kFeatures;
  encoder_.norm_first = kind.norm_first;
  const float* const cosines = keep(random_.floats(kPositions * kind.head_dim / 2));
  const float* const sines = keep(random_.floats(kPositions * kind.head_dim / 2));
  for (int i = 0; i < 3; ++i) {
    pybsp::EncoderLayer layer{};
    pybsp::SelfAttention& attention = layer.attention;
    if (kind.one_projection) {
      attention.projections = {linear(3 * width, kFeatures)};
    } else {
      for (int j = 0; j < 3; ++j)
        attention.projections.push_back(linear(width, kFeatures));
    }
    attention.output = linear(kFeatures, width);
    attention.heads = kind.heads;
    attention.head_dim = kind.head_dim;
    attention.scale = 0.5f;
    attention.window = i % 2 == 0 ? kind.window : -1;
    if (kind.rotary) {
      attention.cosines = cosines;
      attention.sines = sines;
      attention.rotary_positions = kPositions;
    }
    if (kind.relative_bias) {
      attention.relative_bias = keep(random_.floats(kind.heads * (2 * kPositions - 1)));
      attention.bias_positions = kPositions;
    }
    if (!kind.norm_first || i > 0) layer.attention_norm = norm();
    layer.feed_forward = {linear((kind.gated ? 2 : 1) * kInner, kFeatures),
                          kind.activation, linear(kFeatures, kInner), kind.gated};
    layer.feed_forward_norm = norm();
    encoder_.layers.push_back(layer);
  }
  encoder_.words = {keep(random_.floats(kWords * kFeatures)), kWords};
  encoder_.positions = {keep(random_.floats(kPositions * kFeatures)), kPositions};
  encoder_.token_types = {keep(random_.floats(2 * kFeatures)), 2};
  encoder_.embedding_norm = norm();
  if (kind.norm_first) encoder_.final_norm = norm();
}

std::vector<float> EncoderCase::run(const pybsp::EncoderInput& input, int threads,
                                    pybsp::PartTimes* times) const {
  std::vector<float> y(static_cast<size_t>(input.batch * input.length * kFeatures),
                       std::nanf(""));
  pybsp::run_encoder(encoder_, input, y.data(), threads, times);
  return y;
}

// One sequence in double precision, (tokens, features); `positions` of its tokens.
Doubles through(const pybsp::EncoderLinear& linear, const Doubles& x) {
  const pybsp::BlockSparseView& w = linear.weight;
  const size_t tokens = x.size() / static_cast<size_t>(w.in_features);
  Doubles y(tokens * static_cast<size_t>(w.out_features));
  for (size_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < w.out_features; ++row) {
      double sum = static_cast<double>(linear.bias[row]);
      for (int32_t b = w.crow_indices[row / w.block_rows];
           b < w.crow_indices[row / w.block_rows + 1]; ++b) {
        for (int64_t i = 0; i < w.block_cols; ++i) {
          const int64_t col = w.col_indices[b] * w.block_cols + i;
          sum +=
              static_cast<double>(w.values[(b * w.block_cols + i) * w.block_rows +
                                           row % w.block_rows]) *
              x[token * static_cast<size_t>(w.in_features) + static_cast<size_t>(col)];
        }
      }
      y[token * static_cast<size_t>(w.out_features) + static_cast<size_t>(row)] = sum;
    }
  }
  return y;
}

Doubles through(const pybsp::LayerNorm& norm, Doubles x) {
  if (!norm.weight) return x;
  for (size_t first = 0; first < x.size(); first += kFeatures) {
    double mean = 0.0, variance = 0.0;
    for (size_t i = 0; i < kFeatures; ++i) mean += x[first + i] / kFeatures;
    for (size_t i = 0; i < kFeatures; ++i) {
      variance += (x[first + i] - mean) * (x[first + i] - mean) / kFeatures;
    }
    for (size_t i = 0; i < kFeatures; ++i) {
      x[first + i] = (x[first + i] - mean) /
                         std::sqrt(variance + static_cast<double>(norm.eps)) *
                         static_cast<double>(norm.weight[i]) +
                     static_cast<double>(norm.bias[i]);
    }
  }
  return x;
}

Doubles added(Doubles a, const Doubles& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

Doubles attend(const pybsp::SelfAttention& attention, const Doubles& x,
               const std::vector<int64_t>& positions) {
  const size_t tokens = positions.size();
  const size_t heads = static_cast<size_t>(attention.heads);
  const size_t dim = static_cast<size_t>(attention.head_dim), width = heads * dim;
  Doubles qkv[3];
  if (attention.projections.size() == 1) {
    const Doubles all = through(attention.projections[0], x);
    for (size_t i = 0; i < 3; ++i) {
      for (size_t token = 0; token < tokens; ++token) {
        const auto from = all.begin() + static_cast<int64_t>((3 * token + i) * width);
        qkv[i].insert(qkv[i].end(), from, from + static_cast<int64_t>(width));
      }
    }
  } else {
    for (size_t i = 0; i < 3; ++i) qkv[i] = through(attention.projections[i], x);
  }
  for (size_t i = 0; i < 2 && attention.cosines; ++i) {
    for (size_t at = 0; at < tokens * heads; ++at) {
      for (size_t d = 0; d < dim / 2; ++d) {
        const size_t row = static_cast<size_t>(positions[at / heads]) * (dim / 2) + d;
        const double cosine = static_cast<double>(attention.cosines[row]);
        const double sine = static_cast<double>(attention.sines[row]);
        double& a = qkv[i][at * dim + d];
        double& b = qkv[i][at * dim + d + dim / 2];
        const double first = a;
        a = a * cosine - b * sine;
        b = b * cosine + first * sine;
      }
    }
  }
  Doubles context(tokens * width);
  for (size_t head = 0; head < heads; ++head) {
    for (size_t q = 0; q < tokens; ++q) {
      Doubles scores(tokens);
      for (size_t k = 0; k < tokens; ++k) {
        for (size_t d = head * dim; d < (head + 1) * dim; ++d) {
          scores[k] += qkv[0][q * width + d] * qkv[1][k * width + d] *
                       static_cast<double>(attention.scale);
        }
        const int64_t distance = positions[q] - positions[k];
        if (attention.relative_bias) {
          const int64_t all = 2 * attention.bias_positions - 1;
          scores[k] += static_cast<double>(
              attention.relative_bias[static_cast<int64_t>(head) * all + distance +
                                      attention.bias_positions - 1]);
        }
        if (attention.window >= 0 && std::abs(distance) > attention.window) {
          scores[k] = -std::numeric_limits<double>::infinity();
        }
      }
      const double largest = *std::max_element(scores.begin(), scores.end());
      double total = 0.0;
      for (double& score : scores) total += score = std::exp(score - largest);
      for (size_t k = 0; k < tokens; ++k) {
        for (size_t d = head * dim; d < (head + 1) * dim; ++d) {
          context[q * width + d] += scores[k] / total * qkv[2][k * width + d];
        }
      }
    }
  }
  return through(attention.output, context);
}

Doubles feed_forward(const pybsp::FeedForward& part, const Doubles& x) {
  Doubles up = through(part.up, x);
  const size_t inner = static_cast<size_t>(part.down.weight.in_features);
  Doubles in(x.size() / kFeatures * inner);
  for (size_t i = 0; i < in.size(); ++i) {
    const size_t token = i / inner,
                 at = token * (part.gated ? 2 : 1) * inner + i % inner;
    in[i] = activate(part.activation, up[at]) * (part.gated ? up[at + inner] : 1.0);
  }
  return through(part.down, in);
}

Doubles expected(const pybsp::Encoder& encoder, Doubles x,
                 const std::vector<int64_t>& positions) {
  for (const pybsp::EncoderLayer& layer : encoder.layers) {
    const pybsp::LayerNorm &one = layer.attention_norm, &two = layer.feed_forward_norm;
    if (encoder.norm_first) {
      x = added(x, attend(layer.attention, through(one, x), positions));
      x = added(x, feed_forward(layer.feed_forward, through(two, x)));
    } else {
      x = through(one, added(x, attend(layer.attention, x, positions)));
      x = through(two, added(x, feed_forward(layer.feed_forward, x)));
    }
  }
  return through(encoder.final_norm, x);
}

void EncoderCase::check(Report& report, int64_t batch, int64_t length,
                        bool padded) const {
  Random random(static_cast<uint64_t>(batch * 1000 + length));
  const size_t count = static_cast<size_t>(batch * length);
  std::vector<int64_t> ids(count), types(count), positions(count);
  const std::unique_ptr<bool[]> mask(new bool[count]);
  for (size_t i = 0; i < count; ++i) {
    ids[i] = random.between(0, kWords - 1);
    types[i] = random.between(0, 1);
    positions[i] = random.between(0, kPositions - 1);
    const int64_t row = static_cast<int64_t>(i) / length;
    const int64_t place = static_cast<int64_t>(i) % length;
    // Rows padded at the end, at the beginning, in holes, and wholly.
    mask[i] = row % 4 == 0   ? place < (length + 1) / 2
              : row % 4 == 1 ? place >= length / 3
              : row % 4 == 2 ? random.unit() < 0.6f
                             : false;
  }
  const pybsp::EncoderInput input{
      batch,        length,          ids.data(), nullptr, padded ? mask.get() : nullptr,
      types.data(), positions.data()};
  const std::string what = std::string("encoder ") + kind_.name + " " +
                           std::to_string(batch) + " x " + std::to_string(length) +
                           (padded ? " padded" : "");
  const std::vector<float> y = run(input, 1);
  Doubles want(y.size()), bound(y.size());
  for (int64_t row = 0; row < batch; ++row) {
    Doubles x;
    std::vector<int64_t> places;
    for (int64_t place = 0; place < length; ++place) {
      const size_t at = static_cast<size_t>(row * length + place);
      if (padded && !mask[at]) continue;
      places.push_back(place);
      for (int64_t i = 0; i < kFeatures; ++i) {
        x.push_back(
            static_cast<double>(encoder_.words.rows[ids[at] * kFeatures + i]) +
            static_cast<double>(encoder_.token_types.rows[types[at] * kFeatures + i]) +
            static_cast<double>(
                encoder_.positions.rows[positions[at] * kFeatures + i]));
      }
    }
    x = expected(encoder_, through(encoder_.embedding_norm, x), places);
    for (size_t token = 0; token < places.size(); ++token) {
      const size_t at = static_cast<size_t>(row * length + places[token]) * kFeatures;
      double size = 0.0;
      for (size_t i = 0; i < kFeatures; ++i) {
        size = std::max(size, std::fabs(want[at + i] = x[token * kFeatures + i]));
      }
      // Every layer rounds sums of some forty products a few times, and a norm brings
      // its result back to the size of its weights: errors stay within some hundred
      // roundings of the largest feature. A wrong index is off by the feature itself.
      for (size_t i = 0; i < kFeatures; ++i)
        bound[at + i] = 1000 * kUnitRoundoff * size;
    }
  }
  const int64_t floats = batch * length * kFeatures;
  report.close(what, y.data(), want.data(), bound.data(), floats, kFeatures);
  // AVX-512 has a GELU of its own.
  const bool own = kind_.activation == pybsp::Activation::gelu;
  (own ? report.rest : report.tiles).add(y.data(), floats);
  for (const int threads : {2, 3, 8}) {
    report.same_bits(what + " on " + std::to_string(threads) + " threads", y.data(),
                     run(input, threads).data(), floats, kFeatures);
    pybsp::PartTimes times{};
    report.same_bits(what + ", timed, on " + std::to_string(threads) + " threads",
                     y.data(), run(input, threads, &times).data(), floats, kFeatures);
  }
  // The last row of the batch, alone.
  const int64_t last = (batch - 1) * length;
  const pybsp::EncoderInput alone{1,
                                  length,
                                  ids.data() + last,
                                  nullptr,
                                  padded ? mask.get() + last : nullptr,
                                  types.data() + last,
                                  positions.data() + last};
  report.same_bits(what + ", a row alone", y.data() + last * kFeatures,
                   run(alone, 1).data(), length * kFeatures, kFeatures);
}

void check_token_runs(Report& report) {
  const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
  constexpr int64_t kTokens = 200, kFirst = 5;
  const std::vector<pybsp::TokenTile> tiles = pybsp::split_tokens(kTokens, isa);
  std::vector<pybsp::TokenRun> runs;
  pybsp::append_runs(tiles, kFirst, kTokens - kFirst, runs);
  report.require("a run for each tile", runs.size() == tiles.size());
  int64_t tokens = kFirst;
  for (const pybsp::TokenRun& run : runs) {
    const pybsp::TokenTile& tile = tiles[static_cast<size_t>(run.tile)];
    report.require("runs follow each other", tile.first + run.lane == tokens);
    tokens += run.count;
  }
  report.require("runs hold all tokens", tokens == kTokens);
}

// Scores of any size: past 2^21 and without a fraction, far apart or all the same.
void check_large_scores(Report& report) {
  const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
  constexpr int64_t kKeys = 5;
  const float sizes[] = {0.0f,  0.5f, -0.25f, 3e5f, -3e5f, 2e6f,  -2e6f, 2e7f,
                         -2e7f, 1e9f, -1e9f,  4e9f, -4e9f, 1e30f, -1e30f};
  constexpr int64_t kSizes = sizeof(sizes) / sizeof(*sizes);
  const float values[kKeys] = {1.0f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float all_keys[][kKeys] = {
      {-2.0f, -1.0f, 3.0f, 7.0f, 7.0f}, {1, 1, 1, 1, 1}, {-2.0f, -1.0f, 0, 0, 0}};
  const int64_t width = int64_t{isa.lanes} * isa.max_vectors;
  for (const float* keys : all_keys) {
    for (int64_t first = 0; first < kSizes; ++first) {
      std::vector<float> queries, y(static_cast<size_t>(width), -1.0f);
      std::vector<float> scratch(static_cast<size_t>(isa.attention_scratch(1, kKeys)) +
                                 16);
      for (int64_t i = 0; i < width; ++i) {
        queries.push_back(sizes[(first + i) % kSizes]);
      }
      const pybsp::KeyRun run{keys, values, kKeys, kKeys, nullptr};
      pybsp::AttentionPiece piece{};
      piece.queries = queries.data();
      piece.stride = piece.y_stride = piece.count = width;
      piece.runs = &run;
      piece.num_runs = 1;
      piece.head_dim = 1;
      piece.scale = 1.0f;
      piece.scratch = reinterpret_cast<float*>(
          (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
      piece.y = y.data();
      isa.attention(piece);
      Doubles want, bound;
      for (const float query : queries) {
        double most = -std::numeric_limits<double>::infinity(), total = 0.0, sum = 0.0;
        for (int64_t j = 0; j < kKeys; ++j) {
          most = std::max(most, double{query} * keys[j]);
        }
        for (int64_t j = 0; j < kKeys; ++j) {
          const double weight = std::exp(double{query} * keys[j] - most);
          total += weight;
          sum += weight * values[j];
        }
        want.push_back(sum / total);
        bound.push_back(64 * kUnitRoundoff * 6);
      }
      report.close("attention to large scores", y.data(), want.data(), bound.data(),
                   width, width);
    }
  }
}

// Queries, keys and values in 48 lanes a tile, whose sequence begins at a lane of the
// first one. Floats of 16 bits of significand, and integers of 13 bits and a sign, give
// errors of 2^-13 in products.
class ShortAttention {
 public:
  ShortAttention(int64_t head_dim, int64_t first_lane, int64_t length, bool with_bias,
                 uint64_t seed = 17)
      : random_(seed), dim_(head_dim), lane_(first_lane), length_(length) {
    const int64_t floats = (first_lane + length + kTile - 1) / kTile * kTile * dim_;
    queries_ = random_.floats(floats);
    keys_ = random_.floats(floats);
    values_ = random_.floats(floats);
    if (with_bias) bias_ = random_.floats(2 * length + 64);
    for (int64_t i = 0; i < length; ++i) positions_.push_back(i);
  }

  std::vector<float>& queries() { return queries_; }
  std::vector<float>& keys() { return keys_; }
  std::vector<float>& values() { return values_; }

  // Keys more than so many positions away from a query are hidden.
  void hide_past(int64_t window) {
    for (int64_t i = 0; i < 2 * length_; ++i) {
      if (std::abs(i - length_) > window) {
        bias_[static_cast<size_t>(i)] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  // Of the tokens of one tile to the tokens of the sequence from first_key on; the
  // queries before count as those of other pieces, which need the same keys.
  std::vector<float> run(int64_t tile, int64_t first_key, bool in_short) const {
    const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
    std::vector<float> scratch(
        static_cast<size_t>(isa.attention_scratch(dim_, length_)) + 16);
    std::vector<pybsp::KeyRun> runs;
    for (int64_t i = first_key; i < length_;) {
      const int64_t lane = (lane_ + i) % kTile;
      const int64_t count = std::min(kTile - lane, length_ - i);
      runs.push_back({keys_.data() + at(i, 0), values_.data() + at(i, 0), kTile, count,
                      positions_.data() + i});
      i += count;
    }
    std::vector<float> y;
    bool same_keys = false;
    for (int64_t i = 0; i < length_;) {
      const int64_t lane = (lane_ + i) % kTile;
      const int64_t count =
          std::min({kTile - lane, length_ - i, int64_t{isa.lanes} * isa.max_vectors});
      pybsp::AttentionPiece piece{};
      piece.queries = queries_.data() + at(i, 0);
      piece.stride = kTile;
      piece.count = count;
      piece.positions = positions_.data() + i;
      piece.runs = runs.data();
      piece.num_runs = static_cast<int64_t>(runs.size());
      piece.sequence = length_;
      piece.first_key = first_key;
      piece.same_keys = same_keys;
      piece.short_floats = in_short;
      piece.head_dim = dim_;
      piece.scale = kScale;
      if (!bias_.empty()) piece.bias = bias_.data() + length_;
      piece.scratch = reinterpret_cast<float*>(
          (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
      y.assign(static_cast<size_t>(dim_ * kTile), -1.0f);
      piece.y = y.data();
      piece.y_stride = kTile;
      isa.attention(piece);
      if ((lane_ + i) / kTile == tile) break;
      same_keys = true;
      i += count;
    }
    return y;
  }

  void check(Report& report, int64_t tile, int64_t first_key) const {
    const std::vector<float> y = run(tile, first_key, true);
    const int64_t first = first_of(tile), count = queries_of(tile);
    Doubles want(y.size(), -1.0), bound(y.size(), 0.0);
    for (int64_t query = 0; query < count; ++query) {
      Doubles weights;
      double most = -std::numeric_limits<double>::infinity(), total = 0.0, size = 0.0;
      for (int64_t j = first_key; j < length_; ++j) {
        double score = 0.0, sizes = 0.0;
        for (int64_t d = 0; d < dim_; ++d) {
          const double product =
              double{queries_[index(first + query, d)]} * keys_[index(j, d)];
          score += product;
          sizes += std::fabs(product);
        }
        if (!bias_.empty()) {
          score +=
              double{bias_[static_cast<size_t>(length_ + first + query - j)]} / kScale;
        }
        weights.push_back(kScale * score);
        most = std::max(most, kScale * score);
        size = std::max(size, kScale * sizes);
      }
      for (double& weight : weights) total += weight = std::exp(weight - most);
      for (int64_t d = 0; d < dim_; ++d) {
        double sum = 0.0, largest = 0.0;
        for (int64_t j = first_key; j < length_; ++j) {
          const double value = values_[index(j, d)];
          sum += weights[static_cast<size_t>(j - first_key)] / total * value;
          largest = std::max(largest, std::fabs(value));
        }
        const size_t to = static_cast<size_t>(d * kTile + query);
        want[to] = sum;
        bound[to] = (2 * size + 2) * largest / 8192;
      }
    }
    report.close("attention in short floats", y.data(), want.data(), bound.data(),
                 static_cast<int64_t>(y.size()), kTile);
  }

  // The bits of products of integers, where the keys that `is_seen` names share all of
  // the weight and the others have none. kLargest... are those of the kernel.
  void check_bits(Report& report, int64_t tile,
                  const std::vector<bool>& is_seen) const {
    constexpr float kLargestShort = 32767.0f, kLargestValue = 8191.0f;
    constexpr float kLargestTotal = 261120.0f;
    const auto seen = std::count(is_seen.begin(), is_seen.end(), true);
    const float share = kLargestTotal / static_cast<float>(seen);
    if (std::fabs(share - std::floor(share) - 0.5f) < 0.05f) return;  // either way
    const auto weight =
        static_cast<int64_t>(std::nearbyint(std::min(share, kLargestShort)));
    const float inverse = 1.0f / static_cast<float>(weight * seen);
    const std::vector<float> y = run(tile, 0, true);
    std::vector<float> want(y.size(), -1.0f);  // as run() leaves the other lanes
    for (int64_t d = 0; d < dim_; ++d) {
      float largest = 0.0f;
      for (int64_t j = 0; j < length_; ++j) {
        largest = std::max(largest, std::fabs(values_[index(j, d)]));
      }
      int64_t sum = 0;
      for (int64_t j = 0; j < length_; ++j) {
        if (!is_seen[static_cast<size_t>(j)]) continue;
        const float multiple = values_[index(j, d)] * (kLargestValue / largest);
        sum += weight * static_cast<int64_t>(std::nearbyint(multiple));
      }
      const float product = static_cast<float>(sum) * inverse;
      std::fill_n(want.begin() + d * kTile, queries_of(tile),
                  product * (largest * (1.0f / kLargestValue)));
    }
    report.same_bits("attention in integers", y.data(), want.data(),
                     static_cast<int64_t>(y.size()), kTile);
  }

  int64_t last_tile() const { return (lane_ + length_ - 1) / kTile; }

  size_t index(int64_t token, int64_t d) const {
    return static_cast<size_t>(at(token, d));
  }

 private:
  static constexpr int64_t kTile = 48;
  static constexpr float kScale = 0.25f;

  int64_t first_of(int64_t tile) const {
    return std::max<int64_t>(tile * kTile - lane_, 0);
  }

  // That run() answers: those of the tile's first piece.
  int64_t queries_of(int64_t tile) const {
    const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
    const int64_t first = first_of(tile);
    return std::min({kTile - (lane_ + first) % kTile, length_ - first,
                     int64_t{isa.lanes} * isa.max_vectors});
  }

  int64_t at(int64_t token, int64_t d) const {
    const int64_t lane = lane_ + token;
    return (lane / kTile * dim_ + d) * kTile + lane % kTile;
  }

  Random random_;
  int64_t dim_, lane_, length_;
  std::vector<float> queries_, keys_, values_, bias_;
  std::vector<int64_t> positions_;
};

// Keys with the signs of the queries' features, and keys with the opposite ones: scores
// as large as sums get, and weights that are all alike or nothing.
void check_integer_attention(Report& report, uint64_t seed) {
  const pybsp::Isa isa = pybsp::active_isa();
  if (isa != pybsp::Isa::avx2_vnni && isa != pybsp::Isa::avx512_vnni) return;
  Random random(seed);
  const int64_t head_dim = 8 * random.between(1, 32);
  const int64_t length = random.between(50, 400);
  const int64_t lane = random.between(0, 47);
  ShortAttention one(head_dim, lane, length, false, random.bits());
  std::vector<float> signs;
  for (int64_t d = 0; d < head_dim; ++d) {
    signs.push_back(random.between(0, 1) == 0 ? 1.0f : -1.0f);
  }
  const int64_t seen_of_16 = random.between(1, 16);
  const bool is_extreme = random.between(0, 1) == 0;
  std::vector<bool> is_seen;
  for (int64_t i = 0; i < length; ++i) {
    is_seen.push_back(i == 0 || random.between(1, 16) <= seen_of_16);
    const float query = 1.0f + 3.0f * random.unit();
    for (int64_t d = 0; d < head_dim; ++d) {
      const float sign = signs[static_cast<size_t>(d)];
      one.queries()[one.index(i, d)] = query * sign;
      one.keys()[one.index(i, d)] = is_seen.back() ? 5.0f * sign : -5.0f * sign;
      if (is_extreme) {
        one.values()[one.index(i, d)] = random.between(0, 7) == 0 ? 7.0f : -7.0f;
      }
    }
  }
  one.check_bits(report, random.between(0, one.last_tile()), is_seen);
}

void check_short_attention(Report& report) {
  for (const int64_t head_dim : {32, 64, 40, 8, 24}) {
    for (const int64_t lane : {0, 5, 47}) {
      for (const int64_t length : {63, 64, 65, 96, 130}) {
        for (const bool with_bias : {false, true}) {
          const ShortAttention one(head_dim, lane, length, with_bias);
          for (const int64_t first_key : {0, 1, 33, 62}) {
            for (const int64_t tile : {0, 1}) one.check(report, tile, first_key);
          }
        }
      }
    }
  }
  // Sums as large as they get, with either sign, one outlier, and nothing at all.
  for (const int64_t head_dim : {32, 40, 64, 128}) {
    for (const float query : {3.0f, -3.0f, 0.0f}) {
      ShortAttention one(head_dim, 5, 130, false);
      std::fill(one.queries().begin(), one.queries().end(), query);
      std::fill(one.keys().begin(), one.keys().end(), 5.0f);
      std::fill(one.values().begin(), one.values().end(), -7.0f);
      one.check(report, 1, 0);
      one.values()[one.index(9, 3)] = 1e4f;
      one.keys()[one.index(9, 3)] = -6.0f;
      one.check(report, 1, 0);
      std::fill(one.keys().begin(), one.keys().end(), 0.0f);
      one.check(report, 1, 0);
      std::fill(one.values().begin(), one.values().end(), 0.0f);
      one.check(report, 1, 0);
    }
  }
  // Many keys that count alike, beside one that takes the most or not.
  for (const int64_t length : {300, 512, 1000, 2001}) {
    for (const bool with_sink : {false, true}) {
      ShortAttention one(32, 5, length, false);
      std::fill(one.queries().begin(), one.queries().end(), 1.0f);
      std::fill(one.keys().begin(), one.keys().end(), 0.0f);
      std::fill(one.values().begin(), one.values().end(), 1.0f);
      if (with_sink) {
        for (int64_t d = 0; d < 32; ++d) {
          one.keys()[one.index(0, d)] = 1.0f;  // e^8 times as much
          one.values()[one.index(0, d)] = 0.0f;
        }
      }
      one.check(report, 1, 0);
    }
  }
  // Keys that all queries of a piece do not see may be left out.
  for (const int64_t length : {100, 130}) {
    ShortAttention one(32, 0, length, true);
    one.hide_past(20);
    report.require("the same bits without hidden keys",
                   one.run(1, 0, true) == one.run(1, 48 - 20, true));
  }
  // What is not finite gives what floats give, and the pieces after it too.
  constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float bad : {kNone, kInfinity, -kInfinity}) {
    for (const int which : {0, 1, 2}) {
      ShortAttention one(64, 0, 96, false);
      std::vector<float>& spoilt = which == 0   ? one.queries()
                                   : which == 1 ? one.keys()
                                                : one.values();
      spoilt[one.index(7, 3)] = bad;
      const std::vector<float> want = one.run(0, 0, false), y = one.run(0, 0, true);
      bool same = true;
      for (size_t i = 0; i < y.size(); ++i) {
        same = same && (y[i] == want[i] || (std::isnan(y[i]) && std::isnan(want[i])));
      }
      report.require("attention to what is not finite", same);
      if (which == 0) one.check(report, 1, 0);
    }
  }
  for (uint64_t seed = 0; seed < 50; ++seed) check_integer_attention(report, seed);
}

}  // namespace

void check_random_attention(Report& report, Random& random) {
  const int64_t head_dim = random.between(1, 80), lane = random.between(0, 47);
  const int64_t length = random.between(1, 200);
  const bool with_bias = random.between(0, 1) == 0;
  const ShortAttention one(head_dim, lane, length, with_bias, random.bits());
  const int64_t tile = random.between(0, one.last_tile());
  one.check(report, tile, random.between(0, length - 1));
  check_integer_attention(report, random.bits());
}

void check_encoder(Report& report, bool quick) {
  using pybsp::Activation;
  check_token_runs(report);
  check_large_scores(report);
  check_short_attention(report);
  const Architecture kinds[] = {
      {"bert", false, false, false, false, false, false, -1, 3, 8, Activation::gelu},
      {"dense", false, false, false, true, false, true, -1, 2, 12, Activation::relu},
      {"modern", true, true, true, false, true, false, 9, 4, 6, Activation::gelu},
      {"mixed", true, false, false, false, true, true, 0, 3, 10, Activation::silu},
  };
  for (const Architecture& kind : kinds) {
    const EncoderCase one(kind);
    for (const int64_t length : {1, 2, 17, 48, 130}) {
      if (quick && length > 48) continue;
      one.check(report, 1, length, false);
      one.check(report, quick ? 3 : 7, length, true);
    }
    if (!quick) one.check(report, 40, 19, true);
  }
}

}  // namespace selftest
