// SPDX-License-Identifier: Apache-2.0
// Between row-major activations and tiles with tokens in lanes. Transposed in
// registers: a scalar transposition costs about 30 % of a sparse layer.
#include "kernels/activation.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

namespace {

// Features between what is loaded and what is fetched: eight cache lines of each token,
// and past the last feature those of the next tokens. So many rows side by side are too
// many for the hardware to fetch by itself.
constexpr int64_t kAhead = 128;

}  // namespace

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
      int64_t ahead = k + kAhead;
      if (ahead >= last) ahead += kLanes * in_features - (last - first);
      Vec block[kLanes];
      PYBSP_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        block[lane] = load(rows[lane] + k);
        __builtin_prefetch(rows[lane] + ahead);
      }
      transpose(block);
      PYBSP_UNROLL
      for (int i = 0; i < kLanes; ++i) store(out + (k + i) * width, block[i]);
    }
    if (k < last) {
      const int left = static_cast<int>(last - k);
      Vec block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        block[lane] = load(rows[lane] + k, left);
      transpose(block);
      for (int i = 0; i < left; ++i) store(out + (k + i) * width, block[i]);
    }
  }
}

namespace {

// Rounds between activation and residual, as unpack does: a token's bits do not depend
// on the path that it takes.
template <Activation kActivation>
void finish_all(const float* sums, int64_t count, const float* residual, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec a = rounded(activate<kActivation>(load(sums + i)));
    store(y + i, residual ? add(a, load(residual + i)) : a);
  }
  if (i == count) return;
  const int left = static_cast<int>(count - i);
  const Vec a = rounded(activate<kActivation>(load(sums + i, left)));
  store(y + i, residual ? add(a, load(residual + i, left)) : a, left);
}

}  // namespace

void finish(const float* sums, int64_t count, Activation activation,
            const float* residual, float* y) {
  if (activation == Activation::none && sums == y && !residual) return;
  with_activation(activation, [&](auto fixed) {
    finish_all<decltype(fixed)::value>(sums, count, residual, y);
  });
}

namespace {

// Where a transposed block of outputs goes.
struct Destination {
  float* y;
  const float* residual;  // laid out as y, or null
  int64_t stride;         // out_features
};

template <Activation kActivation>
void unpack(const float* y_tile, int64_t rows, int64_t tokens, int vectors,
            Destination to) {
  const int64_t width = static_cast<int64_t>(vectors) * kLanes;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first_token = v * kLanes;
    if (first_token >= tokens) return;
    const int64_t left = tokens - first_token;
    const int lanes = left < kLanes ? static_cast<int>(left) : kLanes;
    float* out = to.y + first_token * to.stride;
    const float* residual = to.residual;
    if (residual) residual += first_token * to.stride;
    const float* in = y_tile + v * kLanes;
    int64_t row = 0;
    for (; row + kLanes <= rows; row += kLanes) {
      Vec block[kLanes];
      PYBSP_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        block[i] = activate<kActivation>(load(in + (row + i) * width));
      }
      transpose(block);
      const auto put = [&](int lane) {
        const int64_t at = lane * to.stride + row;
        store(out + at, residual ? add(block[lane], load(residual + at)) : block[lane]);
      };
      // A full tile keeps the block in registers; a variable bound would spill it.
      if (lanes == kLanes) {
        PYBSP_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) put(lane);
      } else {
        for (int lane = 0; lane < lanes; ++lane) put(lane);
      }
    }
    if (row < rows) {
      const int some = static_cast<int>(rows - row);
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] =
            i < some ? activate<kActivation>(load(in + (row + i) * width)) : zero();
      }
      transpose(block);
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t at = lane * to.stride + row;
        const Vec a =
            residual ? add(block[lane], load(residual + at, some)) : block[lane];
        store(out + at, a, some);
      }
    }
  }
}

}  // namespace

void unpack_tokens(const float* y_tile, int64_t rows, int64_t tokens, int vectors,
                   Activation activation, const float* residual, float* y,
                   int64_t out_features) {
  const Destination to{y, residual, out_features};
  with_activation(activation, [&](auto fixed) {
    unpack<decltype(fixed)::value>(y_tile, rows, tokens, vectors, to);
  });
}

}  // namespace pybsp::PYBSP_ISA
