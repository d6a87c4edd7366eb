// SPDX-License-Identifier: Apache-2.0
// Products of 8-bit integers on the instruction set that this file is compiled for;
// int8_generic.h defines what the operations mean.
#pragma once

#include "simd/simd.h"

#if defined(PYBSP_ISA_generic)
#include "simd/int8_generic.h"
#elif defined(PYBSP_ISA_avx2) || defined(PYBSP_ISA_avx2_vnni)
#include "simd/int8_avx2.h"
#elif defined(PYBSP_ISA_avx512) || defined(PYBSP_ISA_avx512_vnni) || \
    defined(PYBSP_ISA_amx)
#include "simd/int8_avx512.h"
#elif defined(PYBSP_ISA_neon) || defined(PYBSP_ISA_neon_dot)
#include "simd/int8_neon.h"
#endif
