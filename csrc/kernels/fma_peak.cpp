// SPDX-License-Identifier: Apache-2.0
#include "kernels/fma_peak.h"

#include <algorithm>
#include <chrono>

#include "kernels/variants.h"
#include "runtime/isa.h"

namespace pybsp {

double fma_peak() {
  constexpr int64_t kRounds = 200'000;
  const Variants& isa = variants(active_isa());
  double best = 0.0;
  volatile float sink = 0.0f;
  for (int run = 0; run < 10; ++run) {
    const auto start = std::chrono::steady_clock::now();
    sink = isa.fma_chains(kRounds);
    const std::chrono::duration<double> elapsed =
        std::chrono::steady_clock::now() - start;
    const double operations = 2.0 * 24 * isa.lanes * static_cast<double>(kRounds);
    best = std::max(best, operations / elapsed.count());
  }
  (void)sink;
  return best;
}

}  // namespace pybsp
