// SPDX-License-Identifier: Apache-2.0
// The yardstick of the benchmarks: multiply-adds on registers alone.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

// Twelve chains cover two FMA units of five cycles' latency and fit sixteen registers.
float fma_chains(int64_t rounds) {
  constexpr int kChains = 12;
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i));
  const Vec a = set1(0.999f), b = set1(0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) acc[0] = add(acc[0], acc[i]);
  return reduce_add(acc[0]);
}

}  // namespace pybsp::PYBSP_ISA
