// SPDX-License-Identifier: Apache-2.0
// mask[b] = true for exactly `keep` of `count` blocks: those with the largest scores,
// and of equal scores those that come first. Scores must not be NaN; 0 <= keep <=
// count. O(count) on average; throws std::bad_alloc.
#pragma once

#include <cstdint>

namespace pybsp {

void block_mask(const float* scores, int64_t count, int64_t keep, bool* mask);

}  // namespace pybsp
