// SPDX-License-Identifier: Apache-2.0
// factors[b] = 1 / (norms[b] + eps), the reweighting of Li et al. 2020. In place is
// allowed. Portable code only: a few thousand divisions a refresh.
#pragma once

#include <cstdint>

namespace pybsp {

void reweight(const float* norms, int64_t count, float eps, float* factors);

}  // namespace pybsp
