// SPDX-License-Identifier: Apache-2.0
#include "kernels/int8_weights.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "kernels/variants.h"
#include "runtime/isa.h"

namespace pybsp {
namespace {

constexpr int64_t kTileRows = 8;
constexpr int64_t kQuad = 4;
// Outputs from which on an instruction for 16 of them is faster than vectors: those
// bring any eight inputs together without a way through memory.
constexpr int64_t kHigh = 16;
constexpr int64_t kHighConsecutive = 8;
constexpr std::align_val_t kLine{64};

int64_t blocks_of(const BlockSparseView& pattern, int64_t row) {
  return pattern.crow_indices[row + 1] - pattern.crow_indices[row];
}

const int32_t* columns_of(const BlockSparseView& pattern, int64_t row) {
  return pattern.col_indices + pattern.crow_indices[row];
}

bool same_columns(const BlockSparseView& pattern, int64_t a, int64_t b) {
  const int32_t* columns = columns_of(pattern, a);
  return blocks_of(pattern, a) == blocks_of(pattern, b) &&
         std::equal(columns, columns + blocks_of(pattern, a), columns_of(pattern, b));
}

}  // namespace

Int8Weights::Int8Weights(const BlockSparseView& pattern, const int8_t* q,
                         const float* scales)
    : consecutive_(pattern.block_cols % kQuad == 0),
      schedule_(int8_schedule(pattern)),
      scales_(scales, scales + pattern.out_features),
      offsets_(static_cast<size_t>(pattern.out_features), 0),
      order_(variants(active_isa()).int8->order) {
  schedule_.by_column ? pack_columns(pattern, q) : pack_rows(pattern, q);
}

void Int8Weights::pack_rows(const BlockSparseView& pattern, const int8_t* q) {
  schedule_.part_tiles.push_back(0);
  for (int64_t part = 0; part < schedule_.num_parts(); ++part) {
    append_tiles(pattern, schedule_.part_rows[static_cast<size_t>(part)],
                 schedule_.part_rows[static_cast<size_t>(part) + 1]);
    schedule_.part_tiles.push_back(static_cast<int32_t>(tiles_.size()));
  }
  weights_ = zeros(order_);
  const int64_t r = pattern.block_rows, c = pattern.block_cols;
  for (const Int8Tile& tile : tiles_) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t out = tile.row + row;
      const int64_t first = pattern.crow_indices[out / r];
      const int64_t kept = blocks_of(pattern, out / r) * c;
      int32_t sum = 0;
      for (int64_t i = 0; i < kept; ++i) {
        const int8_t weight = q[(first * c + i) * r + out % r];
        weights_[begin(tile, order_, row, i / kQuad) + i % kQuad] = weight;
        sum += weight;
      }
      offsets_[static_cast<size_t>(out)] = -128 * sum;
    }
  }
}

void Int8Weights::pack_columns(const BlockSparseView& pattern, const int8_t* q) {
  const int64_t c = pattern.block_cols;
  for (size_t tile = 0; tile + 1 < schedule_.tile_ptr.size(); ++tile) {
    const int32_t first = schedule_.tile_ptr[tile];
    const int32_t block = schedule_.blocks[static_cast<size_t>(first)];
    tiles_.push_back({first, schedule_.tile_ptr[tile + 1] - first,
                      static_cast<int32_t>(c / kQuad), static_cast<int32_t>(tile),
                      false, size(Int8Order::by_quad), size(Int8Order::high_by_row)});
    columns_.push_back(static_cast<uint16_t>(pattern.col_indices[block] * c / kQuad));
  }
  weights_ = zeros(order_);
  for (const Int8Tile& tile : tiles_) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const auto slot = static_cast<size_t>(tile.row + i);
      const int8_t* const block = q + schedule_.blocks[slot] * c;
      int32_t sum = 0;
      for (int64_t k = 0; k < c; ++k) {
        weights_[begin(tile, order_, i, k / kQuad) + k % kQuad] = block[k];
        sum += block[k];
      }
      offsets_[static_cast<size_t>(schedule_.rows[slot])] -= 128 * sum;
    }
  }
  schedule_.tile_ptr = {};  // the tiles say it all
  schedule_.blocks = {};
}

// The tiles of block rows [first, last). Low blocks with the same inputs, such as the
// rows of a dense layer, are a tile together.
void Int8Weights::append_tiles(const BlockSparseView& pattern, int64_t first,
                               int64_t last) {
  const int64_t r = pattern.block_rows;
  for (int64_t row = first; row < last;) {
    int64_t end = row + 1;
    while (end < last && (end + 1 - row) * r <= kTileRows &&
           same_columns(pattern, row, end)) {
      ++end;
    }
    const auto first_quad = static_cast<int32_t>(static_cast<int64_t>(columns_.size()) /
                                                 (consecutive_ ? 1 : kQuad));
    append_columns(pattern, row);
    const int64_t quads =
        (blocks_of(pattern, row) * pattern.block_cols + kQuad - 1) / kQuad;
    for (int64_t sub = row * r; sub < end * r; sub += kTileRows) {
      const int64_t height = (end - row) * r;
      tiles_.push_back({static_cast<int32_t>(sub),
                        static_cast<int32_t>(std::min(kTileRows, end * r - sub)),
                        static_cast<int32_t>(quads), first_quad,
                        height >= (consecutive_ ? kHighConsecutive : kHigh),
                        size(Int8Order::by_quad), size(Int8Order::high_by_row)});
    }
    row = end;
  }
}

void Int8Weights::append_columns(const BlockSparseView& pattern, int64_t row) {
  const int64_t c = pattern.block_cols, kept = blocks_of(pattern, row) * c;
  const auto feature = [&](int64_t i) {
    return columns_of(pattern, row)[i / c] * c + i % c;
  };
  for (int64_t i = 0; i < kept; i += kQuad) {
    if (consecutive_) {
      columns_.push_back(static_cast<uint16_t>(feature(i) / kQuad));
      continue;
    }
    for (int64_t k = i; k < i + kQuad; ++k) {
      columns_.push_back(static_cast<uint16_t>(feature(std::min(k, kept - 1))));
    }
  }
}

int64_t Int8Weights::begin(const Int8Tile& tile, Int8Order order, int64_t row,
                           int64_t quad) {
  const bool by_quad = order == Int8Order::by_quad;
  if (tile.high && !by_quad) {
    return tile.high_by_row + row * tile.stride() + quad * kQuad;
  }
  return (by_quad ? tile.by_quad : tile.high_by_row) + (quad * tile.rows + row) * kQuad;
}

int64_t Int8Weights::size(Int8Order order) const {
  if (tiles_.empty()) return 0;
  const Int8Tile& last = tiles_.back();
  const int64_t end = last.high && order == Int8Order::high_by_row
                          ? begin(last, order, last.rows, 0)
                          : begin(last, order, 0, last.quads);
  return (end + 63) / 64 * 64;
}

void Int8Weights::Free::operator()(int8_t* p) const { operator delete[](p, kLine); }

Int8Weights::Bytes Int8Weights::zeros(Int8Order order) const {
  const auto count = static_cast<size_t>(size(order));
  Bytes bytes(static_cast<int8_t*>(operator new[](count, kLine)));
  std::memset(bytes.get(), 0, count);
  return bytes;
}

Int8Order Int8Weights::other_order() const {
  return order_ == Int8Order::by_quad ? Int8Order::high_by_row : Int8Order::by_quad;
}

Int8View Int8Weights::view(Int8Order order) const {
  const int8_t* weights = weights_.get();
  if (order != order_ && !schedule_.by_column) {
    std::call_once(other_once_, [&] {
      other_ = zeros(order);
      for (const Int8Tile& tile : tiles_) {
        for (int64_t row = 0; row < tile.rows; ++row) {
          for (int64_t quad = 0; quad < tile.quads; ++quad) {
            std::memcpy(&other_[begin(tile, order, row, quad)],
                        &weights_[begin(tile, order_, row, quad)], kQuad);
          }
        }
      }
    });
    weights = other_.get();
  }
  return {consecutive_,    schedule_.by_column,   tiles_.data(),
          columns_.data(), schedule_.rows.data(), weights,
          scales_.data(),  offsets_.data()};
}

int64_t Int8Weights::bytes() const {
  return size(order_) + (other_ ? size(other_order()) : 0) +
         static_cast<int64_t>(
             tiles_.size() * sizeof(Int8Tile) + columns_.size() * sizeof(uint16_t) +
             schedule_.rows.size() * sizeof(int32_t) + scales_.size() * sizeof(float) +
             offsets_.size() * sizeof(int32_t));
}

}  // namespace pybsp
