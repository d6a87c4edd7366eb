// SPDX-License-Identifier: Apache-2.0
// The vector type of the instruction set that this file is compiled for. The build
// defines PYBSP_ISA as its name and one PYBSP_ISA_<name>; sets that add nothing but
// integer products share the vectors of another one. Everything has internal
// linkage and no standard template is used: a weak AVX-512 copy of a shared inline
// function could be linked into code that runs on every CPU.
#pragma once

#if defined(PYBSP_ISA_generic)
#include "simd/generic.h"
#elif defined(PYBSP_ISA_avx2)
#include "simd/avx2.h"
#elif defined(PYBSP_ISA_avx512)
#include "simd/avx512.h"
#elif defined(PYBSP_ISA_neon)
#include "simd/neon.h"
#elif defined(PYBSP_ISA_avx2_vnni)
#include "simd/avx2.h"
namespace pybsp::avx2_vnni {
using namespace avx2;
}
#elif defined(PYBSP_ISA_avx512_vnni) || defined(PYBSP_ISA_amx)
#include "simd/avx512.h"
namespace pybsp::PYBSP_ISA {
using namespace avx512;
}
#elif defined(PYBSP_ISA_neon_dot)
#include "simd/neon.h"
namespace pybsp::neon_dot {
using namespace neon;
}
#else
#error "compile with PYBSP_ISA=<isa> and PYBSP_ISA_<isa>"
#endif

// Before every loop over an array of vectors that must stay in registers. GCC turns
// such arrays into registers before it unrolls by itself, too late for a loop that it
// has not been asked to unroll: the array is then kept in memory and copied.
#if defined(__clang__)
#define PYBSP_UNROLL _Pragma("unroll")
#else
#define PYBSP_UNROLL _Pragma("GCC unroll 16")
#endif
