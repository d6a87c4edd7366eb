// SPDX-License-Identifier: Apache-2.0
// The yardstick of 8-bit products: those of vectors, on registers alone.
#include "kernels/variants_isa.h"
#include "simd/int8.h"

namespace pybsp::PYBSP_ISA {

int32_t dot_chains(int64_t rounds) {
  constexpr int kChains = 12;
  Sums acc[kChains];
  PYBSP_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = set1_sums(i);
  const int8_t quad[4] = {1, 2, 3, 4};
  int8_t bytes[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) bytes[i] = static_cast<int8_t>(i);
  const Inputs x = prepare(load_bytes(bytes));
  const Weights w = broadcast_weights(quad);
  for (int64_t round = 0; round < 2 * rounds; ++round) {
    PYBSP_UNROLL
    for (int i = 0; i < kChains; ++i) acc[i] = add_dots(acc[i], x, w);
  }
  Sums sum = acc[0];
  PYBSP_UNROLL
  for (int i = 1; i < kChains; ++i) sum = add_sums(sum, acc[i]);
  float lanes[kLanes];
  store(lanes, to_floats(sum));
  return static_cast<int32_t>(lanes[0]);
}

}  // namespace pybsp::PYBSP_ISA
