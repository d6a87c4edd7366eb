// SPDX-License-Identifier: Apache-2.0
// Gradients of the block-sparse product on activations with tokens in lanes; see
// transposed_index.h and block_sparse_gemm.h for the layouts.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Rows of accumulators, as in block_sparse_gemm_isa.cpp: 8 x 3 in 32 registers.
template <int kVectors>
constexpr int kTileRows = kRegisters >= 32 || kVectors == 1 ? 8 : 4;

// kRows features of one block column own their sums over its blocks: w points at the
// run of the first of them in block 0.
template <int kRows, int kVectors>
inline void gather_blocks(const BlockColumns& columns, int64_t begin, int64_t end,
                          const float* w, int64_t block_rows, int64_t block_size,
                          const float* dy_tile, float* dx) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Vec acc[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) acc[row][v] = zero();
  }
  for (int64_t b = begin; b < end; ++b) {
    const float* dy = dy_tile + columns.row_indices[b] * block_rows * kWidth;
    const float* run = w + columns.blocks[b] * block_size;
    for (int64_t i = 0; i < block_rows; ++i) {
      Vec in[kVectors];
      for (int v = 0; v < kVectors; ++v) in[v] = load(dy + v * kLanes);
      for (int row = 0; row < kRows; ++row) {
        const Vec weight = set1(run[row * block_rows]);
        for (int v = 0; v < kVectors; ++v) {
          acc[row][v] = fma(weight, in[v], acc[row][v]);
        }
      }
      ++run;
      dy += kWidth;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      store(dx + row * kWidth + v * kLanes, acc[row][v]);
    }
  }
}

// The instantiation for `rows` <= kRows.
template <int kVectors, int kRows = kTileRows<kVectors>, typename... Arguments>
inline void gather_rows(int64_t rows, Arguments... arguments) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return gather_rows<kVectors, kRows - 1>(rows, arguments...);
  }
  gather_blocks<kRows, kVectors>(arguments...);
}

template <int kVectors>
void gather_columns(const BlockSparseView& weight, const BlockColumns& columns,
                    const float* dy_tile, float* dx_tile) {
  constexpr int64_t kRows = kTileRows<kVectors>;
  const int64_t r = weight.block_rows, c = weight.block_cols;
  for (int64_t col = columns.first; col < columns.last; ++col) {
    for (int64_t sub = 0; sub < c; sub += kRows) {
      gather_rows<kVectors>(
          c - sub < kRows ? c - sub : kRows, columns, columns.ccol_indices[col],
          columns.ccol_indices[col + 1], weight.values + sub * r, r, r * c, dy_tile,
          dx_tile + ((col - columns.first) * c + sub) * kVectors * kLanes);
    }
  }
}

}  // namespace

void multiply_block_columns(const BlockSparseView& weight, BlockColumns columns,
                            const float* dy_tile, int vectors, float* dx_tile) {
  switch (vectors) {
    case 1:
      return gather_columns<1>(weight, columns, dy_tile, dx_tile);
    case 2:
      return gather_columns<2>(weight, columns, dy_tile, dx_tile);
    default:
      return gather_columns<3>(weight, columns, dy_tile, dx_tile);
  }
}

namespace {

// Features of b that share the loads of kRows features of a. With eight rows 8 x 3
// accumulators, 3 + 1 inputs: 11 loads for 24 multiply-adds.
constexpr int shared_columns(int rows) {
  if (kRegisters >= 32) {
    constexpr int columns[] = {0, 8, 8, 6, 5, 4, 4, 3, 3};
    return columns[rows];
  }
  constexpr int columns[] = {0, 8, 4, 3, 3};
  return columns[rows];
}

constexpr int kPairRows = kRegisters >= 32 ? 8 : 4;

// out[dst[k] + i * stride] += sum over the lanes of a_i . b_k, for kRows features i of
// a and kColumns features k of b.
template <int kRows, int kColumns>
inline void pair_tile(const SampledProducts& s, const float* a, int64_t first,
                      int64_t out_offset) {
  constexpr int kSums = (kRows * kColumns + 7) / 8 * 8;
  Vec acc[kSums];
  for (int i = 0; i < kSums; ++i) acc[i] = zero();
  const float* b[kColumns];
  for (int k = 0; k < kColumns; ++k) b[k] = s.b + s.features[first + k] * s.width;
  for (int64_t t = 0; t < s.vectors * kLanes; t += kLanes) {
    Vec in[kColumns];
    for (int k = 0; k < kColumns; ++k) in[k] = load(b[k] + t);
    for (int i = 0; i < kRows; ++i) {
      const Vec row = load(a + i * s.width + t);
      for (int k = 0; k < kColumns; ++k) {
        acc[k * kRows + i] = fma(row, in[k], acc[k * kRows + i]);
      }
    }
  }
  float sums[kSums];
  for (int i = 0; i < kSums; i += 8) store8(sums + i, reduce_add8(acc + i));
  for (int k = 0; k < kColumns; ++k) {
    float* out = s.out + s.dst[first + k] + out_offset;
    if (s.stride == 1) {
      for (int i = 0; i < kRows; ++i) out[i] += sums[k * kRows + i];
    } else {
      for (int i = 0; i < kRows; ++i) out[i * s.stride] += sums[k * kRows + i];
    }
  }
}

template <int kRows>
void pair_rows(const SampledProducts& s, const float* a, int64_t out_offset) {
  constexpr int kColumns = shared_columns(kRows);
  int64_t k = 0;
  for (; k + kColumns <= s.count; k += kColumns) {
    pair_tile<kRows, kColumns>(s, a, k, out_offset);
  }
  for (; k < s.count; ++k) pair_tile<kRows, 1>(s, a, k, out_offset);
}

template <int kRows = kPairRows>
void pair_rows_of(int64_t rows, const SampledProducts& s, const float* a,
                  int64_t out_offset) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return pair_rows_of<kRows - 1>(rows, s, a, out_offset);
  }
  pair_rows<kRows>(s, a, out_offset);
}

}  // namespace

void sampled_products(const SampledProducts& s) {
  for (int64_t row = 0; row < s.rows; row += kPairRows) {
    const int64_t rows = s.rows - row < kPairRows ? s.rows - row : kPairRows;
    pair_rows_of(rows, s, s.a + row * s.width, row * s.stride);
  }
}

}  // namespace pybsp::PYBSP_ISA
