// SPDX-License-Identifier: Apache-2.0
// The yardstick of the benchmarks: multiply-adds on registers alone.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

// Twelve chains cover two FMA units of five cycles' latency and fit sixteen registers;
// cores with NEON have up to four units. What is added is the sum itself, the register
// that every instruction set writes to; no two chains start alike and are merged.
float fma_chains(int64_t rounds) {
  constexpr int kSets = kRegisters >= 32 ? 2 : 1, kChains = 12;
  Vec acc[kSets][kChains];
  PYBSP_UNROLL
  for (int set = 0; set < kSets; ++set) {
    PYBSP_UNROLL
    for (int i = 0; i < kChains; ++i) acc[set][i] = set1(1.0f + 2.0f * i + set);
  }
  const Vec growth = set1(1e-7f);
  for (int64_t round = 0; round < rounds * (2 / kSets); ++round) {
    PYBSP_UNROLL
    for (int set = 0; set < kSets; ++set) {
      PYBSP_UNROLL
      for (int i = 0; i < kChains; ++i) {
        acc[set][i] = fma(acc[set][i], growth, acc[set][i]);
      }
    }
  }
  Vec sum = zero();
  PYBSP_UNROLL
  for (int set = 0; set < kSets; ++set) {
    PYBSP_UNROLL
    for (int i = 0; i < kChains; ++i) sum = add(sum, acc[set][i]);
  }
  return reduce_add(sum);
}

}  // namespace pybsp::PYBSP_ISA
