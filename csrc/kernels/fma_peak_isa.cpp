// SPDX-License-Identifier: Apache-2.0
// The yardstick of the benchmarks: multiply-adds on registers alone.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

// Twelve chains cover two FMA units of five cycles' latency and fit sixteen registers.
// What is added is the sum itself, the register that every instruction set writes to.
float fma_chains(int64_t rounds) {
  constexpr int kChains = 12;
  Vec acc[kChains];
  PYBSP_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i + 1));
  const Vec growth = set1(1e-7f);
  for (int64_t round = 0; round < rounds; ++round) {
    PYBSP_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], growth, acc[i]);
  }
  PYBSP_UNROLL
  for (int i = 1; i < kChains; ++i) acc[0] = add(acc[0], acc[i]);
  return reduce_add(acc[0]);
}

}  // namespace pybsp::PYBSP_ISA
