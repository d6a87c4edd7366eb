// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>

#include <utility>

#include "bindings/module.h"
#include "kernels/fma_peak.h"
#include "kernels/int8_products.h"
#include "kernels/read_bandwidth.h"
#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace py = pybind11;

namespace pybsp {

void register_runtime(py::module_& module) {
  module.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  module.def("set_active_isa", &set_active_isa, py::arg("name"));
  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  module.def("fma_peak", &fma_peak, py::call_guard<py::gil_scoped_release>());
  module.def("dot_peak", &dot_peak, py::call_guard<py::gil_scoped_release>());
  module.def("tile_peak", &tile_peak, py::call_guard<py::gil_scoped_release>());
  module.def("read_bandwidth", &read_bandwidth, py::arg("bytes"),
             py::call_guard<py::gil_scoped_release>());
  module.def("max_int8_inputs", [] { return kMaxInt8Inputs; });
  module.def("l2_cache_bytes", &l2_cache_bytes);
  module.def("token_tile", [] {
    const Variants& isa = variants(active_isa());
    return std::make_pair(isa.lanes, isa.max_vectors);
  });
  module.def("build_info", [] {
    py::dict info;
    info["version"] = PYBSP_VERSION;
    info["compiler"] = __VERSION__;
    info["openmp"] = std::to_string(openmp_version());
    return info;
  });
}

}  // namespace pybsp
