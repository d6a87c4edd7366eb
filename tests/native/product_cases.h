// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm_cases.h"
#include "report.h"

namespace selftest {

// Several products of one x, row-major and in tiles, with the epilogues mixed.
class ProductCase {
 public:
  // All shapes have the same `in`. The second matrix has no blocks.
  ProductCase(const std::vector<GemmShape>& shapes, double density, int64_t max_tokens,
              uint64_t seed);

  void check(Report& report, int64_t tokens) const;

 private:
  struct Call;

  Call call(size_t matrix, int64_t tokens) const;
  std::vector<std::vector<float>> row_major(const std::vector<Call>& calls,
                                            int64_t tokens, int threads) const;
  std::vector<std::vector<float>> in_tiles(const std::vector<Call>& calls,
                                           int64_t tokens, int threads) const;

  std::vector<GemmCase> matrices_;
  std::vector<std::vector<float>> residuals_;  // (max_tokens, out) of each matrix
};

}  // namespace selftest
