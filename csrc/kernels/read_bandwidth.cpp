// SPDX-License-Identifier: Apache-2.0
#include "kernels/read_bandwidth.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernels/variants.h"
#include "runtime/isa.h"

namespace pybsp {

double read_bandwidth(int64_t bytes) {
  constexpr int64_t kLine = 64;        // bytes; a load across two lines counts twice
  constexpr int64_t kLeast = 1 << 28;  // bytes a run: a millisecond from L1
  const Variants& isa = variants(active_isa());
  const int64_t step = 8 * isa.lanes;
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float)) / step * step;
  // Written, not only mapped: pages never written are all the same one of zeros.
  std::vector<float> buffer(static_cast<size_t>(count + kLine), 0.5f);
  const float* data = buffer.data();
  while (reinterpret_cast<uintptr_t>(data) % kLine) ++data;
  const double read = static_cast<double>(count) * sizeof(float);
  const int64_t rounds = std::max<int64_t>(1, kLeast / bytes);
  double best = 0.0;
  volatile float sink = 0.0f;
  for (int run = 0; run < 10; ++run) {
    const auto start = std::chrono::steady_clock::now();
    sink = isa.sum_floats(data, count, rounds);
    const std::chrono::duration<double> elapsed =
        std::chrono::steady_clock::now() - start;
    best = std::max(best, read * static_cast<double>(rounds) / elapsed.count());
  }
  (void)sink;
  return best;
}

}  // namespace pybsp
