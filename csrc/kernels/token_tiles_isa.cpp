// SPDX-License-Identifier: Apache-2.0
// Between row-major activations and tiles with tokens in lanes. Transposed in
// registers: a scalar transposition costs about 30 % of a sparse layer.
#include "kernels/activation.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

void pack_tokens(const float* x, int64_t in_features, int64_t tokens, int64_t first,
                 int64_t last, int vectors, float* tile) {
  const int64_t width = static_cast<int64_t>(vectors) * kLanes;
  for (int v = 0; v < vectors; ++v) {
    const float* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t token = v * kLanes + lane;
      rows[lane] = x + (token < tokens ? token : tokens - 1) * in_features;
    }
    float* out = tile + v * kLanes;
    int64_t k = first;
    for (; k + kLanes <= last; k += kLanes) {
      Vec block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) block[lane] = load(rows[lane] + k);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(out + (k + i) * width, block[i]);
    }
    for (; k < last; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) out[k * width + lane] = rows[lane][k];
    }
  }
}

namespace {

template <Activation kActivation>
void unpack(const float* y_tile, int64_t rows, int64_t tokens, int vectors, float* y,
            int64_t out_features) {
  const int64_t width = static_cast<int64_t>(vectors) * kLanes;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first_token = v * kLanes;
    if (first_token >= tokens) return;
    const int64_t left = tokens - first_token;
    const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
    float* out = y + first_token * out_features;
    const float* in = y_tile + v * kLanes;
    int64_t row = 0;
    for (; row + kLanes <= rows; row += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = activate<kActivation>(load(in + (row + i) * width));
      }
      transpose(block);
      // A full tile keeps the block in registers; a variable bound would spill it.
      if (lanes == kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          store(out + lane * out_features + row, block[lane]);
        }
      } else {
        for (int lane = 0; lane < lanes; ++lane) {
          store(out + lane * out_features + row, block[lane]);
        }
      }
    }
    for (; row < rows; ++row) {
      float values[kLanes];
      store(values, activate<kActivation>(load(in + row * width)));
      for (int lane = 0; lane < lanes; ++lane) {
        out[lane * out_features + row] = values[lane];
      }
    }
  }
}

}  // namespace

void unpack_tokens(const float* y_tile, int64_t rows, int64_t tokens, int vectors,
                   Activation activation, float* y, int64_t out_features) {
  switch (activation) {
    case Activation::none:
      return unpack<Activation::none>(y_tile, rows, tokens, vectors, y, out_features);
    case Activation::relu:
      return unpack<Activation::relu>(y_tile, rows, tokens, vectors, y, out_features);
    case Activation::gelu:
      return unpack<Activation::gelu>(y_tile, rows, tokens, vectors, y, out_features);
    case Activation::gelu_tanh:
      return unpack<Activation::gelu_tanh>(y_tile, rows, tokens, vectors, y,
                                           out_features);
    case Activation::silu:
      return unpack<Activation::silu>(y_tile, rows, tokens, vectors, y, out_features);
  }
}

}  // namespace pybsp::PYBSP_ISA
