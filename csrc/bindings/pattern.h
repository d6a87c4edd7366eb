// SPDX-License-Identifier: Apache-2.0
// A checked block-sparse pattern, as Python holds it.
#pragma once

#include <mutex>
#include <string>
#include <utility>

#include "bindings/arrays.h"
#include "kernels/block_sparse_gemm.h"
#include "kernels/block_sparse_grad.h"
#include "kernels/token_lane_schedule.h"

namespace pybsp {

// Throws std::invalid_argument unless the index arrays describe a BSR pattern on the
// grid: every later access to memory relies on it.
inline void check_pattern(const int32_t* crow, int64_t grid_rows, const int32_t* col,
                          int64_t nnz, int64_t grid_cols) {
  if (crow[0] != 0 || crow[grid_rows] != nnz) {
    throw std::invalid_argument(
        "crow_indices must run from 0 to the number of blocks, " + std::to_string(nnz) +
        "; got " + std::to_string(crow[0]) + " to " + std::to_string(crow[grid_rows]));
  }
  for (int64_t row = 0; row < grid_rows; ++row) {
    if (crow[row + 1] < crow[row] || crow[row + 1] > nnz) {
      throw std::invalid_argument("crow_indices must not decrease; entry " +
                                  std::to_string(row + 1) + " is " +
                                  std::to_string(crow[row + 1]));
    }
    int64_t previous = -1;
    for (int32_t b = crow[row]; b < crow[row + 1]; ++b) {
      if (col[b] <= previous || col[b] >= grid_cols) {
        throw std::invalid_argument(
            "col_indices must increase within a block row and stay under " +
            std::to_string(grid_cols) + "; block row " + std::to_string(row) + " has " +
            std::to_string(col[b]) + " after " + std::to_string(previous));
      }
      previous = col[b];
    }
  }
}

// A checked pattern with its schedule, bound to arrays that it keeps alive.
class BlockSparsePattern {
 public:
  // bfloat16: of the values, else float32.
  BlockSparsePattern(py::array crow, py::array col, std::pair<int64_t, int64_t> shape,
                     std::pair<int64_t, int64_t> block, bool bfloat16 = false)
      : crow_(std::move(crow)), col_(std::move(col)), bfloat16_(bfloat16) {
    view_.crow_indices = input<int32_t>(crow_, "crow_indices", 1);
    view_.col_indices = input<int32_t>(col_, "col_indices", 1);
    view_.out_features = shape.first;
    view_.in_features = shape.second;
    view_.block_rows = block.first;
    view_.block_cols = block.second;
    if (block.first < 1 || block.second < 1 || shape.first < 1 || shape.second < 1 ||
        shape.first % block.first || shape.second % block.second) {
      throw std::invalid_argument(
          "block shape (" + std::to_string(block.first) + ", " +
          std::to_string(block.second) + ") does not divide a matrix of shape (" +
          std::to_string(shape.first) + ", " + std::to_string(shape.second) + ")");
    }
    const int64_t grid_rows = shape.first / block.first;
    if (crow_.shape(0) != grid_rows + 1) {
      throw std::invalid_argument("crow_indices must have one entry more than the " +
                                  std::to_string(grid_rows) + " block rows; got " +
                                  std::to_string(crow_.shape(0)));
    }
    nnz_ = col_.shape(0);
    check_pattern(view_.crow_indices, grid_rows, view_.col_indices, nnz_,
                  shape.second / block.second);
    schedule_ = bfloat16 ? bfloat16_schedule(view_) : token_lane_schedule(view_);
  }

  // With the values at this address.
  BlockSparseView weight(uintptr_t values) const {
    BlockSparseView view = view_;
    if (bfloat16_) {
      view.bfloat16 = reinterpret_cast<const Bfloat16*>(values);
    } else {
      view.values = reinterpret_cast<const float*>(values);
    }
    return view;
  }

  // The weight, bias, residual and output of one product. Raw addresses, because this
  // is the call whose overhead counts: pybsp.ops has checked type, shape and contiguity
  // of every tensor.
  Product product(uintptr_t values, uintptr_t bias, int activation, uintptr_t residual,
                  uintptr_t y) const {
    const Epilogue epilogue{reinterpret_cast<const float*>(bias),
                            static_cast<Activation>(activation),
                            reinterpret_cast<const float*>(residual)};
    return {weight(values), &schedule_, epilogue, reinterpret_cast<float*>(y)};
  }

  // y = activation(x W^T + bias) + residual.
  void multiply(uintptr_t values, uintptr_t x, int64_t tokens, uintptr_t bias,
                int activation, uintptr_t residual, uintptr_t y, int threads) const {
    const Product one = product(values, bias, activation, residual, y);
    py::gil_scoped_release release;
    block_sparse_gemm(&one, 1, reinterpret_cast<const float*>(x), tokens, threads);
  }

  // dx = dy W; dW at the kept blocks and, unless its address is 0, dbias. Addresses as
  // above, of float32 values.
  void grad_x(uintptr_t values, uintptr_t dy, int64_t tokens, uintptr_t dx,
              int threads) const {
    if (bfloat16_) {
      throw std::invalid_argument(
          "gradients need float32 values; these are bfloat16: call .float() first");
    }
    py::gil_scoped_release release;
    block_sparse_grad_x(weight(values), transposed(),
                        reinterpret_cast<const float*>(dy), tokens,
                        reinterpret_cast<float*>(dx), threads);
  }

  void grad_values(uintptr_t dy, uintptr_t x, int64_t tokens, uintptr_t dvalues,
                   uintptr_t dbias, int threads) const {
    py::gil_scoped_release release;
    block_sparse_grad_values(view_, transposed(), reinterpret_cast<const float*>(dy),
                             reinterpret_cast<const float*>(x), tokens,
                             reinterpret_cast<float*>(dvalues),
                             reinterpret_cast<float*>(dbias), threads);
  }

  const BlockSparseView& view() const { return view_; }
  const Schedule& token_lanes() const { return schedule_; }
  int64_t nnz() const { return nnz_; }

  // The schedule's parts, and the block numbers of its tiles when it goes by column.
  py::tuple schedule() const {
    auto list = [](const std::vector<int32_t>& entries) {
      return py::array_t<int32_t>(static_cast<py::ssize_t>(entries.size()),
                                  entries.data());
    };
    return py::make_tuple(list(schedule_.part_rows), list(schedule_.part_tiles),
                          list(schedule_.tile_ptr), list(schedule_.blocks),
                          list(schedule_.rows));
  }

 private:
  // Only training asks for it, so it is made by the first gradient.
  const TransposedIndex& transposed() const {
    std::call_once(transposed_once_, [this] { transposed_ = transposed_index(view_); });
    return transposed_;
  }

  py::array crow_, col_;
  BlockSparseView view_{};
  bool bfloat16_;
  int64_t nnz_ = 0;
  Schedule schedule_;
  mutable std::once_flag transposed_once_;
  mutable TransposedIndex transposed_;
};

}  // namespace pybsp
