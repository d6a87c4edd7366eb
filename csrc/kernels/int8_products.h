// SPDX-License-Identifier: Apache-2.0
// y = (float(q_x . q_w) scales[o]) s[t] + bias[o], each operation rounded by itself.
//
// Inputs are symmetric 8-bit integers with one scale s for each token:
//
//   a = max |x|,  s = a / 127,  q_x = round(x * (127 / a))        without a given
//   scale, q_x = round(x * (1 / s)) limited to [-127, 127]               with one,
//
// ties to even. Inputs that are all smaller than kLeastInput are 0, and a token with an
// input that is not finite has NaN for s. Sums of products are exact as long as a row
// has at most 65,536 weights, so that all instruction sets give the same bits.
#pragma once

#include <cstdint>

#include "kernels/int8_weights.h"

namespace pybsp {

constexpr float kLeastInput = 7.888609e-31f;  // 2^-100
constexpr int64_t kMaxInt8Inputs = 65536;

// The products of tiles [first, last) of the weights, which are those of outputs
// [first_row, last_row), with one tile of tokens.
struct Int8Products {
  Int8View weights;
  int64_t first;
  int64_t last;
  int64_t first_row;
  int64_t last_row;
  int vectors;
  const int8_t* bytes;        // as `quantize` writes them
  const float* token_scales;  // s of every lane
  const float* bias;          // (out), or null
  float* y_tile;              // (row - first_row)[lane]
};

struct Int8Kernels {
  // The inputs of one tile, [feature][lanes x vectors], in quads of consecutive
  // features or feature by feature, see int8_tile_bytes; s of every lane. input_scale
  // 0: each lane has its own.
  void (*quantize)(const float* x_tile, int64_t features, int vectors,
                   float input_scale, bool consecutive, int8_t* bytes, float* scales);
  void (*multiply)(const Int8Products& products);
  // 24 x rounds vectors of products, four a lane, from registers; the result only keeps
  // them from being removed.
  int32_t (*dot_chains)(int64_t rounds);
  Int8Order order;
};

// Bytes of a tile: of each feature as many as its lanes, or four for each lane of one
// vector.
inline int64_t int8_tile_bytes(int64_t features, int64_t lanes, int vectors,
                               bool consecutive) {
  return features * lanes * (consecutive ? vectors : 4);
}

}  // namespace pybsp
