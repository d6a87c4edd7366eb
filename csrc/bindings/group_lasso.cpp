// SPDX-License-Identifier: Apache-2.0
// Training operations: norms, reweighting, penalty, proximal step and masks.
#include "kernels/group_lasso.h"

#include "bindings/arrays.h"
#include "bindings/module.h"
#include "kernels/block_mask.h"
#include "kernels/block_norms.h"
#include "kernels/reweight.h"

namespace pybsp {
namespace {

// (block rows, block columns), converted by pybind11 from a Python pair.
using Block = std::pair<int64_t, int64_t>;

void block_norms_array(const py::array& weight, Block block, py::array norms,
                       int threads) {
  const BlockGrid grid = block_grid(weight, "weight", block.first, block.second);
  check_per_block(norms, "norms", grid);
  float* to = output<float>(norms, "norms", 2);
  with_element(weight, "weight", [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(weight.data());
    py::gil_scoped_release release;
    block_norms(from, grid, to, threads);
  });
}

void reweight_array(const py::array& norms, float eps, py::array factors) {
  const float* from = input<float>(norms, "norms", 1);
  float* to = output<float>(factors, "factors", 1);
  if (norms.shape(0) != factors.shape(0)) {
    throw std::invalid_argument("norms and factors must have the same size");
  }
  reweight(from, norms.shape(0), eps, to);
}

double group_lasso_grad_array(py::array grad, const py::array& weight,
                              const py::array& factors, float lam, Block block,
                              int threads) {
  const BlockGrid grid = block_grid(weight, "weight", block.first, block.second);
  const int64_t grad_stride = row_stride(grad, "grad");
  if (grad.shape(0) != weight.shape(0) || grad.shape(1) != weight.shape(1)) {
    throw std::invalid_argument("grad of shape " + shape_text(grad) +
                                " must have the weight's shape " + shape_text(weight));
  }
  check_per_block(factors, "factors", grid);
  const float* factor = input<float>(factors, "factors", 2);
  if (!grad.dtype().equal(weight.dtype())) {
    throw py::type_error("grad and weight must have the same element type");
  }
  void* changed = grad.mutable_data();
  return with_element(weight, "weight", [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(weight.data());
    py::gil_scoped_release release;
    return group_lasso_grad(static_cast<T*>(changed), grad_stride, from, factor, lam,
                            grid, threads);
  });
}

void group_lasso_prox_array(py::array weight, const py::array& thresholds, float step,
                            Block block, int threads) {
  const BlockGrid grid = block_grid(weight, "weight", block.first, block.second);
  check_per_block(thresholds, "thresholds", grid);
  const float* threshold = input<float>(thresholds, "thresholds", 2);
  void* changed = weight.mutable_data();
  with_element(weight, "weight", [&](auto element) {
    auto* to = static_cast<decltype(element)*>(changed);
    py::gil_scoped_release release;
    group_lasso_prox(to, threshold, step, grid, threads);
  });
}

void block_mask_array(const py::array& scores, int64_t keep, py::array mask) {
  const float* from = input<float>(scores, "scores", 1);
  bool* to = output<bool>(mask, "mask", 1);
  if (scores.shape(0) != mask.shape(0) || keep < 0 || keep > scores.shape(0)) {
    throw std::invalid_argument("keep = " + std::to_string(keep) + " of " +
                                std::to_string(scores.shape(0)) + " blocks");
  }
  py::gil_scoped_release release;
  block_mask(from, scores.shape(0), keep, to);
}

void apply_block_mask_array(py::array weight, const py::array& mask, Block block,
                            int threads) {
  const BlockGrid grid = block_grid(weight, "weight", block.first, block.second);
  check_per_block(mask, "mask", grid);
  const bool* keep = input<bool>(mask, "mask", 2);
  void* changed = weight.mutable_data();
  with_element(weight, "weight", [&](auto element) {
    auto* to = static_cast<decltype(element)*>(changed);
    py::gil_scoped_release release;
    apply_block_mask(to, keep, grid, threads);
  });
}

}  // namespace

void register_group_lasso(py::module_& module) {
  using py::arg;
  module.def("block_norms", &block_norms_array, arg("weight"), arg("block_shape"),
             arg("norms"), arg("threads"));
  module.def("reweight", &reweight_array, arg("norms"), arg("eps"), arg("factors"));
  module.def("group_lasso_grad", &group_lasso_grad_array, arg("grad"), arg("weight"),
             arg("factors"), arg("lam"), arg("block_shape"), arg("threads"));
  module.def("group_lasso_prox", &group_lasso_prox_array, arg("weight"),
             arg("thresholds"), arg("step"), arg("block_shape"), arg("threads"));
  module.def("block_mask", &block_mask_array, arg("scores"), arg("keep"), arg("mask"));
  module.def("apply_block_mask", &apply_block_mask_array, arg("weight"), arg("mask"),
             arg("block_shape"), arg("threads"));
}

}  // namespace pybsp
