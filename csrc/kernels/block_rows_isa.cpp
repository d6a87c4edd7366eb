// SPDX-License-Identifier: Apache-2.0
// One panel, some blocks of one block row of a dense weight: norms, penalty, proximal
// step and mask. What there is per block or column waits in L1 between the passes over
// the panel, which itself stays in L2.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Whole vectors are written and read past the end of what a panel needs, in
// reduce_blocks one for every lane.
constexpr int64_t kLow = 8;  // rows of a block that are walked down at once
constexpr int64_t kBuffer = kPanelCols + kLanes * kLanes;

// All lanes of a vector, or those that are left at the end of a row.
struct Whole {};
struct First {
  int lanes;
};
template <typename T>
inline Vec get(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline Vec get(const T* p, First part) {
  return load(p, part.lanes);
}
template <typename T>
inline void put(T* p, Whole, Vec a) {
  store(p, a);
}
template <typename T>
inline void put(T* p, First part, Vec a) {
  store(p, a, part.lanes);
}

// body(offset, Whole or First) over `count` elements, a vector at a time.
template <typename Body>
inline void for_each_vector(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, Whole{});
  if (i < count) body(i, First{static_cast<int>(count - i)});
}

// How far ahead of row `row` of the panel the data lie that are needed `step` rows
// later: in this panel or at the start of the next. Hardware does not fetch across
// pages of 4 KB, which is a row or so.
inline int64_t distance_ahead(const BlockRow& shape, int64_t stride, int64_t row,
                              int64_t step) {
  if (row + step < shape.rows) return step * stride;
  return (shape.next_rows - row) * stride + shape.next_cols;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Blocks narrower than a vector: column by column, else a vector a block.
inline bool is_narrow(const BlockRow& shape) { return shape.cols < kLanes; }

// sums[col] (+)= squares of kRows rows.
template <int kRows, typename T>
void add_column_squares(const T* weight, const BlockRow& shape, int64_t ahead,
                        bool first, float* sums) {
  for_each_vector(shape.cols * shape.blocks, [=, &shape](int64_t i, auto part) {
    Vec sum = first ? zero() : load(sums + i);
    for (int k = 0; k < kRows; ++k) {
      const T* w = weight + k * shape.stride + i;
      prefetch(w + ahead);
      const Vec a = get(w, part);
      sum = fma(a, a, sum);
    }
    store(sums + i, sum);
  });
}

// The squares of one block in kRows rows, in as many partial sums as there are lanes.
// Four chains hide the latency of the additions.
template <int kRows, typename T>
inline Vec segment_squares(const T* weight, const BlockRow& shape, int64_t ahead) {
  constexpr int kChains = 4 / kRows;
  Vec sums[kRows * kChains];
  for (Vec& sum : sums) sum = zero();
  int64_t i = 0;
  for (; i + kChains * kLanes <= shape.cols; i += kChains * kLanes) {
    for (int k = 0; k < kRows; ++k) {
      for (int chain = 0; chain < kChains; ++chain) {
        const T* w = weight + k * shape.stride + i + chain * kLanes;
        prefetch(w + ahead);
        const Vec a = load(w);
        sums[k * kChains + chain] = fma(a, a, sums[k * kChains + chain]);
      }
    }
  }
  for_each_vector(shape.cols - i, [&](int64_t j, auto part) {
    for (int k = 0; k < kRows; ++k) {
      const T* w = weight + k * shape.stride + i + j;
      prefetch(w + ahead);
      const Vec a = get(w, part);
      sums[k * kChains] = fma(a, a, sums[k * kChains]);
    }
  });
  return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

template <int kRows, typename T>
void add_segment_squares(const T* weight, const BlockRow& shape, int64_t ahead,
                         bool first, float* sums) {
  for (int64_t j = 0; j < shape.blocks; ++j) {
    const Vec sum = segment_squares<kRows>(weight + j * shape.cols, shape, ahead);
    float* mine = sums + j * kLanes;
    store(mine, first ? sum : add(load(mine), sum));
  }
}

template <int kRows, typename T>
void add_squares(const T* weight, const BlockRow& shape, int64_t row, float* sums) {
  const T* rows = weight + row * shape.stride;
  const int64_t ahead = distance_ahead(shape, shape.stride, row, kRows);
  if (is_narrow(shape)) {
    add_column_squares<kRows>(rows, shape, ahead, row == 0, sums);
  } else {
    add_segment_squares<kRows>(rows, shape, ahead, row == 0, sums);
  }
}

// sums[i] = sum of the kWidth values that start at sums[i * kWidth].
template <int kWidth>
void reduce_runs(float* sums, int64_t count) {
  if constexpr (kWidth > kLanes) {
    return;  // never asked for
  } else {
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec v[kWidth];
      for (int k = 0; k < kWidth; ++k) v[k] = load(sums + i * kWidth + k * kLanes);
      for (int n = kWidth / 2; n > 0; n /= 2) {
        for (int k = 0; k < n; ++k) v[k] = pair_sums(v[2 * k], v[2 * k + 1]);
      }
      store(sums + i, v[0]);
    }
  }
}

// values[i * kWidth + k] = values[i] for k < kWidth: the opposite.
template <int kWidth>
void repeat_runs(float* values, int64_t count) {
  if constexpr (kWidth > kLanes) {
    return;
  } else {
    for (int64_t i = (count + kLanes - 1) / kLanes * kLanes; i > 0;) {
      i -= kLanes;
      Vec v[kWidth];
      v[0] = load(values + i);
      for (int n = 1; n < kWidth; n *= 2) {
        for (int k = n; k-- > 0;) {
          const Vec a = v[k];
          v[2 * k] = twice_low(a);
          v[2 * k + 1] = twice_high(a);
        }
      }
      for (int k = 0; k < kWidth; ++k) store(values + i * kWidth + k * kLanes, v[k]);
    }
  }
}

// The power of two in a width of at most kLanes.
inline int even_part(int64_t width) { return static_cast<int>(width & -width); }

// sums[j] = sum of the `width` values that start at sums[j * width].
void reduce_blocks(float* sums, int64_t blocks, int64_t width) {
  const int even = even_part(width);
  const int64_t odd = width / even;
  switch (even) {
    case 2:
      reduce_runs<2>(sums, blocks * odd);
      break;
    case 4:
      reduce_runs<4>(sums, blocks * odd);
      break;
    case 8:
      reduce_runs<8>(sums, blocks * odd);
      break;
    case 16:
      reduce_runs<16>(sums, blocks * odd);
      break;
  }
  if (odd == 1) return;
  for (int64_t j = 0; j < blocks; ++j) {
    float total = 0.0f;
    for (int64_t i = 0; i < odd; ++i) total += sums[j * odd + i];
    sums[j] = total;
  }
}

// values[j * width + i] = values[j] for i < width: the opposite.
void repeat_blocks(float* values, int64_t blocks, int64_t width) {
  const int even = even_part(width);
  const int64_t odd = width / even;
  for (int64_t j = odd == 1 ? 0 : blocks; j-- > 0;) {
    const float value = values[j];
    for (int64_t i = 0; i < odd; ++i) values[j * odd + i] = value;
  }
  switch (even) {
    case 2:
      repeat_runs<2>(values, blocks * odd);
      break;
    case 4:
      repeat_runs<4>(values, blocks * odd);
      break;
    case 8:
      repeat_runs<8>(values, blocks * odd);
      break;
  }
}

// Low blocks of kWidth columns, a power of two: the sums of as many blocks as there are
// lanes stay in registers. Returns how many of the panel's blocks that covers.
template <int kWidth, typename T, typename Emit>
inline int64_t for_each_low_norm(const T* weight, const BlockRow& shape, Emit emit) {
  if constexpr (kWidth >= kLanes) {
    return 0;
  } else {
    const int64_t ahead = shape.next_rows * shape.stride + shape.next_cols;
    const int64_t stride = shape.stride, rows = shape.rows;
    int64_t j = 0;
    for (; j + kLanes <= shape.blocks; j += kLanes) {
      const T* w = weight + j * kWidth;
      Vec sums[kWidth];
      for (Vec& sum : sums) sum = zero();
      for (int64_t row = 0; row < rows; ++row, w += stride) {
        for (int k = 0; k < kWidth; ++k) {
          prefetch(w + ahead + k * kLanes);
          const Vec a = load(w + k * kLanes);
          sums[k] = fma(a, a, sums[k]);
        }
      }
      for (int n = kWidth / 2; n > 0; n /= 2) {
        for (int k = 0; k < n; ++k) sums[k] = pair_sums(sums[2 * k], sums[2 * k + 1]);
      }
      emit(j, sqrt(sums[0]), Whole{});
    }
    return j;
  }
}

// emit(j, norms of the blocks from j on, Whole or First) for the panel's blocks, a
// vector at a time; `buffer` has kBuffer floats, of which emit may overwrite those from
// j on.
template <typename T, typename Emit>
inline void for_each_norm(const T* weight, const BlockRow& shape, float* buffer,
                          Emit emit) {
  if (shape.rows == 1 && shape.cols == 1) {  // no root, and exact
    for_each_vector(shape.blocks, [&](int64_t j, auto part) {
      prefetch(weight + j + shape.next_cols);
      const Vec a = get(weight + j, part);
      emit(j, max(a, sub(zero(), a)), part);
    });
    return;
  }
  int64_t done = 0;
  if (shape.rows <= kLow) {
    if (shape.cols == 1) done = for_each_low_norm<1>(weight, shape, emit);
    if (shape.cols == 2) done = for_each_low_norm<2>(weight, shape, emit);
    if (shape.cols == 4) done = for_each_low_norm<4>(weight, shape, emit);
    if (shape.cols == 8) done = for_each_low_norm<8>(weight, shape, emit);
  }
  BlockRow rest = shape;
  rest.blocks -= done;
  if (rest.blocks == 0) return;
  weight += done * shape.cols;
  buffer += done;
  int64_t row = 0;
  for (; row + 4 <= rest.rows; row += 4) add_squares<4>(weight, rest, row, buffer);
  for (; row < rest.rows; ++row) add_squares<1>(weight, rest, row, buffer);
  const int64_t width = is_narrow(rest) ? rest.cols : kLanes;
  if (width > 1) {
    for (int64_t i = 0; i < kLanes; ++i) {  // read, not used
      store(buffer + rest.blocks * width + i * kLanes, zero());
    }
    reduce_blocks(buffer, rest.blocks, width);
  }
  for_each_vector(rest.blocks, [&](int64_t j, auto part) {
    emit(done + j, sqrt(get(buffer + j, part)), part);
  });
}

// body(row, offset, scale vector, Whole or First) over every element of the panel.
// Overwrites scale.
template <typename Body>
inline void for_each_scaled(const BlockRow& shape, float* scale, Body body) {
  if (is_narrow(shape)) {
    repeat_blocks(scale, shape.blocks, shape.cols);
    for (int64_t row = 0; row < shape.rows; ++row) {
      for_each_vector(shape.cols * shape.blocks, [=](int64_t i, auto part) {
        body(row, i, load(scale + i), part);
      });
    }
    return;
  }
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t j = 0; j < shape.blocks; ++j) {
      const Vec mine = set1(scale[j]);
      for_each_vector(shape.cols, [=](int64_t i, auto part) {
        body(row, j * shape.cols + i, mine, part);
      });
    }
  }
}

template <typename T>
void block_norms(const T* weight, const BlockRow& shape, float* norms) {
  alignas(64) float buffer[kBuffer];
  for_each_norm(weight, shape, buffer,
                [&](int64_t j, Vec norm, auto part) { put(norms + j, part, norm); });
}

template <typename T>
double group_lasso_grad(T* grad, int64_t grad_stride, const T* weight,
                        const BlockRow& shape, const float* factors, float lam) {
  alignas(64) float scale[kBuffer];
  Sum penalty = zero_sum();
  for_each_norm(weight, shape, scale, [&](int64_t j, Vec norm, auto part) {
    const Vec factor = get(factors + j, part);
    penalty = add(penalty, mul(factor, norm));
    const Vec quotient = div(mul(set1(lam), factor), norm);
    store(scale + j, select_gt(norm, zero(), quotient, zero()));
  });
  // Rows of a narrow panel are short: some of them make 4 KB.
  const int64_t rows_ahead = 1 + 1024 / (shape.cols * shape.blocks);
  for_each_scaled(shape, scale, [=](int64_t row, int64_t i, Vec s, auto part) {
    T* g = grad + row * grad_stride + i;
    const T* w = weight + row * shape.stride + i;
    prefetch_to_l2(g + distance_ahead(shape, grad_stride, row, rows_ahead));
    prefetch_to_l2(w + shape.next_rows * shape.stride + shape.next_cols);
    put(g, part, fma(get(w, part), s, get(g, part)));
  });
  return total(penalty);
}

template <typename T>
void group_lasso_prox(T* weight, const BlockRow& shape, const float* thresholds,
                      float step) {
  alignas(64) float scale[kBuffer];
  for_each_norm(weight, shape, scale, [&](int64_t j, Vec norm, auto part) {
    const Vec threshold = mul(set1(step), get(thresholds + j, part));
    const Vec left = sub(set1(1.0f), div(threshold, norm));
    store(scale + j, select_le(norm, threshold, zero(), left));
  });
  for_each_scaled(shape, scale, [=](int64_t row, int64_t i, Vec s, auto part) {
    T* w = weight + row * shape.stride + i;
    prefetch_to_l2(w + shape.next_rows * shape.stride + shape.next_cols);
    // s - s is +0 where s is 0, whatever w is, and NaN where it is NaN.
    put(w, part, select_gt(s, zero(), mul(get(w, part), s), sub(s, s)));
  });
}

// Writes only where something changes: once the optimizer leaves the zeros alone, the
// weight is read and no more.
template <typename T>
void apply_block_mask(T* weight, const BlockRow& shape, const bool* mask) {
  alignas(64) float keep[kBuffer];
  int64_t j = 0;
  for (; j + kLanes <= shape.blocks; j += kLanes) store(keep + j, load(mask + j));
  for (; j < shape.blocks; ++j) keep[j] = mask[j] ? 1.0f : 0.0f;
  for_each_scaled(shape, keep, [=](int64_t row, int64_t i, Vec kept, auto part) {
    T* w = weight + row * shape.stride + i;
    prefetch(w + distance_ahead(shape, shape.stride, row, 1));
    const Vec a = get(w, part);
    if (any_bit(select_gt(kept, zero(), zero(), a))) {
      put(w, part, select_gt(kept, zero(), a, zero()));
    }
  });
}

template <typename T>
constexpr BlockRowKernels<T> kernels() {
  return {block_norms<T>, group_lasso_grad<T>, group_lasso_prox<T>,
          apply_block_mask<T>};
}

}  // namespace

const BlockRowKernels<float> block_rows_float32 = kernels<float>();
const BlockRowKernels<Bfloat16> block_rows_bfloat16 = kernels<Bfloat16>();

}  // namespace pybsp::PYBSP_ISA
