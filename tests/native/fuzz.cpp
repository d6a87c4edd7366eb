// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "bfloat16_cases.h"
#include "cases.h"
#include "gemm_cases.h"
#include "grad_cases.h"
#include "group_lasso_cases.h"
#include "int8_cases.h"
#include "product_cases.h"

namespace selftest {

void fuzz(Report& report, Random& random) {
  const int64_t r = random.between(1, 40), c = random.between(1, 40);
  const int64_t grid_rows = random.between(1, 240 / r);
  const int64_t grid_cols = random.between(1, 240 / c);
  if (random.between(0, 3) == 0) {
    const GridShape shape{grid_rows, grid_cols, r, c, random.between(0, 5)};
    GroupLassoCase(shape, random).check(report);
    return;
  }
  const double density = static_cast<double>(random.unit());
  const int64_t tokens = random.between(1, 150);
  const uint64_t seed = random.bits();
  const auto activation = static_cast<pybsp::Activation>(random.between(0, 4));
  const GemmCase matrix({grid_rows * r, grid_cols * c, r, c}, density, tokens, seed);
  matrix.check(report, tokens, activation);
  matrix.check(report, random.between(0, tokens), activation);
  const GradCase gradients({grid_rows * r, grid_cols * c, r, c}, density, tokens, seed);
  gradients.check(report, tokens);
  const Int8Case int8(
      {grid_rows * r, grid_cols * c, r, c}, density, tokens,
      random.between(0, 1) == 0 ? Int8Values::random : Int8Values::extreme, seed);
  int8.check(report, tokens);
  const Bfloat16Case bfloat16({grid_rows * r, grid_cols * c, r, c}, density, tokens,
                              seed);
  bfloat16.check(report, tokens);
  bfloat16.check(report, random.between(1, std::min<int64_t>(tokens, 4)));
  const int64_t run = 4 * random.between(4, 12);
  Int8Case({random.between(1, 300), run * random.between(2, 5), 1, run}, density,
           tokens, Int8Values::random, seed)
      .check(report, tokens);
  const int64_t in = grid_cols * c;
  const ProductCase products({{grid_rows * r, in, r, c},
                              {random.between(1, 90), in, 1, in},
                              {random.between(1, 9) * r, in, r, 1},
                              {random.between(1, 90), in, 1, c}},
                             density, tokens, seed);
  products.check(report, tokens);
  check_random_attention(report, random);
}

}  // namespace selftest
