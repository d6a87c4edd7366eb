// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels use. The CPU is asked once; PYBSP_ISA forces one.
#pragma once

#include <string>
#include <vector>

namespace pybsp {

// avx2_vnni, avx512_vnni, amx (to avx512) and neon_dot add 8-bit products to the set
// before them, amx attention of 8-bit encoders too, and share everything else with it.
enum class Isa { generic, avx2, avx2_vnni, avx512, avx512_vnni, amx, neon, neon_dot };

// The spelling used in PYBSP_ISA, file names, test ids and tables.
const char* isa_name(Isa isa);

// Every variant this build contains and this CPU can execute, weakest first.
const std::vector<Isa>& available_isas();

// The variant in use: PYBSP_ISA when set, else the strongest available one.
// Throws std::invalid_argument when PYBSP_ISA is unknown or cannot run here.
Isa active_isa();

// Selects a variant by name for the whole process; not safe while kernels run.
// Throws std::invalid_argument as active_isa() does.
void set_active_isa(const std::string& name);

}  // namespace pybsp
