// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {
namespace {

// Rows of accumulators for a tile that is kVectors wide. Thirty-two registers hold
// 8 x 3 accumulators, 3 inputs and a weight. Sixteen hold 4 x 3 + 3 + 1 (or 8 x 1); the
// two halves of eight outputs are then two passes over the inputs: 7 loads for 12 FMAs
// leaves the FMA units the limit, where 8 x 1 alone would need 9 loads for 8.
template <int kVectors>
constexpr int kTileRows = kRegisters >= 32 || kVectors == 1 ? 8 : 4;

}  // namespace
}  // namespace pybsp::PYBSP_ISA
