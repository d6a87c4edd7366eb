// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_sparse_gemm.h"

#include <tuple>
#include <vector>

#include "bindings/int8_matrix.h"
#include "bindings/module.h"
#include "bindings/pattern.h"
#include "kernels/token_tiles.h"
#include "kernels/variants.h"
#include "runtime/isa.h"

namespace pybsp {
namespace {

// (pattern, values, bias, activation, residual, y): the arguments of one product.
using ProductArguments = std::tuple<const BlockSparsePattern*, uintptr_t, uintptr_t,
                                    int, uintptr_t, uintptr_t>;

void multiply_many(const std::vector<ProductArguments>& arguments, uintptr_t x,
                   int64_t tokens, bool tiles, int threads) {
  std::vector<Product> products;
  for (const auto& [pattern, values, bias, activation, residual, y] : arguments) {
    products.push_back(pattern->product(values, bias, activation, residual, y));
  }
  const auto multiply = tiles ? block_sparse_gemm_tiles : block_sparse_gemm;
  py::gil_scoped_release release;
  multiply(products.data(), static_cast<int64_t>(products.size()),
           reinterpret_cast<const float*>(x), tokens, threads);
}

}  // namespace

void register_block_sparse_gemm(py::module_& module) {
  using py::arg;
  py::class_<BlockSparsePattern>(module, "BlockSparsePattern")
      .def(py::init<py::array, py::array, std::pair<int64_t, int64_t>,
                    std::pair<int64_t, int64_t>, bool>(),
           arg("crow_indices"), arg("col_indices"), arg("shape"), arg("block_shape"),
           arg("bfloat16") = false)
      .def("multiply", &BlockSparsePattern::multiply, arg("values"), arg("x"),
           arg("tokens"), arg("bias"), arg("activation"), arg("residual"), arg("y"),
           arg("threads"))
      .def("grad_x", &BlockSparsePattern::grad_x, arg("values"), arg("dy"),
           arg("tokens"), arg("dx"), arg("threads"))
      .def("grad_values", &BlockSparsePattern::grad_values, arg("dy"), arg("x"),
           arg("tokens"), arg("dvalues"), arg("dbias"), arg("threads"))
      .def_property_readonly("nnz", &BlockSparsePattern::nnz)
      .def("schedule", &BlockSparsePattern::schedule);
  py::class_<Int8Matrix>(module, "Int8Matrix")
      .def(py::init<py::array, py::array, const py::array&, const py::array&,
                    std::pair<int64_t, int64_t>, std::pair<int64_t, int64_t>>(),
           arg("crow_indices"), arg("col_indices"), arg("values"), arg("scales"),
           arg("shape"), arg("block_shape"))
      .def("multiply", &Int8Matrix::multiply, arg("x"), arg("tokens"),
           arg("input_scale"), arg("bias"), arg("activation"), arg("residual"),
           arg("y"), arg("threads"))
      .def_property_readonly("nbytes", &Int8Matrix::bytes);
  module.def("multiply_many", &multiply_many, arg("products"), arg("x"), arg("tokens"),
             arg("tiles"), arg("threads"));
  module.def(
      "tile_lanes",
      [](int64_t tokens) { return tile_lanes(tokens, variants(active_isa())); },
      arg("tokens"));
  const auto address = [](uintptr_t at) { return reinterpret_cast<float*>(at); };
  module.def(
      "pack_tiles",
      [=](uintptr_t x, int64_t tokens, int64_t features, uintptr_t tiles, int threads) {
        py::gil_scoped_release release;
        pack_tiles(address(x), tokens, features, address(tiles), threads);
      },
      arg("x"), arg("tokens"), arg("features"), arg("tiles"), arg("threads"));
  module.def(
      "unpack_tiles",
      [=](uintptr_t tiles, int64_t tokens, int64_t features, uintptr_t y, int threads) {
        py::gil_scoped_release release;
        unpack_tiles(address(tiles), tokens, features, address(y), threads);
      },
      arg("tiles"), arg("tokens"), arg("features"), arg("y"), arg("threads"));
}

}  // namespace pybsp
