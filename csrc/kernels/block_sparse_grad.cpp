// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_sparse_grad.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/token_tiles.h"
#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace pybsp {
namespace {

// dy transposed at a time for dx, in floats: 384 KB, which are written and read in L2
// beside the weights of a part. With 2 MB dx took 15 % longer.
constexpr int64_t kGroupFloats = 96 * 1024;
// Tokens of a panel for dW: eight features of one input and three of the other, 17 KB
// of it, stay in L1 while their products are summed. Fewer would pay the sum over lanes
// at the end more often, more would push the panels out of L2.
constexpr int64_t kPanelTokens = 384;
// The features of each input that meet are chunks of 640 KB: both stay in L2.
constexpr int64_t kChunkFloats = 160 * 1024;
// Less of an input that passes by the whole other one, and is read but once.
constexpr int64_t kPassingFloats = 32 * 1024;
// Features transposed for a whole panel before the next: each is a page of its own, and
// so many are found again without a walk of the page tables.
constexpr int64_t kPackFeatures = 128;
// Multiply-adds under which a second thread would start later than one finishes.
constexpr int64_t kSerialWork = 500'000;

size_t at(int64_t i) { return static_cast<size_t>(i); }

int useful_threads(const BlockSparseView& weight, int64_t tokens, int threads) {
  return kept_weights(weight) * tokens < kSerialWork ? 1 : std::max(threads, 1);
}

// ---- dx

class GradX {
 public:
  GradX(const BlockSparseView& weight, const TransposedIndex& index)
      : weight_(weight), index_(index), isa_(variants(active_isa())) {}

  void run(const float* dy, int64_t tokens, float* dx, int threads);

 private:
  void multiply_tiles(const std::vector<TokenTile>& tiles, Range parts, const float* dy,
                      float* dy_tiles, int64_t held, float* dx_tile, float* dx) const;
  void multiply(int64_t part, const float* dy_tile, int vectors, float* dx_tile) const;
  std::vector<int64_t> split_parts(int64_t teams) const;
  int64_t part_features(int64_t part) const {
    return (index_.part_cols[at(part + 1)] - index_.part_cols[at(part)]) *
           weight_.block_cols;
  }
  int64_t part_cost(int64_t part) const;

  const BlockSparseView& weight_;
  const TransposedIndex& index_;
  const Variants& isa_;
};

int64_t GradX::part_cost(int64_t part) const {
  const int64_t first = index_.part_cols[at(part)];
  const int64_t last = index_.part_cols[at(part + 1)];
  // Storing and transposing a feature costs about eight multiply-adds.
  const int64_t features = part_features(part) * 8;
  if (!index_.by_run) {
    const int64_t blocks =
        index_.ccol_indices[at(last)] - index_.ccol_indices[at(first)];
    return blocks * weight_.block_rows * weight_.block_cols + features;
  }
  int64_t runs = 0;
  for (int64_t i = index_.part_tiles[at(part)]; i < index_.part_tiles[at(part + 1)];
       ++i)
    runs += index_.tiles[at(i)].count;
  return runs * weight_.block_rows + features;
}

void GradX::multiply(int64_t part, const float* dy_tile, int vectors,
                     float* dx_tile) const {
  const int64_t first = index_.part_cols[at(part)];
  const int64_t last = index_.part_cols[at(part + 1)];
  if (!index_.by_run) {
    const BlockColumns columns{first, last, index_.ccol_indices.data(),
                               index_.blocks.data(), index_.row_indices.data()};
    isa_.multiply_block_columns(weight_, columns, dy_tile, vectors, dx_tile);
    return;
  }
  const RunTiles tiles{first * weight_.block_cols, last * weight_.block_cols,
                       index_.tiles.data() + index_.part_tiles[at(part)],
                       index_.tiles.data() + index_.part_tiles[at(part + 1)],
                       index_.run_features.data()};
  isa_.multiply_runs(weight_, tiles, dy_tile, vectors, dx_tile);
}

// Boundaries that give every team the parts in whose share of the cost their middles
// lie.
std::vector<int64_t> GradX::split_parts(int64_t teams) const {
  std::vector<int64_t> boundaries(at(teams + 1), index_.num_parts());
  int64_t total = 0, before = 0;
  for (int64_t part = 0; part < index_.num_parts(); ++part) total += part_cost(part);
  int64_t team = 0;
  for (int64_t part = 0; part < index_.num_parts(); ++part) {
    const int64_t cost = part_cost(part);
    const int64_t owner = (2 * before + cost) * teams / (2 * total);
    while (team <= owner) boundaries[at(team++)] = part;
    before += cost;
  }
  return boundaries;
}

void GradX::run(const float* dy, int64_t tokens, float* dx, int threads) {
  const int64_t out = weight_.out_features;
  const int64_t lanes = isa_.lanes, width = lanes * isa_.max_vectors;
  const int64_t vectors = (tokens + lanes - 1) / lanes;
  const ThreadSplit split = split_threads(vectors, threads);
  const int64_t most = (vectors + split.groups - 1) / split.groups;
  const int64_t held =
      std::clamp<int64_t>(kGroupFloats / (out * width), 1,
                          (most + isa_.max_vectors - 1) / isa_.max_vectors);
  int64_t features = 0;
  for (int64_t part = 0; part < index_.num_parts(); ++part) {
    features = std::max(features, part_features(part));
  }
  const int64_t dy_floats = in_lines(held * out * width);
  const int64_t floats = dy_floats + in_lines(features * width);
  const std::vector<int64_t> boundaries = split_parts(split.teams);
  const auto tiles = split_groups(tokens, split.groups, isa_);
  float* const scratch = scratch_floats(threads * floats);
  parallel(threads, [&](int thread, int count) {
    // The threads asked for need not be those that are given.
    for (int64_t share = thread; share < threads; share += count) {
      const int64_t team = share / split.groups;
      float* const mine = scratch + thread * floats;
      multiply_tiles(tiles[at(share % split.groups)],
                     {boundaries[at(team)], boundaries[at(team + 1)]}, dy, mine, held,
                     mine + dy_floats, dx);
    }
  });
}

// `parts` for all `tiles`, `held` of them at a time.
void GradX::multiply_tiles(const std::vector<TokenTile>& tiles, Range parts,
                           const float* dy, float* dy_tiles, int64_t held,
                           float* dx_tile, float* dx) const {
  const int64_t out = weight_.out_features, in = weight_.in_features;
  const int64_t all = static_cast<int64_t>(tiles.size());
  for (int64_t begin = 0; begin < all; begin += held) {
    const int64_t end = std::min(all, begin + held);
    const auto dy_tile = [&](const TokenTile& tile) {
      return dy_tiles + (tile.slot - tiles[at(begin)].slot) * out;
    };
    for (int64_t i = begin; i < end; ++i) {
      const TokenTile& tile = tiles[at(i)];
      isa_.pack_tokens(dy + tile.first * out, out, tile.tokens, 0, out, tile.vectors,
                       dy_tile(tile));
    }
    for (int64_t part = parts.first; part < parts.last; ++part) {
      const int64_t features = part_features(part);
      for (int64_t i = begin; i < end; ++i) {
        const TokenTile& tile = tiles[at(i)];
        float* const to =
            dx + tile.first * in + index_.part_cols[at(part)] * weight_.block_cols;
        multiply(part, dy_tile(tile), tile.vectors, dx_tile);
        isa_.unpack_tokens(dx_tile, features, tile.tokens, tile.vectors,
                           Activation::none, nullptr, to, in);
      }
    }
  }
}

// ---- dW

// One of the two inputs: the products of up to eight consecutive features of one, the
// rows of a block or the columns of one that is flat, share features of the other.
struct Side {
  const float* from;
  int64_t features;
  int64_t extent;  // of a block
};

class GradValues {
 public:
  GradValues(const BlockSparseView& weight, const TransposedIndex& index,
             const float* dy, const float* x, float* dvalues, float* dbias)
      : weight_(weight),
        index_(index),
        isa_(variants(active_isa())),
        by_column_(index.flat),
        own_{dy, weight.out_features, weight.block_rows},
        shared_{x, weight.in_features, weight.block_cols},
        dvalues_(dvalues),
        dbias_(dbias) {
    if (by_column_) std::swap(own_, shared_);
    ptr_ = by_column_ ? index.ccol_indices.data() : weight.crow_indices;
    others_ = by_column_ ? index.row_indices.data() : weight.col_indices;
  }

  void run(int64_t tokens, int threads);

 private:
  // A run of tokens, and how many groups, which are block rows or columns, meet how
  // many of the other side while both are in L2.
  struct Panel {
    int64_t first_token;
    int64_t tokens;
    int64_t vectors;
    int64_t width;     // of a feature of the other side
    int64_t own_step;  // from vector to vector of the groups
    int64_t group_chunk;
    int64_t other_chunk;
    bool stream;
  };
  // The groups and the others of one thread, and whether it sums the dy it transposes:
  // one thread alone where all transpose the same.
  struct Share {
    Range groups;
    Range others;
    bool sums;
  };
  // Of one thread, as large as it can get: nothing may throw in a parallel region.
  struct Scratch {
    float* own;
    float* shared;
    std::vector<int32_t> features;
    std::vector<int64_t> dst;
  };

  Panel panel(int64_t tokens) const;
  void pack_own(const Panel& panel, int64_t first, int64_t last, float* own) const;
  void pack_shared(const Panel& panel, int64_t first, int64_t last,
                   float* shared) const;
  void sum_own(const Panel& panel, int64_t first, int64_t last, const float* own) const;
  void sum_shared(const Panel& panel, int64_t first, int64_t last,
                  const float* shared) const;
  void multiply_panel(const Panel& panel, Share share, Scratch& scratch) const;
  void multiply(const Panel& panel, int64_t group, const float* own, Range others,
                int64_t held, Scratch& scratch) const;
  std::vector<Share> split(int threads) const;

  const BlockSparseView& weight_;
  const TransposedIndex& index_;
  const Variants& isa_;
  const bool by_column_;
  Side own_, shared_;
  float* dvalues_;
  float* dbias_;
  const int32_t* ptr_;     // the blocks of a group
  const int32_t* others_;  // and their place along the other side
};

GradValues::Panel GradValues::panel(int64_t tokens) const {
  const int64_t lanes = isa_.lanes;
  Panel panel{};
  panel.tokens = tokens;
  panel.vectors = (tokens + lanes - 1) / lanes;
  // An odd number of vectors: with a power of two all features would meet in one set
  // of L1.
  panel.width = (panel.vectors | 1) * lanes;
  const auto chunk = [&](const Side& side, int64_t floats) {
    const int64_t all = side.features / side.extent;
    const int64_t most = std::max<int64_t>(1, floats / (panel.width * side.extent));
    const int64_t chunks = (all + most - 1) / most;
    return (all + chunks - 1) / chunks;
  };
  const int64_t groups = own_.features / own_.extent;
  const int64_t others = shared_.features / shared_.extent;
  panel.other_chunk = chunk(shared_, kChunkFloats);
  // Groups that are read once need not stay.
  panel.group_chunk =
      chunk(own_, panel.other_chunk == others ? kPassingFloats : kChunkFloats);
  panel.stream = panel.other_chunk < others && panel.group_chunk == groups;
  // Eight lines on in L1 from vector to vector: as many features are read together.
  const int64_t lines = (panel.group_chunk * own_.extent * lanes + 15) / 16;
  panel.own_step = ((lines + 63) / 64 * 64 + 8) * 16;
  return panel;
}

// Features [first, last) as [vector][feature][lane]: up to eight of them are read side
// by side. Lanes past the last token are zero.
void GradValues::pack_own(const Panel& panel, int64_t first, int64_t last,
                          float* own) const {
  const float* from = own_.from + panel.first_token * own_.features + first;
  for (int64_t v = 0; v < panel.vectors; ++v) {
    const int64_t token = v * isa_.lanes;
    const int64_t tokens = std::min<int64_t>(isa_.lanes, panel.tokens - token);
    float* const to = own + v * panel.own_step;
    isa_.pack_tokens(from + token * own_.features, own_.features, tokens, 0,
                     last - first, 1, to);
    for (int64_t lane = tokens; lane < isa_.lanes; ++lane) {
      for (int64_t i = 0; i < last - first; ++i) to[i * isa_.lanes + lane] = 0.0f;
    }
  }
}

// Features [first, last) as [feature][width]: each is read from end to end. Lanes past
// the last token are zero.
void GradValues::pack_shared(const Panel& panel, int64_t first, int64_t last,
                             float* shared) const {
  for (int64_t begin = first; begin < last; begin += kPackFeatures) {
    isa_.pack_tokens(shared_.from + panel.first_token * shared_.features + begin,
                     shared_.features, panel.tokens, 0,
                     std::min(kPackFeatures, last - begin),
                     static_cast<int>(panel.width / isa_.lanes),
                     shared + (begin - first) * panel.width);
  }
  for (int64_t feature = 0; feature < last - first; ++feature) {
    std::fill(shared + feature * panel.width + panel.tokens,
              shared + (feature + 1) * panel.width, 0.0f);
  }
}

// Features [first, last) of dy, as they were transposed above.
void GradValues::sum_own(const Panel& panel, int64_t first, int64_t last,
                         const float* own) const {
  isa_.add_feature_sums(own, last - first, isa_.lanes, panel.vectors, panel.own_step,
                        dbias_ + first);
}

void GradValues::sum_shared(const Panel& panel, int64_t first, int64_t last,
                            const float* shared) const {
  isa_.add_feature_sums(shared, last - first, panel.width, panel.vectors, isa_.lanes,
                        dbias_ + first);
}

// Adds the products of the blocks of one group with `others`; scratch.shared starts
// with number `held`.
void GradValues::multiply(const Panel& panel, int64_t group, const float* own,
                          Range others, int64_t held, Scratch& scratch) const {
  const int64_t r = weight_.block_rows, c = weight_.block_cols;
  int32_t* feature = scratch.features.data();
  int64_t* dst = scratch.dst.data();
  const int32_t* end = others_ + ptr_[group + 1];
  const int32_t* other =
      std::lower_bound(others_ + ptr_[group], end, static_cast<int32_t>(others.first));
  for (; other < end && *other < others.last; ++other) {
    const int64_t i = other - others_;
    const int64_t block = by_column_ ? index_.blocks[at(i)] : i;
    for (int64_t j = 0; j < shared_.extent; ++j) {
      *feature++ = static_cast<int32_t>((*other - held) * shared_.extent + j);
      *dst++ = block * r * c + (by_column_ ? j : j * r);
    }
  }
  SampledProducts products{};
  products.a = own;
  products.a_step = panel.own_step;
  products.rows = own_.extent;
  products.b = scratch.shared;
  products.features = scratch.features.data();
  products.dst = scratch.dst.data();
  products.count = feature - scratch.features.data();
  products.width = panel.width;
  products.vectors = panel.vectors;
  products.stride = by_column_ ? r : 1;
  products.out = dvalues_;
  isa_.sampled_products(products);
}

// The others are transposed all at once, or chunk by chunk if all groups are held and
// every chunk is read but once.
void GradValues::multiply_panel(const Panel& panel, Share share,
                                Scratch& scratch) const {
  const auto pack_others = [&](int64_t first, int64_t last) {
    const int64_t from = first * shared_.extent, to = last * shared_.extent;
    pack_shared(panel, from, to, scratch.shared);
    if (share.sums && by_column_) sum_shared(panel, from, to, scratch.shared);
  };
  if (!panel.stream) pack_others(share.others.first, share.others.last);
  for (int64_t chunk = share.groups.first; chunk < share.groups.last;
       chunk += panel.group_chunk) {
    const int64_t end = std::min(share.groups.last, chunk + panel.group_chunk);
    pack_own(panel, chunk * own_.extent, end * own_.extent, scratch.own);
    if (share.sums && !by_column_) {
      sum_own(panel, chunk * own_.extent, end * own_.extent, scratch.own);
    }
    for (int64_t other = share.others.first; other < share.others.last;
         other += panel.other_chunk) {
      const Range others{other, std::min(share.others.last, other + panel.other_chunk)};
      if (panel.stream) pack_others(others.first, others.last);
      const int64_t held = panel.stream ? others.first : share.others.first;
      for (int64_t group = chunk; group < end; ++group) {
        multiply(panel, group, scratch.own + (group - chunk) * own_.extent * isa_.lanes,
                 others, held, scratch);
      }
    }
  }
}

// The side with more features is split, so that each thread has the same number of
// blocks; all of the other side is transposed by each of them.
std::vector<GradValues::Share> GradValues::split(int threads) const {
  const int64_t groups = own_.features / own_.extent;
  const int64_t others = shared_.features / shared_.extent;
  const bool sums = dbias_ != nullptr;
  std::vector<Share> shares(at(threads), {{0, groups}, {0, others}, sums});
  if (threads == 1) return shares;
  const bool by_other = shared_.features > own_.features;
  const bool splits_dy = by_other == by_column_;
  std::vector<int64_t> before(at((by_other ? others : groups) + 1));
  if (by_other) {
    for (int64_t i = 0; i < ptr_[groups]; ++i) ++before[at(others_[i] + 1)];
    for (size_t i = 1; i < before.size(); ++i) before[i] += before[i - 1];
  } else {
    std::copy(ptr_, ptr_ + groups + 1, before.begin());
  }
  int64_t from = 0;
  for (int thread = 0; thread < threads; ++thread) {
    int64_t to = from;
    while (to + 1 < static_cast<int64_t>(before.size()) &&
           before[at(to)] * threads < before.back() * (thread + 1)) {
      ++to;
    }
    // What has no blocks at the end is summed all the same.
    if (thread == threads - 1) to = static_cast<int64_t>(before.size()) - 1;
    Share& mine = shares[at(thread)];
    (by_other ? mine.others : mine.groups) = {from, to};
    mine.sums = sums && (splits_dy || thread == 0);
    from = to;
  }
  return shares;
}

void GradValues::run(int64_t tokens, int threads) {
  const int64_t panels = (tokens + kPanelTokens - 1) / kPanelTokens;
  // Of similar size, and each but the last of whole vectors.
  const int64_t lanes = isa_.lanes;
  const int64_t step = ((tokens + panels - 1) / panels + lanes - 1) / lanes * lanes;
  const Panel largest = panel(std::min(step, tokens));
  const std::vector<Share> shares = split(threads);
  const int64_t own = in_lines(largest.vectors * largest.own_step);
  const int64_t held =
      largest.stream ? largest.other_chunk * shared_.extent : shared_.features;
  const int64_t shared = in_lines(held * largest.width);
  float* const floats = scratch_floats(threads * (own + shared));
  std::vector<Scratch> scratch(at(threads));
  for (int thread = 0; thread < threads; ++thread) {
    Scratch& mine = scratch[at(thread)];
    mine.own = floats + thread * (own + shared);
    mine.shared = mine.own + own;
    mine.features.resize(at(shared_.features));
    mine.dst.resize(at(shared_.features));
  }
  parallel(threads, [&](int thread, int count) {
    for (int which = thread; which < threads; which += count) {
      for (int64_t first = 0; first < tokens; first += step) {
        Panel now = largest;
        now.first_token = first;
        now.tokens = std::min(step, tokens - first);
        now.vectors = (now.tokens + lanes - 1) / lanes;
        multiply_panel(now, shares[at(which)], scratch[at(thread)]);
      }
    }
  });
}

}  // namespace

void block_sparse_grad_x(const BlockSparseView& weight, const TransposedIndex& index,
                         const float* dy, int64_t tokens, float* dx, int threads) {
  if (tokens == 0) return;
  GradX(weight, index).run(dy, tokens, dx, useful_threads(weight, tokens, threads));
}

void block_sparse_grad_values(const BlockSparseView& weight,
                              const TransposedIndex& index, const float* dy,
                              const float* x, int64_t tokens, float* dvalues,
                              float* dbias, int threads) {
  const int64_t count = kept_weights(weight);
  if (dbias) std::memset(dbias, 0, at(weight.out_features) * sizeof(float));
  if (count > 0) std::memset(dvalues, 0, at(count) * sizeof(float));
  if (tokens == 0 || (count == 0 && !dbias)) return;
  GradValues(weight, index, dy, x, dvalues, dbias)
      .run(tokens, useful_threads(weight, tokens, threads));
}

}  // namespace pybsp
