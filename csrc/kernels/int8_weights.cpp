// SPDX-License-Identifier: Apache-2.0
#include "kernels/int8_weights.h"

#include <algorithm>

namespace pybsp {
namespace {

constexpr int64_t kTileRows = 8;
constexpr int64_t kQuad = 4;

// The columns of a pattern, in quads, and its weights in their order.
class Packing {
 public:
  Packing(const BlockSparseView& view, const int8_t* q, Int8Weights& packed)
      : view_(view), q_(q), packed_(packed) {}

  // The tiles of block rows [first, last).
  void append(int64_t first, int64_t last) {
    const int64_t r = view_.block_rows;
    for (int64_t row = first; row < last;) {
      int64_t end = row + 1;
      // Low blocks: rows with the same inputs, such as those of a dense layer, are a
      // tile together.
      while (end < last && (end + 1 - row) * r <= kTileRows && same_columns(row, end)) {
        ++end;
      }
      append_block_rows(row, end);
      row = end;
    }
  }

 private:
  int64_t blocks(int64_t row) const {
    return view_.crow_indices[row + 1] - view_.crow_indices[row];
  }
  const int32_t* columns(int64_t row) const {
    return view_.col_indices + view_.crow_indices[row];
  }
  bool same_columns(int64_t a, int64_t b) const {
    return blocks(a) == blocks(b) &&
           std::equal(columns(a), columns(a) + blocks(a), columns(b));
  }

  // Block rows [first, last) with the same columns.
  void append_block_rows(int64_t first, int64_t last) {
    const int64_t r = view_.block_rows, c = view_.block_cols;
    const int64_t kept = blocks(first) * c, quads = (kept + kQuad - 1) / kQuad;
    const int64_t step = packed_.consecutive ? 1 : kQuad;
    const auto first_quad =
        static_cast<int32_t>(static_cast<int64_t>(packed_.columns.size()) / step);
    for (int64_t i = 0; i < quads * step; ++i) {
      const int64_t column = packed_.consecutive
                                 ? feature(first, i * kQuad) / kQuad
                                 : feature(first, std::min(i, kept - 1));
      packed_.columns.push_back(static_cast<int32_t>(column * 16));
    }
    const int64_t rows = (last - first) * r;
    for (int64_t sub = 0; sub < rows; sub += kTileRows) {
      const int64_t height = std::min(kTileRows, rows - sub);
      packed_.tiles.push_back({static_cast<int32_t>(first * r + sub),
                               static_cast<int32_t>(height),
                               static_cast<int32_t>(quads), first_quad,
                               static_cast<int64_t>(packed_.weights.size())});
      for (int64_t i = 0; i < quads * kQuad; i += kQuad) {
        for (int64_t row = sub; row < sub + height; ++row) {
          for (int64_t k = i; k < i + kQuad; ++k) {
            packed_.weights.push_back(k < kept ? weight(first + row / r, row % r, k)
                                               : 0);
          }
        }
      }
    }
  }

  // The input feature of the i-th kept column of a block row.
  int64_t feature(int64_t row, int64_t i) const {
    return columns(row)[i / view_.block_cols] * view_.block_cols + i % view_.block_cols;
  }
  // Its weight in row `sub` of the block row.
  int8_t weight(int64_t row, int64_t sub, int64_t i) const {
    const int64_t c = view_.block_cols;
    const int64_t block = view_.crow_indices[row] + i / c;
    return q_[(block * c + i % c) * view_.block_rows + sub];
  }

  const BlockSparseView& view_;
  const int8_t* q_;
  Int8Weights& packed_;
};

}  // namespace

Int8Weights::Int8Weights(const BlockSparseView& view, const int8_t* q,
                         const float* row_scales)
    : consecutive(view.block_cols % kQuad == 0),
      schedule(int8_schedule(view)),
      scales(row_scales, row_scales + view.out_features),
      offsets(static_cast<size_t>(view.out_features), 0) {
  Packing packing(view, q, *this);
  schedule.part_tiles.push_back(0);
  for (int64_t part = 0; part < schedule.num_parts(); ++part) {
    packing.append(schedule.part_rows[static_cast<size_t>(part)],
                   schedule.part_rows[static_cast<size_t>(part) + 1]);
    schedule.part_tiles.push_back(static_cast<int32_t>(tiles.size()));
  }
  for (const Int8Tile& tile : tiles) {
    const int8_t* w = weights.data() + tile.weights;
    for (int32_t i = 0; i < tile.quads * tile.rows * kQuad; ++i) {
      offsets[static_cast<size_t>(tile.row + i / kQuad % tile.rows)] += 128 * w[i];
    }
  }
  columns.shrink_to_fit();
  weights.shrink_to_fit();
}

int64_t Int8Weights::bytes() const {
  return static_cast<int64_t>(weights.size() + tiles.size() * sizeof(Int8Tile) +
                              columns.size() * sizeof(int32_t) +
                              scales.size() * sizeof(float) +
                              offsets.size() * sizeof(int32_t));
}

}  // namespace pybsp
