// SPDX-License-Identifier: Apache-2.0
#include "kernels/variants_isa.h"
#include "simd/simd.h"

namespace pybsp::PYBSP_ISA {

void widen(const Bfloat16* values, int64_t count, float* floats) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(floats + i, load(values + i));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store(floats + i, load(values + i, rest), rest);
  }
}

}  // namespace pybsp::PYBSP_ISA
