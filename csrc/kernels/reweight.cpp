// SPDX-License-Identifier: Apache-2.0
#include "kernels/reweight.h"

namespace pybsp {

void reweight(const float* norms, int64_t count, float eps, float* factors) {
  for (int64_t b = 0; b < count; ++b) factors[b] = 1.0f / (norms[b] + eps);
}

}  // namespace pybsp
