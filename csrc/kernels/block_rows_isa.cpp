// SPDX-License-Identifier: Apache-2.0
// Passes over one block row of a dense weight: sums of squares, and scaling.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Columns handled at once where blocks are narrower than a few vectors: one float a
// column, 4 KB, stays in L1 while the r rows pass.
constexpr int64_t kChunk = 1024;
constexpr int64_t kWide = 4 * kLanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Four partial sums hide the latency of the additions.
float sum_squares(const float* w, int64_t count) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    for (int k = 0; k < 4; ++k) {
      Vec a = load(w + i + k * kLanes);
      sums[k] = fma(a, a, sums[k]);
    }
  }
  float total = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; i < count; ++i) total += w[i] * w[i];
  return total;
}

// sums[col] = sum over the rows of weight[row][col]^2.
void column_squares(const float* weight, int64_t stride, int64_t rows, int64_t count,
                    float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
  for (int64_t row = 0; row < rows; ++row) {
    const float* w = weight + row * stride;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Vec a = load(w + i);
      store(sums + i, fma(a, a, load(sums + i)));
    }
    for (; i < count; ++i) sums[i] += w[i] * w[i];
  }
}

}  // namespace

void block_squares(const float* weight, BlockRow shape, float* squares) {
  if (shape.cols >= kWide) {
    for (int64_t j = 0; j < shape.blocks; ++j) {
      double total = 0.0;
      for (int64_t row = 0; row < shape.rows; ++row) {
        total += static_cast<double>(
            sum_squares(weight + row * shape.stride + j * shape.cols, shape.cols));
      }
      squares[j] = static_cast<float>(total);
    }
    return;
  }
  float sums[kChunk];
  const int64_t step = kChunk / shape.cols;
  for (int64_t j = 0; j < shape.blocks; j += step) {
    const int64_t blocks = smaller(step, shape.blocks - j);
    column_squares(weight + j * shape.cols, shape.stride, shape.rows,
                   blocks * shape.cols, sums);
    for (int64_t k = 0; k < blocks; ++k) {
      float total = 0.0f;
      for (int64_t i = 0; i < shape.cols; ++i) total += sums[k * shape.cols + i];
      squares[j + k] = total;
    }
  }
}

namespace {

// scale - scale is +0 for a scale of zero, whatever w is, and NaN for NaN.
inline Vec scaled(Vec w, Vec scale) {
  return select_gt(scale, zero(), mul(w, scale), sub(scale, scale));
}

// Calls body(offset, scale vector) for whole vectors and tail(offset, scale) for the
// rest, over every element of a block row.
template <typename Body, typename Tail>
void for_each_scaled(BlockRow shape, const float* scale, Body body, Tail tail) {
  if (shape.cols >= kWide) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      for (int64_t j = 0; j < shape.blocks; ++j) {
        const Vec s = set1(scale[j]);
        int64_t i = j * shape.cols;
        const int64_t end = i + shape.cols;
        for (; i + kLanes <= end; i += kLanes) body(row, i, s);
        for (; i < end; ++i) tail(row, i, scale[j]);
      }
    }
    return;
  }
  float spread[kChunk];
  const int64_t step = kChunk / shape.cols;
  for (int64_t j = 0; j < shape.blocks; j += step) {
    const int64_t blocks = smaller(step, shape.blocks - j);
    const float* by_column = shape.cols == 1 ? scale + j : spread;
    for (int64_t k = 0; shape.cols > 1 && k < blocks; ++k) {
      for (int64_t i = 0; i < shape.cols; ++i) {
        spread[k * shape.cols + i] = scale[j + k];
      }
    }
    const int64_t count = blocks * shape.cols;
    for (int64_t row = 0; row < shape.rows; ++row) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        body(row, j * shape.cols + i, load(by_column + i));
      }
      for (; i < count; ++i) tail(row, j * shape.cols + i, by_column[i]);
    }
  }
}

}  // namespace

void add_scaled_blocks(float* grad, int64_t grad_stride, const float* weight,
                       BlockRow shape, const float* scale) {
  for_each_scaled(
      shape, scale,
      [=](int64_t row, int64_t i, Vec s) {
        float* g = grad + row * grad_stride + i;
        store(g, fma(load(weight + row * shape.stride + i), s, load(g)));
      },
      [=](int64_t row, int64_t i, float s) {
        grad[row * grad_stride + i] += s * weight[row * shape.stride + i];
      });
}

void scale_blocks(float* weight, BlockRow shape, const float* scale) {
  for_each_scaled(
      shape, scale,
      [=](int64_t row, int64_t i, Vec s) {
        float* w = weight + row * shape.stride + i;
        store(w, scaled(load(w), s));
      },
      [=](int64_t row, int64_t i, float s) {
        float* w = weight + row * shape.stride + i;
        *w = s > 0.0f ? *w * s : s - s;
      });
}

}  // namespace pybsp::PYBSP_ISA
