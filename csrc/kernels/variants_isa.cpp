// SPDX-License-Identifier: Apache-2.0
#include "kernels/variants_isa.h"

#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

const Variants& variants() {
  static constexpr Variants table = {
      kLanes,
      3,
      &block_rows_float32,
      &block_rows_bfloat16,
      &int8_kernels,
      pack_tokens,
      widen,
      multiply_rows,
      multiply_columns,
      unpack_tokens,
      finish,
      multiply_few_tokens,
      attention,
      [] {},
      attention_scratch,
      layer_norm,
      rotate,
      gate,
      multiply_runs,
      multiply_block_columns,
      sampled_products,
      add_feature_sums,
      fma_chains,
      sum_floats,
  };
  return table;
}

}  // namespace pybsp::PYBSP_ISA
