// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace pybsp {

void register_block_sparse_gemm(pybind11::module_& module);
void register_dict_versions(pybind11::module_& module);
void register_encoder(pybind11::module_& module);
void register_group_lasso(pybind11::module_& module);
void register_runtime(pybind11::module_& module);

}  // namespace pybsp
