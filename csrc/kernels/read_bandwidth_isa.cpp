// SPDX-License-Identifier: Apache-2.0
// The yardstick of the operations that memory limits: loads alone.
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

// Eight sums cover two additions a cycle of four cycles' latency, which is as many as
// there are loads.
float sum_floats(const float* data, int64_t count, int64_t rounds) {
  constexpr int kSums = 8;
  Vec sums[kSums];
  for (int k = 0; k < kSums; ++k) sums[k] = zero();
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < count; i += kSums * kLanes) {
      for (int k = 0; k < kSums; ++k) {
        sums[k] = add(sums[k], load(data + i + k * kLanes));
      }
    }
  }
  for (int k = 1; k < kSums; ++k) sums[0] = add(sums[0], sums[k]);
  return reduce_add(sums[0]);
}

}  // namespace pybsp::PYBSP_ISA
