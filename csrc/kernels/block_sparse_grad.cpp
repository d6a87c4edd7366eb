// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_sparse_grad.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/threads.h"

namespace pybsp {
namespace {

// dy transposed at a time for dx, in floats: 2 MB, as the forward product does.
constexpr int64_t kGroupFloats = 512 * 1024;
// Tokens of a panel for dW: eight rows of dy and three columns of x, 33 KB of it, stay
// in L1 while their products are summed, and the sum over lanes at the end costs
// little.
constexpr int64_t kPanelTokens = 752;
// Of the features of a panel those that many block rows share stay in L2: 1.2 MB.
constexpr int64_t kSharedFloats = 384 * kPanelTokens;
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
      : weight_(weight),
        index_(index),
        isa_(variants(active_isa())),
        transposed_{
            weight.in_features,    weight.out_features, 1, weight.block_rows, nullptr,
            index.run_rows.data(), weight.values} {}

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
  // W^T in blocks (1, r), for the kernel by column: crow_indices is not read.
  const BlockSparseView transposed_;
};

int64_t GradX::part_cost(int64_t part) const {
  const int64_t blocks = index_.ccol_indices[at(index_.part_cols[at(part + 1)])] -
                         index_.ccol_indices[at(index_.part_cols[at(part)])];
  // Storing and transposing a feature costs about eight multiply-adds.
  return blocks * weight_.block_rows * weight_.block_cols + part_features(part) * 8;
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
  const ColumnTiles tiles{first * weight_.block_cols,  last * weight_.block_cols,
                          index_.part_tiles[at(part)], index_.part_tiles[at(part + 1)],
                          index_.tile_ptr.data(),      index_.runs.data(),
                          index_.run_features.data()};
  isa_.multiply_columns(transposed_, tiles, dy_tile, vectors, nullptr, dx_tile);
}

void GradX::run(const float* dy, int64_t tokens, float* dx, int threads) {
  const int64_t out = weight_.out_features, in = weight_.in_features;
  const int64_t width = isa_.lanes * isa_.max_vectors;
  const int64_t tiles = (tokens + width - 1) / width;
  const int64_t held = std::clamp<int64_t>(kGroupFloats / (out * width),
                                           std::min<int64_t>(threads, tiles), tiles);
  int64_t most = 0, total = 0;
  for (int64_t part = 0; part < index_.num_parts(); ++part) {
    most = std::max(most, part_features(part));
    total += part_cost(part);
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
        const int64_t cost = part_cost(part);
        const int64_t feature = index_.part_cols[at(part)] * weight_.block_cols;
        for (int64_t tile = 0; tile < count; ++tile, before += cost) {
          if ((2 * before + cost) * team / (2 * total * count) != thread) continue;
          multiply(part, dy_tiles.get() + tile * out * width, vectors_of(tile),
                   dx_tile);
          isa_.unpack_tokens(dx_tile, part_features(part), tokens_of(tile),
                             vectors_of(tile), Activation::none,
                             dx + (first + tile) * width * in + feature, in);
        }
      }
    });
  }
}

// ---- dW

// One of the two inputs, transposed to [feature][width] for a panel of tokens.
struct Panel {
  const float* from;
  int64_t features;
  AlignedFloats tiles;
};

class GradValues {
 public:
  GradValues(const BlockSparseView& weight, const TransposedIndex& index,
             float* dvalues)
      : weight_(weight),
        index_(index),
        isa_(variants(active_isa())),
        // Products are sums over tokens for up to eight consecutive features of one
        // input: the r rows of a block, or the c columns of one that is flat.
        by_column_(weight.block_rows < 4 && weight.block_cols > weight.block_rows),
        dvalues_(dvalues) {}

  void run(const float* dy, const float* x, int64_t tokens, int threads);

 private:
  struct Scratch {
    std::vector<int32_t> features;
    std::vector<int64_t> dst;
  };

  int64_t width(int64_t tokens) const {
    // An odd number of vectors: with a power of two all features would meet in one set
    // of L1.
    return (((tokens + isa_.lanes - 1) / isa_.lanes) | 1) * isa_.lanes;
  }
  void pack(Panel& panel, int64_t first, int64_t tokens, int thread, int team) const;
  void multiply(int64_t group, int64_t first, int64_t last, int64_t tokens,
                const Panel& own, const Panel& shared, Scratch& scratch) const;
  std::vector<int64_t> split_groups(int threads) const;

  const BlockSparseView& weight_;
  const TransposedIndex& index_;
  const Variants& isa_;
  const bool by_column_;
  float* dvalues_;
};

// Transposes a thread's share of the features. Lanes past the last token are zero.
void GradValues::pack(Panel& panel, int64_t first, int64_t tokens, int thread,
                      int team) const {
  const int64_t steps = (panel.features + isa_.lanes - 1) / isa_.lanes;
  const Range range = share(steps, thread, team);
  const int64_t begin = range.first * isa_.lanes;
  const int64_t end = std::min(panel.features, range.last * isa_.lanes);
  const int64_t stride = width(tokens);
  isa_.pack_tokens(panel.from + first * panel.features, panel.features, tokens, begin,
                   end, static_cast<int>(stride / isa_.lanes), panel.tiles.get());
  for (int64_t feature = begin; feature < end; ++feature) {
    std::fill(panel.tiles.get() + feature * stride + tokens,
              panel.tiles.get() + (feature + 1) * stride, 0.0f);
  }
}

// Adds the products of the blocks of one block row (column) that lie in the shared
// features [first, last) of block columns (rows).
void GradValues::multiply(int64_t group, int64_t first, int64_t last, int64_t tokens,
                          const Panel& own, const Panel& shared,
                          Scratch& scratch) const {
  const int64_t r = weight_.block_rows, c = weight_.block_cols;
  const int32_t* ptr = by_column_ ? index_.ccol_indices.data() : weight_.crow_indices;
  const int32_t* others = by_column_ ? index_.row_indices.data() : weight_.col_indices;
  const int64_t extent = by_column_ ? r : c;
  scratch.features.clear();
  scratch.dst.clear();
  const int32_t* begin = std::lower_bound(others + ptr[group], others + ptr[group + 1],
                                          static_cast<int32_t>(first));
  for (const int32_t* other = begin; other < others + ptr[group + 1]; ++other) {
    if (*other >= last) break;
    const int64_t i = other - others;
    const int64_t block = by_column_ ? index_.blocks[at(i)] : i;
    for (int64_t j = 0; j < extent; ++j) {
      scratch.features.push_back(static_cast<int32_t>(*other * extent + j));
      scratch.dst.push_back(block * r * c + (by_column_ ? j : j * r));
    }
  }
  if (scratch.features.empty()) return;
  SampledProducts products{};
  products.width = width(tokens);
  products.vectors = (tokens + isa_.lanes - 1) / isa_.lanes;
  products.rows = by_column_ ? c : r;
  products.stride = by_column_ ? r : 1;
  products.a = own.tiles.get() + group * products.rows * products.width;
  products.b = shared.tiles.get();
  products.features = scratch.features.data();
  products.dst = scratch.dst.data();
  products.count = static_cast<int64_t>(scratch.features.size());
  products.out = dvalues_;
  isa_.sampled_products(products);
}

// Block rows (columns) split so that each thread has the same number of blocks.
std::vector<int64_t> GradValues::split_groups(int threads) const {
  const int32_t* ptr = by_column_ ? index_.ccol_indices.data() : weight_.crow_indices;
  const int64_t groups = by_column_ ? weight_.in_features / weight_.block_cols
                                    : weight_.out_features / weight_.block_rows;
  std::vector<int64_t> boundaries{0};
  int64_t group = 0;
  for (int thread = 1; thread < threads; ++thread) {
    while (group < groups &&
           int64_t{ptr[group]} * threads < int64_t{ptr[groups]} * thread)
      ++group;
    boundaries.push_back(group);
  }
  boundaries.push_back(groups);
  return boundaries;
}

void GradValues::run(const float* dy, const float* x, int64_t tokens, int threads) {
  Panel own{by_column_ ? x : dy,
            by_column_ ? weight_.in_features : weight_.out_features, nullptr};
  Panel shared{by_column_ ? dy : x,
               by_column_ ? weight_.out_features : weight_.in_features, nullptr};
  const int64_t panels = (tokens + kPanelTokens - 1) / kPanelTokens;
  // Panels of similar size, each but the last of whole vectors.
  const int64_t lanes = isa_.lanes;
  const int64_t step = ((tokens + panels - 1) / panels + lanes - 1) / lanes * lanes;
  own.tiles = allocate(own.features * width(step));
  shared.tiles = allocate(shared.features * width(step));
  const int64_t extent = by_column_ ? weight_.block_rows : weight_.block_cols;
  const int64_t others = shared.features / extent;
  const int64_t chunk = std::max<int64_t>(1, kSharedFloats / (width(step) * extent));
  const std::vector<int64_t> boundaries = split_groups(threads);
  // Reserved here: nothing may throw in a parallel region.
  std::vector<Scratch> scratch(at(threads));
  for (Scratch& mine : scratch) {
    mine.features.reserve(at(std::min(others, chunk) * extent));
    mine.dst.reserve(at(std::min(others, chunk) * extent));
  }
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t count = std::min(step, tokens - first);
    parallel(threads, [&](int thread, int team) {
      pack(own, first, count, thread, team);
      pack(shared, first, count, thread, team);
    });
    parallel(threads, [&](int thread, int team) {
      const Range range = share(threads, thread, team);
      for (int64_t other = 0; other < others; other += chunk) {
        for (int64_t group = boundaries[at(range.first)];
             group < boundaries[at(range.last)]; ++group) {
          multiply(group, other, std::min(others, other + chunk), count, own, shared,
                   scratch[at(thread)]);
        }
      }
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
  GradValues(weight, index, dvalues)
      .run(dy, x, tokens, useful_threads(weight, tokens, threads));
}

}  // namespace pybsp
