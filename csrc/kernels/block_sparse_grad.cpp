// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_sparse_grad.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "kernels/variants.h"
#include "runtime/isa.h"
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
// Features transposed for a whole panel before the next: each is a page of its own, and
// so many are found again without a walk of the page tables.
constexpr int64_t kPackFeatures = 128;
// Multiply-adds under which a second thread would start later than one finishes.
constexpr int64_t kSerialWork = 500'000;

size_t at(int64_t i) { return static_cast<size_t>(i); }

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats allocate(int64_t count) {
  const size_t bytes = at(std::max<int64_t>(count, 16)) * sizeof(float);
  return AlignedFloats(
      static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
}

int64_t number_of_blocks(const BlockSparseView& weight) {
  return weight.crow_indices[weight.out_features / weight.block_rows];
}

int useful_threads(const BlockSparseView& weight, int64_t tokens, int threads) {
  const int64_t work =
      number_of_blocks(weight) * weight.block_rows * weight.block_cols * tokens;
  return work < kSerialWork ? 1 : std::max(threads, 1);
}

// ---- dx

class GradX {
 public:
  GradX(const BlockSparseView& weight, const TransposedIndex& index)
      : weight_(weight), index_(index), isa_(variants(active_isa())) {}

  void run(const float* dy, int64_t tokens, float* dx, int threads);

 private:
  void multiply(int64_t part, const float* dy_tile, int vectors, float* dx_tile) const;
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

void GradX::run(const float* dy, int64_t tokens, float* dx, int threads) {
  const int64_t out = weight_.out_features, in = weight_.in_features;
  const int64_t width = isa_.lanes * isa_.max_vectors;
  const int64_t tiles = (tokens + width - 1) / width;
  const int64_t held = std::clamp<int64_t>(kGroupFloats / (out * width),
                                           std::min<int64_t>(threads, tiles), tiles);
  int64_t most = 0, total = 0;
  std::vector<int64_t> costs;
  for (int64_t part = 0; part < index_.num_parts(); ++part) {
    most = std::max(most, part_features(part));
    total += costs.emplace_back(part_cost(part));
  }
  const AlignedFloats dy_tiles = allocate(held * out * width);
  const AlignedFloats dx_tiles = allocate(threads * most * width);
  // Features in steps of whole transposed squares, so that threads share a tile.
  const int64_t steps = (out + isa_.lanes - 1) / isa_.lanes;
  for (int64_t first = 0; first < tiles; first += held) {
    const int64_t count = std::min(held, tiles - first);
    auto tokens_of = [&](int64_t tile) {
      return std::min(width, tokens - (first + tile) * width);
    };
    auto vectors_of = [&](int64_t tile) {
      return static_cast<int>((tokens_of(tile) + isa_.lanes - 1) / isa_.lanes);
    };
    parallel(threads, [&](int thread, int team) {
      const Range range = share(count * steps, thread, team);
      for (int64_t i = range.first; i < range.last;) {
        const int64_t tile = i / steps;
        const int64_t end = std::min(range.last, (tile + 1) * steps);
        isa_.pack_tokens(dy + (first + tile) * width * out, out, tokens_of(tile),
                         (i - tile * steps) * isa_.lanes,
                         std::min(out, (end - tile * steps) * isa_.lanes),
                         vectors_of(tile), dy_tiles.get() + tile * out * width);
        i = end;
      }
    });
    parallel(threads, [&](int thread, int team) {
      // Every (part, tile) goes to the thread in whose share of the cost its middle
      // lies.
      float* dx_tile = dx_tiles.get() + thread * most * width;
      int64_t before = 0;
      for (int64_t part = 0; part < index_.num_parts(); ++part) {
        const int64_t cost = costs[at(part)];
        const int64_t feature = index_.part_cols[at(part)] * weight_.block_cols;
        for (int64_t tile = 0; tile < count; ++tile, before += cost) {
          if ((2 * before + cost) * team / (2 * total * count) != thread) continue;
          multiply(part, dy_tiles.get() + tile * out * width, vectors_of(tile),
                   dx_tile);
          isa_.unpack_tokens(dx_tile, part_features(part), tokens_of(tile),
                             vectors_of(tile), Activation::none, nullptr,
                             dx + (first + tile) * width * in + feature, in);
        }
      }
    });
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
             const float* dy, const float* x, float* dvalues)
      : weight_(weight),
        index_(index),
        isa_(variants(active_isa())),
        by_column_(index.flat),
        own_{dy, weight.out_features, weight.block_rows},
        shared_{x, weight.in_features, weight.block_cols},
        dvalues_(dvalues) {
    if (by_column_) std::swap(own_, shared_);
    ptr_ = by_column_ ? index.ccol_indices.data() : weight.crow_indices;
    others_ = by_column_ ? index.row_indices.data() : weight.col_indices;
  }

  void run(int64_t tokens, int threads);

 private:
  // A run of tokens, and the features of both sides that are multiplied while they are
  // in L2: groups, which are block rows or columns, by as many of the other.
  struct Panel {
    int64_t first_token;
    int64_t tokens;
    int64_t vectors;
    int64_t width;
    const float* shared;
    int64_t group_chunk;
    int64_t other_chunk;
  };
  // Of one thread, as large as it can get: nothing may throw in a parallel region.
  struct Scratch {
    AlignedFloats own;
    std::vector<int32_t> features;
    std::vector<int64_t> dst;
  };

  Panel panel(int64_t first, int64_t tokens) const;
  void pack(const Side& side, const Panel& panel, int64_t first, int64_t last,
            float* tile) const;
  void multiply_groups(const Panel& panel, int64_t first, int64_t last,
                       Scratch& scratch) const;
  void multiply(const Panel& panel, int64_t group, const float* own, int64_t first,
                int64_t last, Scratch& scratch) const;
  std::vector<int64_t> split_groups(int threads) const;

  const BlockSparseView& weight_;
  const TransposedIndex& index_;
  const Variants& isa_;
  const bool by_column_;
  Side own_, shared_;
  float* dvalues_;
  const int32_t* ptr_;     // the blocks of a group
  const int32_t* others_;  // and their place along the other side
};

GradValues::Panel GradValues::panel(int64_t first, int64_t tokens) const {
  Panel panel{};
  panel.first_token = first;
  panel.tokens = tokens;
  panel.vectors = (tokens + isa_.lanes - 1) / isa_.lanes;
  // An odd number of vectors: with a power of two all features would meet in one set
  // of L1.
  panel.width = (panel.vectors | 1) * isa_.lanes;
  panel.group_chunk = std::max<int64_t>(1, kChunkFloats / (panel.width * own_.extent));
  panel.other_chunk =
      std::max<int64_t>(1, kChunkFloats / (panel.width * shared_.extent));
  return panel;
}

// Transposes features [first, last). Lanes past the last token are zero.
void GradValues::pack(const Side& side, const Panel& panel, int64_t first, int64_t last,
                      float* tile) const {
  for (int64_t begin = first; begin < last; begin += kPackFeatures) {
    isa_.pack_tokens(side.from + panel.first_token * side.features + begin,
                     side.features, panel.tokens, 0,
                     std::min(kPackFeatures, last - begin),
                     static_cast<int>(panel.width / isa_.lanes),
                     tile + (begin - first) * panel.width);
  }
  for (int64_t feature = 0; feature < last - first; ++feature) {
    std::fill(tile + feature * panel.width + panel.tokens,
              tile + (feature + 1) * panel.width, 0.0f);
  }
}

// Adds the products of the blocks of one group whose other place is in [first, last).
void GradValues::multiply(const Panel& panel, int64_t group, const float* own,
                          int64_t first, int64_t last, Scratch& scratch) const {
  const int64_t r = weight_.block_rows, c = weight_.block_cols;
  scratch.features.clear();
  scratch.dst.clear();
  const int32_t* end = others_ + ptr_[group + 1];
  const int32_t* other =
      std::lower_bound(others_ + ptr_[group], end, static_cast<int32_t>(first));
  for (; other < end && *other < last; ++other) {
    const int64_t i = other - others_;
    const int64_t block = by_column_ ? index_.blocks[at(i)] : i;
    for (int64_t j = 0; j < shared_.extent; ++j) {
      scratch.features.push_back(static_cast<int32_t>(*other * shared_.extent + j));
      scratch.dst.push_back(block * r * c + (by_column_ ? j : j * r));
    }
  }
  SampledProducts products{};
  products.a = own;
  products.rows = own_.extent;
  products.b = panel.shared;
  products.features = scratch.features.data();
  products.dst = scratch.dst.data();
  products.count = static_cast<int64_t>(scratch.features.size());
  products.width = panel.width;
  products.vectors = panel.vectors;
  products.stride = by_column_ ? r : 1;
  products.out = dvalues_;
  isa_.sampled_products(products);
}

void GradValues::multiply_groups(const Panel& panel, int64_t first, int64_t last,
                                 Scratch& scratch) const {
  const int64_t others = shared_.features / shared_.extent;
  for (int64_t chunk = first; chunk < last; chunk += panel.group_chunk) {
    const int64_t end = std::min(last, chunk + panel.group_chunk);
    pack(own_, panel, chunk * own_.extent, end * own_.extent, scratch.own.get());
    for (int64_t other = 0; other < others; other += panel.other_chunk) {
      for (int64_t group = chunk; group < end; ++group) {
        multiply(panel, group,
                 scratch.own.get() + (group - chunk) * own_.extent * panel.width, other,
                 std::min(others, other + panel.other_chunk), scratch);
      }
    }
  }
}

// Groups split so that each thread has the same number of blocks.
std::vector<int64_t> GradValues::split_groups(int threads) const {
  const int64_t groups = own_.features / own_.extent;
  std::vector<int64_t> boundaries{0};
  int64_t group = 0;
  for (int thread = 1; thread < threads; ++thread) {
    while (int64_t{ptr_[group]} * threads < int64_t{ptr_[groups]} * thread) ++group;
    boundaries.push_back(group);
  }
  boundaries.push_back(groups);
  return boundaries;
}

void GradValues::run(int64_t tokens, int threads) {
  const int64_t panels = (tokens + kPanelTokens - 1) / kPanelTokens;
  // Of similar size, and each but the last of whole vectors.
  const int64_t lanes = isa_.lanes;
  const int64_t step = ((tokens + panels - 1) / panels + lanes - 1) / lanes * lanes;
  const Panel largest = panel(0, step);
  const AlignedFloats shared = allocate(shared_.features * largest.width);
  const std::vector<int64_t> boundaries = split_groups(threads);
  std::vector<Scratch> scratch(at(threads));
  for (Scratch& mine : scratch) {
    const int64_t own = std::min(own_.features, largest.group_chunk * own_.extent);
    mine.own = allocate(own * largest.width);
    mine.features.reserve(at(shared_.features));
    mine.dst.reserve(at(shared_.features));
  }
  // Features in steps of whole transposed squares, so that threads share a panel.
  const int64_t steps = (shared_.features + lanes - 1) / lanes;
  for (int64_t first = 0; first < tokens; first += step) {
    Panel now = panel(first, std::min(step, tokens - first));
    now.group_chunk = largest.group_chunk;
    now.shared = shared.get();
    parallel(threads, [&](int thread, int team) {
      const Range range = share(steps, thread, team);
      const int64_t begin = range.first * lanes;
      pack(shared_, now, begin, std::min(shared_.features, range.last * lanes),
           shared.get() + begin * now.width);
    });
    parallel(threads, [&](int thread, int team) {
      const Range range = share(threads, thread, team);
      multiply_groups(now, boundaries[at(range.first)], boundaries[at(range.last)],
                      scratch[at(thread)]);
    });
  }
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
                              int threads) {
  const int64_t count =
      number_of_blocks(weight) * weight.block_rows * weight.block_cols;
  if (count == 0) return;
  std::memset(dvalues, 0, at(count) * sizeof(float));
  if (tokens == 0) return;
  GradValues(weight, index, dy, x, dvalues)
      .run(tokens, useful_threads(weight, tokens, threads));
}

}  // namespace pybsp
