// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/block_sparse_gemm.h"
#include "kernels/token_lane_schedule.h"
#include "report.h"

namespace selftest {

struct GemmShape {
  int64_t out, in, r, c;
};

// A random block-sparse matrix that owns its arrays.
struct BlockSparse {
  BlockSparse(GemmShape shape, double density, Random& random);
  pybsp::BlockSparseView view() const;

  GemmShape shape;
  std::vector<int32_t> crow_indices, col_indices;
  std::vector<float> values;
};

// In double precision, and by how much float32 may differ.
struct Expected {
  std::vector<double> values, bounds;
};

// Runs one matrix on the first `tokens` of its rows of x, for several counts. Cases of
// one seed, `in` and max_tokens have the same x.
class GemmCase {
 public:
  GemmCase(GemmShape shape, double density, int64_t max_tokens, uint64_t seed);

  // With and without bias, bit-equal on 1, 2 and 3 threads.
  void check(Report& report, int64_t tokens, pybsp::Activation activation) const;

  const std::string& name() const { return name_; }
  const GemmShape& shape() const { return weight_.shape; }
  const float* x() const { return x_.data() + 1; }
  const float* bias() const { return bias_.data() + 1; }
  // Whether a token has the same bits in any batch.
  bool ordered() const {
    return weight_.shape.r > 1 || weight_.shape.c < pybsp::kMinColumnRun;
  }
  pybsp::Product product(pybsp::Epilogue epilogue, float* y) const {
    return {weight_.view(), &schedule_, epilogue, y};
  }
  Expected expected(int64_t tokens, pybsp::Epilogue epilogue) const;

 private:
  void check(Report& report, int64_t tokens, pybsp::Activation activation,
             bool with_bias) const;

  std::string name_;
  BlockSparse weight_;
  pybsp::Schedule schedule_;
  std::vector<float> x_;           // one float longer: used from 1, never aligned
  std::vector<float> bias_;        // the same
  std::vector<double> sums_;       // (max_tokens, out) x W^T
  std::vector<double> magnitude_;  // (max_tokens, out) |x| |W|^T
  std::vector<int64_t> terms_;     // (out) products in a sum
};

double activate(pybsp::Activation activation, double y);
const char* activation_name(pybsp::Activation activation);

constexpr pybsp::Activation kActivations[] = {
    pybsp::Activation::none, pybsp::Activation::relu, pybsp::Activation::gelu,
    pybsp::Activation::gelu_tanh, pybsp::Activation::silu};

}  // namespace selftest
