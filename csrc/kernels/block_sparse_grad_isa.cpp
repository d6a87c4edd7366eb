// SPDX-License-Identifier: Apache-2.0
// Gradients of the block-sparse product on activations with tokens in lanes; see
// transposed_index.h and block_sparse_gemm.h for the layouts.
#include "kernels/tile_rows.h"
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// dx[features[row]] += run `row` of weights times the rows of dy that all runs share.
// The run is as long as kRun, or as r when that is 0.
template <int kRows, int kVectors, int kRun>
inline void add_runs(const int32_t* features, const float* w, int64_t r,
                     const float* dy, float* dx) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t run = kRun ? kRun : r;
  float* out[kRows];
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    out[row] = in_register(dx + features[row] * kWidth);
    for (int v = 0; v < kVectors; ++v) acc[row][v] = load(out[row] + v * kLanes);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < run; ++i) {
    Vec in[kVectors];
    for (int v = 0; v < kVectors; ++v) in[v] = load(dy + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Vec weight = set1(w[row * run + i]);
      for (int v = 0; v < kVectors; ++v) {
        acc[row][v] = fma(weight, in[v], acc[row][v]);
      }
    }
    dy += kWidth;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) store(out[row] + v * kLanes, acc[row][v]);
  }
}

template <int kVectors, int kRun, int kRows = kTileRows<kVectors>>
inline void add_rows(int64_t rows, const int32_t* features, const float* w, int64_t r,
                     const float* dy, float* dx) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return add_rows<kVectors, kRun, kRows - 1>(rows, features, w, r, dy, dx);
    }
  }
  add_runs<kRows, kVectors, kRun>(features, w, r, dy, dx);
}

template <int kVectors, int kRun>
void add_run_tiles(const BlockSparseView& weight, const RunTiles& tiles,
                   const float* dy_tile, float* dx_tile) {
  constexpr int64_t kWidth = kVectors * kLanes;
  const int64_t r = weight.block_rows;
  float* dx = dx_tile - tiles.first_feature * kWidth;
  for (int64_t i = 0; i < (tiles.last_feature - tiles.first_feature) * kWidth;
       i += kLanes) {
    store(dx_tile + i, zero());
  }
  for (const RunTile* tile = tiles.begin; tile < tiles.end; ++tile) {
    int64_t run = tile->first_run;
    // Five to eight runs on four rows of accumulators: two halves of similar height.
    const int64_t passes =
        (tile->count + kTileRows<kVectors> - 1) / kTileRows<kVectors>;
    int64_t left = tile->count;
    for (int64_t pass = passes; pass > 0; --pass) {
      const int64_t rows = (left + pass - 1) / pass;
      add_rows<kVectors, kRun>(rows, tiles.features + run, weight.values + run * r, r,
                               dy_tile + tile->row * r * kWidth, dx);
      run += rows;
      left -= rows;
    }
  }
}

template <int kVectors>
void add_run_tiles_of_width(const BlockSparseView& weight, const RunTiles& tiles,
                            const float* dy_tile, float* dx_tile) {
  if (weight.block_rows == 8) {
    add_run_tiles<kVectors, 8>(weight, tiles, dy_tile, dx_tile);
  } else {
    add_run_tiles<kVectors, 0>(weight, tiles, dy_tile, dx_tile);
  }
}

}  // namespace

void multiply_runs(const BlockSparseView& weight, RunTiles tiles, const float* dy_tile,
                   int vectors, float* dx_tile) {
  switch (vectors) {
    case 1:
      return add_run_tiles_of_width<1>(weight, tiles, dy_tile, dx_tile);
    case 2:
      return add_run_tiles_of_width<2>(weight, tiles, dy_tile, dx_tile);
    default:
      return add_run_tiles_of_width<3>(weight, tiles, dy_tile, dx_tile);
  }
}

namespace {

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
// a and kColumns features k of b. Meanwhile the features after them are fetched from
// L2.
template <int kRows, int kColumns>
inline void pair_tile(const SampledProducts& s, const float* a, int64_t first,
                      int64_t out_offset) {
  constexpr int kSums = kRows * kColumns;
  constexpr int kEights = (kSums + 7) / 8;
  Vec acc[kEights][8];
  PYBSP_UNROLL
  for (int i = 0; i < kEights; ++i) {
    PYBSP_UNROLL
    for (int j = 0; j < 8; ++j) acc[i][j] = zero();
  }
  const float* b[kColumns];
  const float* next[kColumns];
  PYBSP_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    const int64_t after = first + kColumns + k < s.count ? first + kColumns + k : first;
    b[k] = s.b + s.features[first + k] * s.width;
    next[k] = s.b + s.features[after] * s.width;
  }
  for (int64_t t = 0; t < s.vectors * kLanes; t += kLanes) {
    Vec in[kColumns];
    PYBSP_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      in[k] = in_register(load(b[k] + t));
      __builtin_prefetch(next[k] + t);
    }
    PYBSP_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vec row = in_register(load(a + i * kLanes));
      PYBSP_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        Vec& sum = acc[(k * kRows + i) / 8][(k * kRows + i) % 8];
        sum = fma(row, in[k], sum);
      }
    }
    a += s.a_step;
  }
  Vec8 sums[kEights];
  PYBSP_UNROLL
  for (int i = 0; i < kEights; ++i) sums[i] = reduce_add8(acc[i]);
  if (kRows == 8 && s.stride == 1) {
    PYBSP_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      float* out = s.out + s.dst[first + k] + out_offset;
      store8(out, add8(load8(out), sums[k]));
    }
    return;
  }
  float scalars[kEights * 8];
  for (int i = 0; i < kEights; ++i) store8(scalars + i * 8, sums[i]);
  for (int k = 0; k < kColumns; ++k) {
    float* out = s.out + s.dst[first + k] + out_offset;
    for (int i = 0; i < kRows; ++i) out[i * s.stride] += scalars[k * kRows + i];
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
    pair_rows_of(rows, s, s.a + row * kLanes, row * s.stride);
  }
}

void add_feature_sums(const float* panel, int64_t features, int64_t feature_step,
                      int64_t vectors, int64_t vector_step, float* sums) {
  for (int64_t i = 0; i < features; i += 8) {
    Vec acc[8];
    PYBSP_UNROLL
    for (int j = 0; j < 8; ++j) acc[j] = zero();
    // The last ones like the others: a sum has the same bits wherever it stands.
    const int left = features - i < 8 ? static_cast<int>(features - i) : 8;
    for (int64_t v = 0; v < vectors; ++v) {
      const float* from = panel + i * feature_step + v * vector_step;
      if (left < 8) {
        for (int j = 0; j < left; ++j) {
          acc[j] = add(acc[j], load(from + j * feature_step));
        }
        continue;
      }
      PYBSP_UNROLL
      for (int j = 0; j < 8; ++j) acc[j] = add(acc[j], load(from + j * feature_step));
    }
    float all[8];
    store8(all, reduce_add8(acc));
    for (int j = 0; j < left; ++j) sums[i + j] += all[j];
  }
}

}  // namespace pybsp::PYBSP_ISA
