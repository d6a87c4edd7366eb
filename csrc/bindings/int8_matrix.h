// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bindings/pattern.h"
#include "kernels/int8_products.h"
#include "kernels/int8_weights.h"

namespace pybsp {

// Block-sparse weights of 8 bits on a checked pattern. They are copied into the order
// of the kernels.
class Int8Matrix {
 public:
  Int8Matrix(py::array crow, py::array col, const py::array& q, const py::array& scales,
             std::pair<int64_t, int64_t> shape, std::pair<int64_t, int64_t> block)
      : pattern_(std::move(crow), std::move(col), shape, block),
        weights_(pattern_.view(), checked_values(q), checked_scales(scales)) {}

  Product product(float input_scale, uintptr_t bias, int activation, uintptr_t residual,
                  uintptr_t y) const {
    Product one = pattern_.product(0, bias, activation, residual, y);
    one.schedule = &weights_.schedule();
    one.int8 = &weights_;
    one.input_scale = input_scale;
    return one;
  }

  // y = activation(x W^T + bias) + residual. Addresses as for BlockSparsePattern.
  void multiply(uintptr_t x, int64_t tokens, float input_scale, uintptr_t bias,
                int activation, uintptr_t residual, uintptr_t y, int threads) const {
    const Product one = product(input_scale, bias, activation, residual, y);
    py::gil_scoped_release release;
    block_sparse_gemm(&one, 1, reinterpret_cast<const float*>(x), tokens, threads);
  }

  int64_t bytes() const { return weights_.bytes(); }

 private:
  const int8_t* checked_values(const py::array& q) const {
    const int8_t* values = input<int8_t>(q, "values", 3);
    const BlockSparseView& view = pattern_.view();
    if (q.shape(0) != pattern_.nnz() || q.shape(1) != view.block_cols ||
        q.shape(2) != view.block_rows) {
      throw std::invalid_argument(
          "values must be (nnz, c, r) = (" + std::to_string(pattern_.nnz()) + ", " +
          std::to_string(view.block_cols) + ", " + std::to_string(view.block_rows) +
          "); got shape " + shape_text(q));
    }
    if (view.in_features > kMaxInt8Inputs) {
      throw std::invalid_argument("8-bit products are exact up to " +
                                  std::to_string(kMaxInt8Inputs) + " inputs; got " +
                                  std::to_string(view.in_features) +
                                  ": keep this layer float32");
    }
    return values;
  }
  const float* checked_scales(const py::array& scales) const {
    const float* values = input<float>(scales, "scales", 1);
    if (scales.shape(0) != pattern_.view().out_features) {
      throw std::invalid_argument("scales must have one entry an output, " +
                                  std::to_string(pattern_.view().out_features) +
                                  "; got shape " + shape_text(scales));
    }
    return values;
  }

  BlockSparsePattern pattern_;
  Int8Weights weights_;
};

}  // namespace pybsp
