// SPDX-License-Identifier: Apache-2.0
// Operations on a dense weight in blocks: norms, penalty, proximal step and masks.
#include "group_lasso_cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "cases.h"
#include "kernels/block_mask.h"
#include "kernels/group_lasso.h"
#include "kernels/reweight.h"

namespace selftest {

GroupLassoCase::GroupLassoCase(GridShape shape, Random& random)
    : grid_{shape.grid_rows, shape.grid_cols, shape.r, shape.c,
            shape.grid_cols * shape.c + shape.gap},
      name_("(" + std::to_string(shape.grid_rows * shape.r) + ", " +
            std::to_string(shape.grid_cols * shape.c) + ") blocks (" +
            std::to_string(shape.r) + ", " + std::to_string(shape.c) + ") gap " +
            std::to_string(shape.gap)) {
  weight_ = random.floats(grid_.grid_rows * grid_.block_rows * grid_.row_stride);
  grad_ = random.floats(static_cast<int64_t>(weight_.size()));
  factors_ = random.floats(blocks());
  for (float& factor : factors_) factor = 1.0f + factor;
  for (int64_t b = 0; b < blocks(); ++b) {
    const bool zero = random.between(0, 4) == 0;
    norms_.push_back(0.0);
    for_each(b, [&](size_t at) {
      if (zero) weight_[at] = 0.0f;
      const double w = static_cast<double>(weight_[at]);
      norms_.back() += w * w;
    });
    norms_.back() = std::sqrt(norms_.back());
  }
  // Sums of squares go over r rows and then over c columns, or the other way round;
  // the root halves the relative error.
  relative_ = (static_cast<double>(grid_.block_rows + grid_.block_cols) / 2 + 4) *
              kUnitRoundoff;
}

template <typename Body>
void GroupLassoCase::for_each(int64_t block, Body body) const {
  const int64_t first_row = block / grid_.grid_cols * grid_.block_rows;
  const int64_t first_col = block % grid_.grid_cols * grid_.block_cols;
  for (int64_t row = first_row; row < first_row + grid_.block_rows; ++row) {
    for (int64_t col = first_col; col < first_col + grid_.block_cols; ++col) {
      body(static_cast<size_t>(row * grid_.row_stride + col));
    }
  }
}

// Runs an operation on 1, 2 and 3 threads from the same start; all must agree.
template <typename Operation>
std::vector<float> GroupLassoCase::on_threads(Report& report, const std::string& what,
                                              const std::vector<float>& start,
                                              Operation operation) const {
  std::vector<float> first = start;
  operation(first.data(), 1);
  for (int threads : {2, 3}) {
    std::vector<float> again = start;
    operation(again.data(), threads);
    report.same_bits(what + " on " + std::to_string(threads) + " threads", first.data(),
                     again.data(), static_cast<int64_t>(first.size()),
                     grid_.row_stride);
  }
  report.rest.add(first.data(), static_cast<int64_t>(first.size()));
  return first;
}

void GroupLassoCase::check(Report& report) const {
  check_norms(report);
  check_grad(report);
  check_prox(report);
  check_mask(report);
  check_bfloat16(report);
}

void GroupLassoCase::check_norms(Report& report) const {
  const std::string what = "block_norms " + name_;
  const std::vector<float> unwritten(norms_.size(), std::nanf(""));
  const std::vector<float> norms =
      on_threads(report, what, unwritten, [&](float* to, int threads) {
        pybsp::block_norms(weight_.data(), grid_, to, threads);
      });
  std::vector<double> bound;
  for (double norm : norms_) bound.push_back(relative_ * norm);
  report.close(what, norms.data(), norms_.data(), bound.data(), blocks(),
               grid_.grid_cols);
  std::vector<float> factors(norms);
  pybsp::reweight(norms.data(), blocks(), 1e-3f, factors.data());
  std::vector<double> want;
  for (size_t b = 0; b < norms.size(); ++b) {
    want.push_back(1.0 / (static_cast<double>(norms[b]) + 1e-3));
    bound[b] = 4 * kUnitRoundoff * want[b];
  }
  report.close("reweight " + name_, factors.data(), want.data(), bound.data(), blocks(),
               grid_.grid_cols);
}

void GroupLassoCase::check_grad(Report& report) const {
  const std::string what = "group_lasso_grad " + name_;
  constexpr float kLam = 0.37f;
  const double lam = static_cast<double>(kLam);
  std::vector<double> penalties;
  const std::vector<float> grad =
      on_threads(report, what, grad_, [&](float* to, int threads) {
        penalties.push_back(pybsp::group_lasso_grad(to, grid_.row_stride,
                                                    weight_.data(), factors_.data(),
                                                    kLam, grid_, threads));
      });
  // What no block covers, the gaps between rows, must stay as it was: bound 0.
  std::vector<double> want(grad_.begin(), grad_.end()), bound(want.size(), 0.0);
  double penalty = 0.0;
  for (int64_t b = 0; b < blocks(); ++b) {
    const double norm = norms_[static_cast<size_t>(b)];
    const double factor = static_cast<double>(factors_[static_cast<size_t>(b)]);
    penalty += lam * factor * norm;
    if (norm == 0.0) continue;
    for_each(b, [&](size_t at) {
      const double step = lam * factor * static_cast<double>(weight_[at]) / norm;
      want[at] += step;
      bound[at] = (relative_ + 4 * kUnitRoundoff) * std::fabs(step) +
                  kUnitRoundoff * std::fabs(want[at]);
    });
  }
  report.close(what, grad.data(), want.data(), bound.data(),
               static_cast<int64_t>(grad.size()), grid_.row_stride);
  report.require(what + ": penalty", std::fabs(penalties[0] - penalty) <=
                                         (relative_ + kUnitRoundoff) * penalty);
  report.require(what + ": penalty on any number of threads",
                 penalties == std::vector<double>(penalties.size(), penalties.front()));
}

void GroupLassoCase::check_prox(Report& report) const {
  const std::string what = "group_lasso_prox " + name_;
  std::vector<float> thresholds;
  for (int64_t b = 0; b < blocks(); ++b) {
    const float scale = 2.0f * factors_[static_cast<size_t>(b)] - 1.0f;
    thresholds.push_back(std::max(0.0f, scale) *
                         static_cast<float>(norms_[static_cast<size_t>(b)]) / 2.0f);
  }
  std::vector<float> halves = thresholds;  // and a step of 2, which is exact
  for (float& half : halves) half /= 2.0f;
  const std::vector<float> weight =
      on_threads(report, what, weight_, [&](float* to, int threads) {
        pybsp::group_lasso_prox(to, halves.data(), 2.0f, grid_, threads);
      });
  std::vector<double> want(weight_.begin(), weight_.end()), bound(want.size(), 0.0);
  bool zeros = true;
  for (int64_t b = 0; b < blocks(); ++b) {
    const double norm = norms_[static_cast<size_t>(b)];
    const double threshold = static_cast<double>(thresholds[static_cast<size_t>(b)]);
    const double scale = norm > threshold ? 1.0 - threshold / norm : 0.0;
    const bool cut = norm * (1.0 + relative_) < threshold || norm == 0.0;
    for_each(b, [&](size_t at) {
      bound[at] = (relative_ + 4 * kUnitRoundoff) * std::fabs(want[at]);
      want[at] *= scale;
      if (cut) zeros = zeros && weight[at] == 0.0f && !std::signbit(weight[at]);
    });
  }
  report.close(what, weight.data(), want.data(), bound.data(),
               static_cast<int64_t>(weight.size()), grid_.row_stride);
  report.require(what + ": cut blocks are +0", zeros);
}

void GroupLassoCase::check_mask(Report& report) const {
  const std::string what = "apply_block_mask " + name_;
  const auto mask = std::make_unique<bool[]>(static_cast<size_t>(blocks()));
  std::vector<float> want = weight_;
  for (int64_t b = 0; b < blocks(); ++b) {
    mask[static_cast<size_t>(b)] = factors_[static_cast<size_t>(b)] > 1.0f;
    if (mask[static_cast<size_t>(b)]) continue;
    for_each(b, [&](size_t at) { want[at] = 0.0f; });
  }
  const std::vector<float> weight =
      on_threads(report, what, weight_, [&](float* to, int threads) {
        pybsp::apply_block_mask(to, mask.get(), grid_, threads);
      });
  report.same_bits(what, weight.data(), want.data(), static_cast<int64_t>(want.size()),
                   grid_.row_stride);
}

namespace {

// To nearest, ties to even, by comparing the distances to both neighbours.
pybsp::Bfloat16 to_bfloat16(float value) {
  const auto widened = [](uint32_t upper) {
    const uint32_t bits = upper << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return static_cast<double>(wide);
  };
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t near = bits >> 16, far = near + 1;
  const double wide = static_cast<double>(value);
  const double to_near = std::fabs(wide - widened(near));
  const double to_far = std::fabs(widened(far) - wide);
  const bool go_on = to_far < to_near || (to_far == to_near && near % 2 == 1);
  return {static_cast<uint16_t>(go_on ? far : near)};
}

float to_float(pybsp::Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

std::vector<pybsp::Bfloat16> to_bfloat16(const std::vector<float>& values) {
  std::vector<pybsp::Bfloat16> narrow;
  for (float value : values) narrow.push_back(to_bfloat16(value));
  return narrow;
}

std::vector<float> to_float(const std::vector<pybsp::Bfloat16>& values) {
  std::vector<float> wide;
  for (pybsp::Bfloat16 value : values) wide.push_back(to_float(value));
  return wide;
}

}  // namespace

// What float computes from the same elements, rounded once.
void GroupLassoCase::check_bfloat16(Report& report) const {
  const std::vector<pybsp::Bfloat16> weight = to_bfloat16(weight_);
  const std::vector<float> wide = to_float(weight);
  const auto same = [&](const std::string& what, const std::vector<float>& want,
                        const std::vector<pybsp::Bfloat16>& got) {
    report.same_bits(what + " bfloat16 " + name_, to_float(to_bfloat16(want)).data(),
                     to_float(got).data(), static_cast<int64_t>(want.size()),
                     grid_.row_stride);
  };
  std::vector<float> norms(norms_.size()), wide_norms(norms_.size());
  pybsp::block_norms(weight.data(), grid_, norms.data(), 2);
  pybsp::block_norms(wide.data(), grid_, wide_norms.data(), 1);
  report.same_bits("block_norms bfloat16 " + name_, norms.data(), wide_norms.data(),
                   blocks(), grid_.grid_cols);

  std::vector<pybsp::Bfloat16> grad = to_bfloat16(grad_);
  std::vector<float> wide_grad = to_float(grad);
  const double penalty = pybsp::group_lasso_grad(
      grad.data(), grid_.row_stride, weight.data(), factors_.data(), 0.37f, grid_, 2);
  const double wide_penalty =
      pybsp::group_lasso_grad(wide_grad.data(), grid_.row_stride, wide.data(),
                              factors_.data(), 0.37f, grid_, 1);
  same("group_lasso_grad", wide_grad, grad);
  report.require("group_lasso_grad bfloat16 " + name_ + ": penalty",
                 penalty == wide_penalty);

  std::vector<pybsp::Bfloat16> shrunk = weight;
  std::vector<float> wide_shrunk = wide;
  pybsp::group_lasso_prox(shrunk.data(), factors_.data(), 0.5f, grid_, 2);
  pybsp::group_lasso_prox(wide_shrunk.data(), factors_.data(), 0.5f, grid_, 1);
  same("group_lasso_prox", wide_shrunk, shrunk);

  const auto mask = std::make_unique<bool[]>(static_cast<size_t>(blocks()));
  for (int64_t b = 0; b < blocks(); ++b) {
    mask[static_cast<size_t>(b)] = factors_[static_cast<size_t>(b)] > 1.0f;
  }
  std::vector<pybsp::Bfloat16> masked = weight;
  std::vector<float> wide_masked = wide;
  pybsp::apply_block_mask(masked.data(), mask.get(), grid_, 2);
  pybsp::apply_block_mask(wide_masked.data(), mask.get(), grid_, 1);
  same("apply_block_mask", wide_masked, masked);
}

void check_group_lasso(Report& report, bool quick) {
  Random random(7);
  const GridShape shapes[] = {
      {12, 90, 8, 1, 0}, {6, 23, 16, 4, 3},   {17, 18, 4, 4, 0},   {50, 8, 1, 12, 5},
      {50, 2, 1, 48, 0}, {45, 24, 1, 4, 1},   {7, 61, 12, 1, 0},   {15, 21, 5, 3, 2},
      {3, 3, 32, 32, 0}, {1, 1, 70, 33, 0},   {1, 1, 9, 197, 11},  {5, 1100, 2, 1, 0},
      {2, 400, 3, 7, 0}, {3, 2, 4, 515, 0},   {0, 4, 8, 1, 0},     {3, 2500, 1, 1, 0},
      {2, 41, 1, 1, 3},  {3, 701, 1, 4, 0},   {1, 150, 600, 1, 0}, {2, 530, 20, 8, 1},
      {4, 83, 3, 2, 0},  {1, 2, 40, 1100, 0}, {2, 37, 2, 24, 0}};
  for (const GridShape& shape : shapes) {
    for (int repeat = 0; repeat < (quick ? 1 : 3); ++repeat) {
      GroupLassoCase(shape, random).check(report);
    }
  }
}

namespace {

void check_one_block_mask(Report& report, const std::vector<float>& scores,
                          int64_t keep) {
  const int64_t count = static_cast<int64_t>(scores.size());
  const auto mask = std::make_unique<bool[]>(scores.size() + 1);
  pybsp::block_mask(scores.data(), count, keep, mask.get());
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  bool same = true;
  for (size_t i = 0; i < order.size(); ++i) {
    same = same && mask[order[i]] == (i < static_cast<size_t>(keep));
  }
  report.require("block_mask keeps the first " + std::to_string(keep) + " of " +
                     std::to_string(count),
                 same);
}

}  // namespace

void check_block_mask(Report& report, bool quick) {
  Random random(9);
  for (int64_t count : {0, 1, 2, 7, 64, quick ? 100 : 3000}) {
    for (int64_t levels : {1, 3, 1 << 20}) {  // few levels: many ties
      std::vector<float> scores;
      for (int64_t i = 0; i < count; ++i) {
        scores.push_back(static_cast<float>(random.between(0, levels - 1)));
      }
      for (int64_t keep : {int64_t{0}, std::min<int64_t>(count, 1), count / 3,
                           std::max<int64_t>(count - 1, 0), count}) {
        check_one_block_mask(report, scores, keep);
      }
    }
  }
}

}  // namespace selftest
