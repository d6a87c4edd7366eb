// SPDX-License-Identifier: Apache-2.0
#include "kernels/fma_peak.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/scratch.h"

namespace pybsp {
namespace {

// Operations a second in the best of several runs of body().
template <typename Body>
double best_rate(double operations, Body body) {
  double best = 0.0;
  for (int run = 0; run < 10; ++run) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> elapsed =
        std::chrono::steady_clock::now() - start;
    best = std::max(best, operations / elapsed.count());
  }
  return best;
}

}  // namespace

double fma_peak() {
  constexpr int64_t kRounds = 200'000;
  const Variants& isa = variants(active_isa());
  volatile float sink = 0.0f;
  const double rate = best_rate(2.0 * 24 * isa.lanes * static_cast<double>(kRounds),
                                [&] { sink = isa.fma_chains(kRounds); });
  (void)sink;
  return rate;
}

double dot_peak() {
  constexpr int64_t kRounds = 200'000;
  const Variants& isa = variants(active_isa());
  volatile int32_t sink = 0;
  const double rate = best_rate(2.0 * 4 * 24 * isa.lanes * static_cast<double>(kRounds),
                                [&] { sink = isa.int8->dot_chains(kRounds); });
  (void)sink;
  return rate;
}

double tile_peak() {
  // 512 columns, so that starting a tile hardly counts, of a few inputs over and over:
  // 16 KB of weights and up to 12 KB of inputs.
  constexpr int64_t kOutputs = 8, kColumns = 512, kRounds = 1000;
  const Variants& isa = variants(active_isa());
  const int64_t width = int64_t{isa.lanes} * isa.max_vectors;
  constexpr int32_t kInputs = 64;
  std::vector<int32_t> cols(kColumns);
  for (size_t i = 0; i < cols.size(); ++i) {
    cols[i] = static_cast<int32_t>(i) * 7 % kInputs;
  }
  const int32_t crow[] = {0, kColumns};
  const std::vector<float> values(kColumns * kOutputs, 0.5f);
  float* const x = scratch_floats((kInputs + kOutputs) * width);
  float* const y = x + kInputs * width;
  std::fill(x, y, 0.25f);
  const BlockSparseView weight{kOutputs, kInputs,     kOutputs,     1,
                               crow,     cols.data(), values.data()};
  const double operations =
      2.0 * static_cast<double>(kOutputs * kColumns * width * kRounds);
  return best_rate(operations, [&] {
    for (int64_t round = 0; round < kRounds; ++round) {
      isa.multiply_rows(weight, 0, 1, x, isa.max_vectors, nullptr, y);
    }
  });
}

}  // namespace pybsp
