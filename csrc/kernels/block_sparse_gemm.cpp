// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_sparse_gemm.h"

#include <algorithm>
#include <vector>

#include "kernels/int8_weights.h"
#include "kernels/token_lane_schedule.h"
#include "kernels/token_tiles.h"
#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace pybsp {
namespace {

// Multiply-adds of one thread under which another would start later than it finishes.
constexpr int64_t kThreadWork = 250'000;
// A few tokens cost as much as this many: reading the weights takes the time.
constexpr int64_t kReadingTokens = 4;

// Tokens that multiply_few_tokens takes in less time than a vector of tokens takes.
// Wide single-row blocks take each token by itself.
int64_t few_tokens_limit(const Variants& isa, const Product* products, int64_t count) {
  const bool alone =
      std::any_of(products, products + count,
                  [](const Product& product) { return product.schedule->by_column; });
  return std::min(alone ? 2 : 4, isa.lanes / 2);
}

// Fetches into L2 the lines of y that are written after the multiplication: y is large
// and its lines would otherwise be waited for one store after the other.
void prefetch_rows(const float* y, int64_t tokens, int64_t rows, int64_t stride) {
  constexpr int64_t kLine = 16;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; row += kLine) {
      __builtin_prefetch(y + token * stride + row, 0, 2);
    }
  }
}

// A part of a product's schedule.
struct Part {
  const Product* product;
  int64_t index;
  int64_t first_row;  // block rows
  int64_t last_row;
  int64_t cost;
  int64_t cost_before;  // of the parts before it
};

// Where the weights of a part lie among all.
Range values_of(const Part& part) {
  const BlockSparseView& weight = part.product->weight;
  const int64_t size = weight.block_rows * weight.block_cols;
  return {weight.crow_indices[part.first_row] * size,
          weight.crow_indices[part.last_row] * size};
}

// One way to quantise the inputs of a tile: floats [first, end) of all that is
// quantised of it are the scales of the lanes and then the bytes.
struct Int8Inputs {
  bool consecutive;
  float scale;
  int64_t first;
  int64_t end;
};

std::vector<Part> list_parts(const Product* products, int64_t count) {
  std::vector<Part> parts;
  int64_t before = 0;
  for (const Product* product = products; product != products + count; ++product) {
    const Schedule& schedule = *product->schedule;
    const std::vector<int32_t>& rows = schedule.part_rows;
    parts.reserve(parts.size() + schedule.part_costs.size());
    for (size_t p = 0; p + 1 < rows.size(); ++p) {
      const int64_t cost = schedule.part_costs[p];
      parts.push_back(
          {product, static_cast<int64_t>(p), rows[p], rows[p + 1], cost, before});
      before += cost;
    }
  }
  return parts;
}

class Multiplication {
 public:
  Multiplication(const Product* products, int64_t count, int64_t tokens, int threads)
      : products_(products),
        count_(count),
        tokens_(tokens),
        in_(products->weight.in_features),
        isa_(variants(active_isa())) {
    int64_t work = 0;
    for (int64_t i = 0; i < count; ++i) {
      work += kept_weights(products[i].weight) * std::max(tokens, kReadingTokens);
    }
    threads_ = static_cast<int>(
        std::clamp<int64_t>(work / kThreadWork, 1, std::max(threads, 1)));
    find_int8_inputs();
  }

  void run(const float* x);
  void run_tiles(const float* x_tiles);

 private:
  void few_tokens(const float* x, int64_t first_token);
  void in_tiles(const float* x, int64_t tokens);
  void multiply_group(const std::vector<TokenTile>& tiles, Range parts, const float* x,
                      float* x_tiles, int64_t held, float* y_tile, float* int8_tiles,
                      float* wide) const;
  void multiply_tile(const Part& part, const BlockSparseView& weight,
                     const TokenTile& tile, const float* x_tiles,
                     const float* int8_tile, float* scratch) const;
  void multiply(const Part& part, const BlockSparseView& weight, int vectors,
                const float* x_tile, const float* int8_tile, float* y_tile) const;
  BlockSparseView widened(const Part& part, float* wide) const;
  void find_int8_inputs();
  const Int8Inputs* int8_inputs(const Product& product) const;
  int64_t int8_floats() const;
  int64_t token_scales() const { return in_lines(isa_.lanes * isa_.max_vectors); }
  void quantize(const float* x_tile, int vectors, float* int8_tile) const;
  Range parts_of(int64_t team, int64_t teams) const;
  int64_t tiles_in_l2() const;
  int64_t max_part_rows() const;
  int64_t max_wide_values() const;

  const Product* products_;
  int64_t count_;
  int64_t tokens_;
  int64_t in_;
  const Variants& isa_;
  int threads_;
  std::vector<Part> parts_;
  std::vector<Int8Inputs> int8_inputs_;
};

void Multiplication::run(const float* x) {
  const int64_t rest = tokens_ % isa_.lanes;
  const bool few_at_once =
      int8_inputs_.empty() && rest <= few_tokens_limit(isa_, products_, count_);
  const int64_t few = few_at_once ? rest : 0;
  if (tokens_ > few) in_tiles(x, tokens_ - few);
  if (few > 0) few_tokens(x + (tokens_ - few) * in_, tokens_ - few);
}

// Tokens from first_token on; x points at the first of them.
void Multiplication::few_tokens(const float* x, int64_t first_token) {
  const int64_t tokens = tokens_ - first_token;
  for (const Product* product = products_; product != products_ + count_; ++product) {
    const BlockSparseView& weight = product->weight;
    const Epilogue& epilogue = product->epilogue;
    const int64_t grid_rows = weight.out_features / weight.block_rows;
    // Every row costs about one block more: its sum is stored even when it is empty.
    const auto cost = [&](int64_t row) { return weight.crow_indices[row] + row; };
    const auto boundary = [&](int64_t thread, int64_t count) {
      int64_t low = 0, high = grid_rows;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (cost(middle) * count < cost(grid_rows) * thread) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low;
    };
    float* const y = product->y + first_token * weight.out_features;
    // Sums in y would overwrite a residual that is y.
    float* const sums = epilogue.residual == product->y
                            ? scratch_floats(tokens * weight.out_features)
                            : y;
    parallel(threads_, [&](int thread, int count) {
      const int64_t first = boundary(thread, count), last = boundary(thread + 1, count);
      isa_.multiply_few_tokens(weight, first, last, x, tokens, epilogue.bias, sums);
      const int64_t row = first * weight.block_rows;
      const int64_t rows = (last - first) * weight.block_rows;
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t at = token * weight.out_features + row;
        const float* residual = epilogue.residual;
        if (residual) residual += first_token * weight.out_features + at;
        isa_.finish(sums + at, rows, epilogue.activation, residual, y + at);
      }
    });
  }
}

// The first `tokens` tokens, in tiles.
void Multiplication::in_tiles(const float* x, int64_t tokens) {
  parts_ = list_parts(products_, count_);
  const int64_t width = int64_t{isa_.lanes} * isa_.max_vectors;
  const int64_t vectors = (tokens + isa_.lanes - 1) / isa_.lanes;
  const ThreadSplit split = split_threads(vectors, threads_);
  const int64_t most = (vectors + split.groups - 1) / split.groups;
  const int64_t held =
      std::min(tiles_in_l2(), (most + isa_.max_vectors - 1) / isa_.max_vectors);
  const int64_t x_floats = in_lines(held * in_ * width);
  const int64_t y_floats = in_lines(max_part_rows() * width);
  const int64_t before_wide = x_floats + y_floats + held * int8_floats();
  const int64_t floats = before_wide + max_wide_values();
  float* const scratch = scratch_floats(threads_ * floats);
  const auto tiles = split_groups(tokens, split.groups, isa_);
  parallel(threads_, [&](int thread, int count) {
    float* const mine = scratch + thread * floats;
    // The threads asked for need not be those that are given.
    for (int64_t share = thread; share < threads_; share += count) {
      multiply_group(tiles[static_cast<size_t>(share % split.groups)],
                     parts_of(share / split.groups, split.teams), x, mine, held,
                     mine + x_floats, mine + x_floats + y_floats, mine + before_wide);
    }
  });
}

// `parts` for all `tiles`, `held` of them at a time.
void Multiplication::multiply_group(const std::vector<TokenTile>& tiles, Range parts,
                                    const float* x, float* x_tiles, int64_t held,
                                    float* y_tile, float* int8_tiles,
                                    float* wide) const {
  const int64_t all = static_cast<int64_t>(tiles.size());
  for (int64_t begin = 0; begin < all; begin += held) {
    const int64_t end = std::min(all, begin + held);
    const auto x_tile = [&](const TokenTile& tile) {
      return x_tiles + (tile.slot - tiles[static_cast<size_t>(begin)].slot) * in_;
    };
    for (int64_t i = begin; i < end; ++i) {
      const TokenTile& tile = tiles[static_cast<size_t>(i)];
      isa_.pack_tokens(x + tile.first * in_, in_, tile.tokens, 0, in_, tile.vectors,
                       x_tile(tile));
      quantize(x_tile(tile), tile.vectors, int8_tiles + (i - begin) * int8_floats());
    }
    for (int64_t p = parts.first; p < parts.last; ++p) {
      const Part& part = parts_[static_cast<size_t>(p)];
      const BlockSparseView weight = widened(part, wide);
      const Epilogue& epilogue = part.product->epilogue;
      const int64_t row = part.first_row * weight.block_rows;
      const int64_t rows = (part.last_row - part.first_row) * weight.block_rows;
      for (int64_t i = begin; i < end; ++i) {
        const TokenTile& tile = tiles[static_cast<size_t>(i)];
        const int64_t at = tile.first * weight.out_features + row;
        prefetch_rows(part.product->y + at, tile.tokens, rows, weight.out_features);
        multiply(part, weight, tile.vectors, x_tile(tile),
                 int8_tiles + (i - begin) * int8_floats(), y_tile);
        isa_.unpack_tokens(y_tile, rows, tile.tokens, tile.vectors, epilogue.activation,
                           epilogue.residual ? epilogue.residual + at : nullptr,
                           part.product->y + at, weight.out_features);
      }
    }
  }
}

void Multiplication::run_tiles(const float* x_tiles) {
  parts_ = list_parts(products_, count_);
  const std::vector<TokenTile> tiles = split_tokens(tokens_, isa_);
  const ThreadSplit split =
      split_threads(2 * static_cast<int64_t>(tiles.size()), threads_);
  const int64_t held = tiles_in_l2();
  const int64_t part_floats = in_lines(max_part_rows() * isa_.lanes * isa_.max_vectors);
  const int64_t before_wide = part_floats + held * int8_floats();
  const int64_t floats = before_wide + max_wide_values();
  float* const scratch = scratch_floats(threads_ * floats);
  parallel(threads_, [&](int thread, int count) {
    for (int64_t share = thread; share < threads_; share += count) {
      const Range mine = pybsp::share(static_cast<int64_t>(tiles.size()),
                                      static_cast<int>(share % split.groups),
                                      static_cast<int>(split.groups));
      const Range parts = parts_of(share / split.groups, split.teams);
      float* const sums = scratch + thread * floats;
      float* const int8_tiles = sums + part_floats;
      for (int64_t begin = mine.first; begin < mine.last; begin += held) {
        const TokenTile* const group = tiles.data() + begin;
        const TokenTile* const end = tiles.data() + std::min(mine.last, begin + held);
        for (const TokenTile* tile = group; tile != end; ++tile) {
          quantize(x_tiles + tile->slot * in_, tile->vectors,
                   int8_tiles + (tile - group) * int8_floats());
        }
        for (int64_t p = parts.first; p < parts.last; ++p) {
          const Part& part = parts_[static_cast<size_t>(p)];
          const BlockSparseView weight = widened(part, sums + before_wide);
          for (const TokenTile* tile = group; tile != end; ++tile) {
            multiply_tile(part, weight, *tile, x_tiles,
                          int8_tiles + (tile - group) * int8_floats(), sums);
          }
        }
      }
    }
  });
}

// One part for one tile, from tiles to tiles. `scratch` is for sums that would
// overwrite a residual that is y itself.
void Multiplication::multiply_tile(const Part& part, const BlockSparseView& weight,
                                   const TokenTile& tile, const float* x_tiles,
                                   const float* int8_tile, float* scratch) const {
  const Epilogue& epilogue = part.product->epilogue;
  const int64_t width = int64_t{tile.vectors} * isa_.lanes;
  const int64_t row = part.first_row * weight.block_rows;
  const int64_t rows = (part.last_row - part.first_row) * weight.block_rows;
  const int64_t at = tile.slot * weight.out_features + row * width;
  float* const y = part.product->y + at;
  float* const sums = epilogue.residual == part.product->y ? scratch : y;
  multiply(part, weight, tile.vectors, x_tiles + tile.slot * in_, int8_tile, sums);
  isa_.finish(sums, rows * width, epilogue.activation,
              epilogue.residual ? epilogue.residual + at : nullptr, y);
}

// The parts in whose middle the share of the cost of this team lies.
Range Multiplication::parts_of(int64_t team, int64_t teams) const {
  const int64_t total = parts_.back().cost_before + parts_.back().cost;
  const auto owner = [&](const Part& part) {
    return (2 * part.cost_before + part.cost) * teams / (2 * total);
  };
  Range range{0, 0};
  for (const Part& part : parts_) {
    range.first += owner(part) < team;
    range.last += owner(part) <= team;
  }
  return range;
}

// Tiles of inputs that share L2 with the part of the weights that passes over them.
int64_t Multiplication::tiles_in_l2() const {
  const int64_t tile_bytes =
      in_ * isa_.lanes * isa_.max_vectors * int64_t{sizeof(float)};
  return std::max<int64_t>(1, l2_cache_bytes() / 3 / tile_bytes);
}

int64_t Multiplication::max_part_rows() const {
  int64_t rows = 0;
  for (const Part& part : parts_) {
    rows = std::max(rows,
                    (part.last_row - part.first_row) * part.product->weight.block_rows);
  }
  return rows;
}

int64_t Multiplication::max_wide_values() const {
  int64_t most = 0;
  for (const Part& part : parts_) {
    if (part.product->weight.bfloat16)
      most = std::max(most, values_of(part).last - values_of(part).first);
  }
  return in_lines(most);
}

// The weight of a part as the kernels of whole tiles read it: bfloat16 values are
// widened, for all tiles that the part is multiplied with, into `wide`.
BlockSparseView Multiplication::widened(const Part& part, float* wide) const {
  BlockSparseView weight = part.product->weight;
  if (!weight.bfloat16) return weight;
  const Range values = values_of(part);
  isa_.widen(weight.bfloat16 + values.first, values.last - values.first, wide);
  // Blocks are found from where those of the whole matrix would begin. Meanwhile the
  // next part is fetched, which else would be waited for when it is widened.
  const auto at = reinterpret_cast<intptr_t>(wide);
  weight.values = reinterpret_cast<const float*>(
      at - values.first * static_cast<intptr_t>(sizeof(float)));
  weight.fetch_ahead = reinterpret_cast<intptr_t>(weight.bfloat16 + values.last) - at;
  return weight;
}

// The products of 8 bits among all share what they quantise alike.
void Multiplication::find_int8_inputs() {
  for (const Product* product = products_; product != products_ + count_; ++product) {
    if (!product->int8) continue;
    // Threads must not be the first to ask for it: memory can run out.
    product->int8->view(isa_.int8->order);
    if (int8_inputs(*product)) continue;
    const bool consecutive = product->int8->consecutive();
    const int64_t bytes =
        int8_tile_bytes(in_, isa_.lanes, isa_.max_vectors, consecutive);
    const int64_t first = int8_floats();
    int8_inputs_.push_back({consecutive, product->input_scale, first,
                            first + token_scales() + in_lines((bytes + 3) / 4)});
  }
}

const Int8Inputs* Multiplication::int8_inputs(const Product& product) const {
  const auto found = std::find_if(
      int8_inputs_.begin(), int8_inputs_.end(), [&](const Int8Inputs& inputs) {
        return inputs.consecutive == product.int8->consecutive() &&
               inputs.scale == product.input_scale;
      });
  return found == int8_inputs_.end() ? nullptr : &*found;
}

// Floats of the quantised inputs of a tile.
int64_t Multiplication::int8_floats() const {
  return int8_inputs_.empty() ? 0 : int8_inputs_.back().end;
}

void Multiplication::quantize(const float* x_tile, int vectors,
                              float* int8_tile) const {
  for (const Int8Inputs& inputs : int8_inputs_) {
    float* const scales = int8_tile + inputs.first;
    isa_.int8->quantize(x_tile, in_, vectors, inputs.scale, inputs.consecutive,
                        reinterpret_cast<int8_t*>(scales + token_scales()), scales);
  }
}

void Multiplication::multiply(const Part& part, const BlockSparseView& weight,
                              int vectors, const float* x_tile, const float* int8_tile,
                              float* y_tile) const {
  const Product& product = *part.product;
  const Schedule& schedule = *product.schedule;
  if (product.int8) {
    const size_t p = static_cast<size_t>(part.index);
    const float* const scales = int8_tile + int8_inputs(product)->first;
    const int64_t height = product.weight.block_rows;
    isa_.int8->multiply({product.int8->view(isa_.int8->order), schedule.part_tiles[p],
                         schedule.part_tiles[p + 1], part.first_row * height,
                         part.last_row * height, vectors,
                         reinterpret_cast<const int8_t*>(scales + token_scales()),
                         scales, product.epilogue.bias, y_tile});
  } else if (schedule.by_column) {
    const size_t p = static_cast<size_t>(part.index);
    const ColumnTiles tiles{part.first_row,           part.last_row,
                            schedule.part_tiles[p],   schedule.part_tiles[p + 1],
                            schedule.tile_ptr.data(), schedule.blocks.data(),
                            schedule.rows.data()};
    isa_.multiply_columns(weight, tiles, x_tile, vectors, product.epilogue.bias,
                          y_tile);
  } else {
    isa_.multiply_rows(weight, part.first_row, part.last_row, x_tile, vectors,
                       product.epilogue.bias, y_tile);
  }
}

}  // namespace

void block_sparse_gemm(const Product* products, int64_t count, const float* x,
                       int64_t tokens, int threads) {
  if (tokens == 0 || count == 0) return;
  Multiplication(products, count, tokens, threads).run(x);
}

void block_sparse_gemm_tiles(const Product* products, int64_t count,
                             const float* x_tiles, int64_t tokens, int threads) {
  if (tokens == 0 || count == 0) return;
  Multiplication(products, count, tokens, threads).run_tiles(x_tiles);
}

}  // namespace pybsp
