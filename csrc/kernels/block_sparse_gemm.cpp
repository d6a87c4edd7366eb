// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_sparse_gemm.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "kernels/token_lane_schedule.h"
#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/threads.h"

namespace pybsp {
namespace {

// Inputs transposed at a time, in floats: 2 MB, several tiles, so that a part of the
// weights is reused from L2 by each of them.
constexpr int64_t kGroupFloats = 512 * 1024;
// Multiply-adds under which a second thread would start later than one finishes.
constexpr int64_t kSerialWork = 500'000;

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats allocate(int64_t count) {
  const size_t bytes =
      static_cast<size_t>(std::max<int64_t>(count, 16)) * sizeof(float);
  return AlignedFloats(
      static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
}

struct TokenTile {
  int64_t first;
  int64_t tokens;
  int vectors;
};

// Tiles of three vectors, ending in one or two of two vectors rather than in a single
// vector, whose few accumulators wait for their own latency.
std::vector<TokenTile> split_tokens(int64_t tokens, const Variants& isa) {
  std::vector<TokenTile> tiles;
  int64_t first = 0;
  while (first < tokens) {
    const int64_t vectors = (tokens - first + isa.lanes - 1) / isa.lanes;
    int width = static_cast<int>(std::min<int64_t>(vectors, isa.max_vectors));
    if (vectors == 4) width = 2;
    const int64_t count = std::min<int64_t>(int64_t{width} * isa.lanes, tokens - first);
    tiles.push_back({first, count, width});
    first += count;
  }
  return tiles;
}

// Block rows split so that each thread has the same number of blocks.
std::vector<int64_t> split_block_rows(const BlockSparseView& weight, int threads) {
  const int64_t grid_rows = weight.out_features / weight.block_rows;
  // Every row costs about one block more: its sum is stored even when it is empty.
  auto cost = [&](int64_t row) { return weight.crow_indices[row] + row; };
  std::vector<int64_t> boundaries{0};
  int64_t row = 0;
  for (int thread = 1; thread < threads; ++thread) {
    while (row < grid_rows && cost(row) * threads < cost(grid_rows) * thread) ++row;
    boundaries.push_back(row);
  }
  boundaries.push_back(grid_rows);
  return boundaries;
}

class Multiplication {
 public:
  Multiplication(const BlockSparseView& weight, const Schedule& schedule,
                 const float* bias, Activation activation)
      : weight_(weight),
        schedule_(schedule),
        bias_(bias),
        activation_(activation),
        isa_(variants(active_isa())) {}

  void run(const float* x, int64_t tokens, float* y, int threads);

 private:
  void few_tokens(const float* x, int64_t tokens, float* y, int threads);
  void group(const TokenTile* tiles, int64_t num_tiles, const float* x, float* y,
             float* x_tiles, float* y_tiles, int threads);
  void multiply(int64_t part, const TokenTile& tile, const float* x_tile, float* y_tile,
                float* y) const;
  int64_t part_cost(int64_t part) const;
  int64_t max_part_rows() const;

  const BlockSparseView& weight_;
  const Schedule& schedule_;
  const float* bias_;
  Activation activation_;
  const Variants& isa_;
};

int64_t Multiplication::part_cost(int64_t part) const {
  const size_t p = static_cast<size_t>(part);
  const int64_t first = schedule_.part_rows[p], last = schedule_.part_rows[p + 1];
  const int64_t blocks = weight_.crow_indices[last] - weight_.crow_indices[first];
  // Storing and transposing an output costs about eight multiply-adds.
  return (blocks * weight_.block_cols + (last - first) * 8) * weight_.block_rows;
}

int64_t Multiplication::max_part_rows() const {
  int64_t rows = 0;
  for (size_t p = 0; p + 1 < schedule_.part_rows.size(); ++p) {
    rows = std::max<int64_t>(rows, schedule_.part_rows[p + 1] - schedule_.part_rows[p]);
  }
  return rows * weight_.block_rows;
}

void Multiplication::multiply(int64_t part, const TokenTile& tile, const float* x_tile,
                              float* y_tile, float* y) const {
  const size_t p = static_cast<size_t>(part);
  const int64_t first = schedule_.part_rows[p], last = schedule_.part_rows[p + 1];
  if (schedule_.by_column) {
    const ColumnTiles tiles{first,
                            last,
                            schedule_.part_tiles[p],
                            schedule_.part_tiles[p + 1],
                            schedule_.tile_ptr.data(),
                            schedule_.blocks.data(),
                            schedule_.rows.data()};
    isa_.multiply_columns(weight_, tiles, x_tile, tile.vectors, bias_, y_tile);
  } else {
    isa_.multiply_rows(weight_, first, last, x_tile, tile.vectors, bias_, y_tile);
  }
  const int64_t row = first * weight_.block_rows;
  isa_.unpack_tokens(y_tile, (last - first) * weight_.block_rows, tile.tokens,
                     tile.vectors, activation_,
                     y + tile.first * weight_.out_features + row, weight_.out_features);
}

void Multiplication::group(const TokenTile* tiles, int64_t num_tiles, const float* x,
                           float* y, float* x_tiles, float* y_tiles, int threads) {
  const int64_t in = weight_.in_features;
  const int64_t tile_floats = in * isa_.lanes * isa_.max_vectors;
  const int64_t y_floats = max_part_rows() * isa_.lanes * isa_.max_vectors;
  // Features in steps of whole transposed squares, so that threads share a tile.
  const int64_t steps = (in + isa_.lanes - 1) / isa_.lanes;
  parallel(threads, [&](int thread, int count) {
    const Range range = share(num_tiles * steps, thread, count);
    for (int64_t i = range.first; i < range.last;) {
      const int64_t tile = i / steps;
      const int64_t end = std::min(range.last, (tile + 1) * steps);
      isa_.pack_tokens(x + tiles[tile].first * in, in, tiles[tile].tokens,
                       (i - tile * steps) * isa_.lanes,
                       std::min(in, (end - tile * steps) * isa_.lanes),
                       tiles[tile].vectors, x_tiles + tile * tile_floats);
      i = end;
    }
  });
  int64_t total = 0;
  for (int64_t part = 0; part < schedule_.num_parts(); ++part) total += part_cost(part);
  parallel(threads, [&](int thread, int count) {
    // Every (part, tile) goes to the thread in whose share of the cost its middle lies.
    int64_t before = 0;
    for (int64_t part = 0; part < schedule_.num_parts(); ++part) {
      const int64_t cost = part_cost(part);
      for (int64_t tile = 0; tile < num_tiles; ++tile, before += cost) {
        if ((2 * before + cost) * count / (2 * total * num_tiles) != thread) continue;
        multiply(part, tiles[tile], x_tiles + tile * tile_floats,
                 y_tiles + thread * y_floats, y);
      }
    }
  });
}

void Multiplication::few_tokens(const float* x, int64_t tokens, float* y, int threads) {
  const std::vector<int64_t> boundaries = split_block_rows(weight_, threads);
  parallel(threads, [&](int thread, int count) {
    const Range range = share(threads, thread, count);
    isa_.multiply_few_tokens(weight_, boundaries[static_cast<size_t>(range.first)],
                             boundaries[static_cast<size_t>(range.last)], x, tokens,
                             bias_, activation_, y);
  });
}

void Multiplication::run(const float* x, int64_t tokens, float* y, int threads) {
  const int64_t grid_rows = weight_.out_features / weight_.block_rows;
  const int64_t work = weight_.crow_indices[grid_rows] * weight_.block_rows *
                       weight_.block_cols * tokens;
  if (work < kSerialWork) threads = 1;
  if (tokens < isa_.lanes / 2 + 1) {
    few_tokens(x, tokens, y, threads);
    return;
  }
  const std::vector<TokenTile> tiles = split_tokens(tokens, isa_);
  const int64_t width = isa_.lanes * isa_.max_vectors;
  const int64_t tile_floats = weight_.in_features * width;
  const int64_t group_tiles = std::clamp<int64_t>(
      kGroupFloats / tile_floats, threads,
      std::max<int64_t>(threads, static_cast<int64_t>(tiles.size())));
  const int64_t held =
      std::min<int64_t>(group_tiles, static_cast<int64_t>(tiles.size()));
  const AlignedFloats x_tiles = allocate(held * tile_floats);
  const AlignedFloats y_tiles = allocate(threads * max_part_rows() * width);
  for (size_t first = 0; first < tiles.size(); first += static_cast<size_t>(held)) {
    const int64_t count =
        std::min<int64_t>(held, static_cast<int64_t>(tiles.size() - first));
    group(tiles.data() + first, count, x, y, x_tiles.get(), y_tiles.get(), threads);
  }
}

}  // namespace

void block_sparse_gemm(const BlockSparseView& weight, const Schedule& schedule,
                       const float* x, int64_t tokens, const float* bias,
                       Activation activation, float* y, int threads) {
  if (tokens == 0 || weight.out_features == 0) return;
  Multiplication(weight, schedule, bias, activation)
      .run(x, tokens, y, std::max(threads, 1));
}

}  // namespace pybsp
