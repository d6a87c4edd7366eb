// SPDX-License-Identifier: Apache-2.0
#include "bindings/module.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native operations of pybsp; call them through pybsp.ops.";
  pybsp::register_runtime(module);
  pybsp::register_group_lasso(module);
  pybsp::register_block_sparse_gemm(module);
  pybsp::register_encoder(module);
  pybsp::register_dict_versions(module);
}
