// SPDX-License-Identifier: Apache-2.0
#include "kernels/block_mask.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace pybsp {

void block_mask(const float* scores, int64_t count, int64_t keep, bool* mask) {
  if (keep == 0 || keep == count) {
    std::fill(mask, mask + count, keep != 0);
    return;
  }
  std::vector<float> ordered(scores, scores + count);
  const auto last_kept = ordered.begin() + (keep - 1);
  std::nth_element(ordered.begin(), last_kept, ordered.end(), std::greater<>());
  const float threshold = *last_kept;
  int64_t ties_left = keep - std::count_if(ordered.begin(), last_kept + 1,
                                           [=](float s) { return s > threshold; });
  for (int64_t b = 0; b < count; ++b) {
    mask[b] = scores[b] > threshold || (scores[b] == threshold && ties_left-- > 0);
  }
}

}  // namespace pybsp
