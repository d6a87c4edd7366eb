// SPDX-License-Identifier: Apache-2.0
// 8-bit products of vectors; see int8_products.h.
#include "kernels/int8_column_products.h"
#include "kernels/variants_isa.h"

namespace pybsp::PYBSP_ISA {
namespace {

template <int kVectors>
void multiply_width(const Int8Products& products) {
  const Int8View& weights = products.weights;
  if (weights.by_column) return multiply_columns<kVectors>(products);
  for (int64_t i = products.first; i < products.last; ++i) {
    const Int8Tile& tile = weights.tiles[i];
    multiply_whole_tile<kVectors>(products, tile,
                                  {weights.weights + tile.by_quad, 4 * tile.rows, 4});
  }
}

void multiply(const Int8Products& products) {
  switch (products.vectors) {
    case 1:
      return multiply_width<1>(products);
    case 2:
      return multiply_width<2>(products);
    default:
      return multiply_width<3>(products);
  }
}

}  // namespace

const Int8Kernels int8_kernels = {quantize_inputs, multiply, dot_chains,
                                  Int8Order::by_quad};

}  // namespace pybsp::PYBSP_ISA
