// SPDX-License-Identifier: Apache-2.0
#include "grad_cases.h"

#include <cmath>

#include "cases.h"
#include "kernels/block_sparse_grad.h"

namespace selftest {

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

double number(const std::vector<float>& values, int64_t i) {
  return static_cast<double>(values[at(i)]);
}

}  // namespace

GradCase::GradCase(GemmShape shape, double density, int64_t max_tokens, uint64_t seed)
    : name_("(" + std::to_string(shape.out) + ", " + std::to_string(shape.in) +
            ") blocks (" + std::to_string(shape.r) + ", " + std::to_string(shape.c) +
            ") density " + std::to_string(density).substr(0, 4)),
      weight_([&] {
        Random random(seed);
        return BlockSparse(shape, density, random);
      }()),
      index_(pybsp::transposed_index(weight_.view())) {
  Random random(seed + 1);
  x_ = random.floats(max_tokens * shape.in + 1);
  dy_ = random.floats(max_tokens * shape.out + 1);
}

void GradCase::check(Report& report, int64_t tokens) const {
  const std::string what = name_ + " tokens " + std::to_string(tokens);
  check_x(report, tokens, "block_sparse_grad_x " + what);
  check_values(report, tokens, "block_sparse_grad_values " + what);
}

void GradCase::check_x(Report& report, int64_t tokens, const std::string& what) const {
  const GemmShape& s = weight_.shape;
  const int64_t count = tokens * s.in;
  std::vector<double> want(at(count), 0.0), bound(want.size());
  std::vector<double> magnitude(want.size(), 0.0);
  std::vector<int64_t> terms(at(s.in), 0);
  for (int64_t row = 0; row < s.out / s.r; ++row) {
    for (int64_t b = weight_.crow_indices[at(row)];
         b < weight_.crow_indices[at(row + 1)]; ++b) {
      for (int64_t i = 0; i < s.c * s.r; ++i) {
        const int64_t feature = weight_.col_indices[at(b)] * s.c + i / s.r;
        ++terms[at(feature)];
        for (int64_t token = 0; token < tokens; ++token) {
          const double product = number(weight_.values, b * s.c * s.r + i) *
                                 number(dy_, 1 + token * s.out + row * s.r + i % s.r);
          want[at(token * s.in + feature)] += product;
          magnitude[at(token * s.in + feature)] += std::fabs(product);
        }
      }
    }
  }
  for (size_t i = 0; i < want.size(); ++i) {
    const int64_t n = terms[i % at(s.in)] + 2;
    bound[i] = static_cast<double>(n) * kUnitRoundoff * magnitude[i];
  }
  std::vector<float> first;
  for (int threads : {1, 2, 3}) {
    // Outputs start as NaN, so that one that is never written is found.
    std::vector<float> dx(want.size(), std::nanf(""));
    pybsp::block_sparse_grad_x(weight_.view(), index_, dy_.data() + 1, tokens,
                               dx.data(), threads);
    if (threads == 1) {
      report.close(what, dx.data(), want.data(), bound.data(), count, s.in);
      report.tiles.add(dx.data(), count);
      first = dx;
    } else {
      report.same_bits(what + " on " + std::to_string(threads) + " threads",
                       first.data(), dx.data(), count, s.in);
    }
  }
}

void GradCase::check_values(Report& report, int64_t tokens,
                            const std::string& what) const {
  const GemmShape& s = weight_.shape;
  const int64_t count = static_cast<int64_t>(weight_.values.size());
  std::vector<double> want(at(count), 0.0), bound(want.size());
  for (int64_t row = 0; row < s.out / s.r; ++row) {
    for (int64_t b = weight_.crow_indices[at(row)];
         b < weight_.crow_indices[at(row + 1)]; ++b) {
      for (int64_t i = 0; i < s.c * s.r; ++i) {
        const int64_t feature = weight_.col_indices[at(b)] * s.c + i / s.r;
        double magnitude = 0.0;
        for (int64_t token = 0; token < tokens; ++token) {
          const double product = number(dy_, 1 + token * s.out + row * s.r + i % s.r) *
                                 number(x_, 1 + token * s.in + feature);
          want[at(b * s.c * s.r + i)] += product;
          magnitude += std::fabs(product);
        }
        bound[at(b * s.c * s.r + i)] =
            static_cast<double>(tokens + 2) * kUnitRoundoff * magnitude;
      }
    }
  }
  std::vector<double> sums(at(s.out), 0.0), sum_bounds(sums.size(), 0.0);
  for (int64_t i = 0; i < tokens * s.out; ++i) {
    const double one = number(dy_, 1 + i);
    sums[at(i % s.out)] += one;
    sum_bounds[at(i % s.out)] +=
        static_cast<double>(tokens) * kUnitRoundoff * std::fabs(one);
  }
  std::vector<float> first;
  for (int threads : {1, 2, 3}) {
    std::vector<float> dvalues(want.size(), std::nanf(""));
    std::vector<float> dbias(at(s.out), std::nanf(""));
    // With and without a bias the same bits.
    pybsp::block_sparse_grad_values(weight_.view(), index_, dy_.data() + 1,
                                    x_.data() + 1, tokens, dvalues.data(),
                                    threads == 2 ? nullptr : dbias.data(), threads);
    if (threads != 2) {
      report.close(what + " bias", dbias.data(), sums.data(), sum_bounds.data(), s.out,
                   s.out);
    }
    if (threads == 1) {
      report.close(what, dvalues.data(), want.data(), bound.data(), count, s.r);
      report.rest.add(dvalues.data(), count);
      first = dvalues;
    } else {
      report.same_bits(what + " on " + std::to_string(threads) + " threads",
                       first.data(), dvalues.data(), count, s.r);
    }
  }
}

void check_block_sparse_grad(Report& report, bool quick) {
  // The last two are one block: tall and wide.
  const GemmShape shapes[] = {{96, 90, 8, 1},   {96, 92, 16, 4}, {68, 72, 4, 4},
                              {50, 96, 1, 12},  {50, 96, 1, 48}, {45, 96, 1, 3},
                              {84, 61, 12, 1},  {75, 63, 5, 3},  {48, 40, 2, 5},
                              {96, 96, 32, 32}, {77, 51, 1, 1},  {70, 33, 70, 33},
                              {9, 97, 9, 97}};
  std::vector<int64_t> counts = {0, 1, 3, 8, 15, 16, 17, 33, 48, 49, 67, 131};
  if (quick) counts = {0, 1, 5, 17, 49};
  uint64_t seed = 1000;
  for (const GemmShape& shape : shapes) {
    for (double density : {0.0, 0.3, 1.0}) {
      const GradCase matrix(shape, density, counts.back(), seed += 2);
      for (int64_t tokens : counts) matrix.check(report, tokens);
    }
  }
  // Several panels of tokens, groups of tiles, parts and chunks of features.
  for (const GemmShape& shape : {GemmShape{1200, 48, 8, 1},
                                 {48, 1200, 8, 1},
                                 {48, 1200, 16, 4},
                                 {1200, 48, 1, 12}}) {
    const int64_t tokens = quick ? 100 : 800;
    GradCase(shape, 0.1, tokens, seed += 2).check(report, tokens);
  }
}

}  // namespace selftest
