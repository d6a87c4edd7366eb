// SPDX-License-Identifier: Apache-2.0
#include "gemm_cases.h"

#include <cmath>

#include "cases.h"
#include "kernels/variants.h"

namespace selftest {

using pybsp::Activation;

BlockSparse::BlockSparse(GemmShape matrix, double density, Random& random)
    : shape(matrix) {
  crow_indices.push_back(0);
  for (int64_t row = 0; row < shape.out / shape.r; ++row) {
    for (int64_t col = 0; col < shape.in / shape.c; ++col) {
      if (static_cast<double>(random.unit()) >= density) continue;
      col_indices.push_back(static_cast<int32_t>(col));
    }
    crow_indices.push_back(static_cast<int32_t>(col_indices.size()));
  }
  values = random.floats(static_cast<int64_t>(col_indices.size()) * shape.r * shape.c);
}

pybsp::BlockSparseView BlockSparse::view() const {
  return {shape.out,           shape.in,           shape.r,      shape.c,
          crow_indices.data(), col_indices.data(), values.data()};
}

const char* activation_name(Activation activation) {
  switch (activation) {
    case Activation::none:
      return "none";
    case Activation::relu:
      return "relu";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_tanh:
      return "gelu_tanh";
    case Activation::silu:
      return "silu";
    case Activation::gelu_absolute:
      return "gelu_absolute";
    case Activation::gelu_short:
      return "gelu_short";
  }
  return "unknown";
}

double activate(Activation activation, double y) {
  switch (activation) {
    case Activation::none:
      return y;
    case Activation::relu:
      return y < 0.0 ? 0.0 : y;
    case Activation::gelu:
    case Activation::gelu_absolute:
    case Activation::gelu_short:
      return 0.5 * y * std::erfc(-y * 0.70710678118654752440);
    case Activation::gelu_tanh: {
      // 0.5 (1 + tanh(a)) written without cancellation for negative a.
      const double a = 0.79788456080286535588 * (y + 0.044715 * y * y * y);
      return y / (1.0 + std::exp(-2.0 * a));
    }
    case Activation::silu:
      return y / (1.0 + std::exp(-y));
  }
  return y;
}

GemmCase::GemmCase(GemmShape shape, double density, int64_t max_tokens, uint64_t seed)
    : name_("(" + std::to_string(shape.out) + ", " + std::to_string(shape.in) +
            ") blocks (" + std::to_string(shape.r) + ", " + std::to_string(shape.c) +
            ") density " + std::to_string(density).substr(0, 4)),
      weight_([&] {
        Random random(seed);
        return BlockSparse(shape, density, random);
      }()),
      schedule_(pybsp::token_lane_schedule(weight_.view())),
      terms_(static_cast<size_t>(shape.out), 0) {
  Random random(seed + 1);
  x_ = random.floats(max_tokens * shape.in + 1);
  bias_ = random.floats(shape.out + 1);
  sums_.assign(static_cast<size_t>(max_tokens * shape.out), 0.0);
  magnitude_ = sums_;
  for (int64_t row = 0; row < shape.out; ++row) {
    const size_t block_row = static_cast<size_t>(row / shape.r);
    for (int32_t b = weight_.crow_indices[block_row];
         b < weight_.crow_indices[block_row + 1]; ++b) {
      terms_[static_cast<size_t>(row)] += shape.c;
      for (int64_t i = 0; i < shape.c; ++i) {
        const double w = static_cast<double>(weight_.values[static_cast<size_t>(
            (b * shape.c + i) * shape.r + row % shape.r)]);
        const int64_t col = weight_.col_indices[static_cast<size_t>(b)] * shape.c + i;
        for (int64_t token = 0; token < max_tokens; ++token) {
          const double product =
              w *
              static_cast<double>(x_[static_cast<size_t>(token * shape.in + col + 1)]);
          const size_t at = static_cast<size_t>(token * shape.out + row);
          sums_[at] += product;
          magnitude_[at] += std::fabs(product);
        }
      }
    }
  }
}

void GemmCase::check(Report& report, int64_t tokens, Activation activation) const {
  for (bool with_bias : {false, true}) check(report, tokens, activation, with_bias);
}

Expected GemmCase::expected(int64_t tokens, pybsp::Epilogue epilogue) const {
  const int64_t out = weight_.shape.out, count = tokens * out;
  Expected expected;
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i), row = static_cast<size_t>(i % out);
    const double b = epilogue.bias ? static_cast<double>(epilogue.bias[row]) : 0.0;
    double value = activate(epilogue.activation, sums_[at] + b);
    // n products summed in any order lose at most n u of the magnitudes. No activation
    // is steeper than 1.13, and their own few units in the last place are added.
    double bound = static_cast<double>(terms_[row] + 2) * kUnitRoundoff *
                   (magnitude_[at] + std::fabs(b));
    if (epilogue.activation != Activation::none) {
      bound = 1.13 * bound + 16 * kUnitRoundoff * std::fabs(value);
    }
    if (epilogue.residual) {
      value += static_cast<double>(epilogue.residual[i]);
      bound += kUnitRoundoff * (std::fabs(value) + bound);
    }
    expected.values.push_back(value);
    expected.bounds.push_back(bound);
  }
  return expected;
}

void GemmCase::check(Report& report, int64_t tokens, Activation activation,
                     bool with_bias) const {
  const int64_t out = weight_.shape.out, count = tokens * out;
  const pybsp::Epilogue epilogue{with_bias ? bias() : nullptr, activation, nullptr};
  const std::string what = "block_sparse_gemm " + name_ + " tokens " +
                           std::to_string(tokens) + " " + activation_name(activation) +
                           (with_bias ? " bias" : "");
  const Expected want = expected(tokens, epilogue);
  // Outputs start as NaN, so that one that is never written is found.
  const std::vector<float> unwritten(static_cast<size_t>(count), std::nanf(""));
  std::vector<float> first;
  for (int threads : {1, 2, 3}) {
    std::vector<float> y = unwritten;
    const pybsp::Product one = product(epilogue, y.data());
    pybsp::block_sparse_gemm(&one, 1, x(), tokens, threads);
    if (threads == 1) {
      report.close(what, y.data(), want.values.data(), want.bounds.data(), count, out);
      first = y;
      // 48 tokens are whole tiles on every instruction set.
      (ordered() || tokens % 48 == 0 ? report.tiles : report.rest).add(y.data(), count);
    } else {
      report.same_bits(what + " on " + std::to_string(threads) + " threads",
                       first.data(), y.data(), count, out);
    }
  }
}

void check_block_sparse_gemm(Report& report, bool quick) {
  // The last two are one block: tall and wide.
  const GemmShape shapes[] = {{96, 90, 8, 1},  {96, 92, 16, 4},  {68, 72, 4, 4},
                              {50, 96, 1, 12}, {50, 96, 1, 48},  {45, 96, 1, 4},
                              {84, 61, 12, 1}, {75, 63, 5, 3},   {96, 96, 32, 32},
                              {77, 51, 1, 1},  {70, 33, 70, 33}, {9, 97, 9, 97}};
  std::vector<int64_t> counts;
  for (int64_t tokens = 0; tokens <= 49; ++tokens) counts.push_back(tokens);
  counts.insert(counts.end(), {96, 131});
  if (quick) counts = {0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 48, 49, 67};
  uint64_t seed = 1;
  for (const GemmShape& shape : shapes) {
    for (double density : {0.0, 0.3, 1.0}) {
      const GemmCase matrix(shape, density, counts.back(), seed += 2);
      for (int64_t tokens : counts) {
        for (Activation activation : kActivations) {
          // Quick: one activation a count, each on some of few and of many tokens.
          const int64_t turn = (tokens + static_cast<int64_t>(seed / 2)) % 5;
          if (quick && static_cast<int64_t>(activation) != turn) continue;
          matrix.check(report, tokens, activation);
        }
      }
    }
  }
  // So many inputs that the tiles of tokens come in several groups, and enough rows
  // for several parts of the schedule.
  const GemmCase wide({16, 24576, 8, 1}, 0.05, quick ? 70 : 131, seed += 2);
  wide.check(report, quick ? 70 : 131, Activation::none);
  const GemmCase tall({1200, 48, 8, 1}, 0.5, 49, seed += 2);
  tall.check(report, 49, Activation::gelu);
  const GemmCase tall_rows({1200, 48, 1, 12}, 0.5, 49, seed += 2);
  tall_rows.check(report, 49, Activation::silu);
}

void check_activations(Report& report, bool quick) {
  // The identity in (1, 1) blocks, so that y is exactly activation(x).
  constexpr int64_t kFeatures = 64;
  std::vector<int32_t> crow, col;
  for (int32_t i = 0; i < kFeatures; ++i) {
    crow.push_back(i);
    col.push_back(i);
  }
  crow.push_back(kFeatures);
  const std::vector<float> ones(kFeatures, 1.0f);
  const pybsp::BlockSparseView view{kFeatures,   kFeatures,  1,          1,
                                    crow.data(), col.data(), ones.data()};
  const pybsp::Schedule schedule = pybsp::token_lane_schedule(view);
  std::vector<float> x;
  for (double step = quick ? 0.1 : 0.003, at = -30.0; at <= 30.0; at += step) {
    x.push_back(static_cast<float>(at));
  }
  for (float a : {0.0f,   -0.0f,  1e-30f,  -1e-30f,     1e-5f,    -1e-5f, 88.0f,
                  -88.0f, 500.0f, -500.0f, 1e10f,       INFINITY, NAN,    7.7f,
                  -7.7f,  7.8f,   -7.8f,   -4194327.5f, -1e10f,   1e38f,  -1e38f}) {
    x.push_back(a);
  }
  while (x.size() % kFeatures != 0) x.push_back(0.5f);
  const int64_t tokens = static_cast<int64_t>(x.size()) / kFeatures;
  std::vector<Activation> activations(std::begin(kActivations), std::end(kActivations));
  activations.push_back(Activation::gelu_absolute);
  activations.push_back(Activation::gelu_short);
  for (Activation activation : activations) {
    std::vector<double> want(x.size()), bound(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double a = static_cast<double>(x[i]);
      want[i] = activate(activation, a);
      // exp(-e) has the relative error of its rounded argument, e u, and is 0 where it
      // would not be a normal float.
      const double z = std::fabs(a);
      double argument = 0.0;
      if (activation == Activation::gelu) argument = z * z / 2;
      if (activation == Activation::gelu_tanh) {
        argument = 3 * (1.6 * z + 0.0714 * z * z * z);  // three roundings
      }
      if (activation == Activation::silu) argument = z;
      if (a >= 0.0) argument = 0.0;
      bound[i] = (8 + argument) * kUnitRoundoff * std::fabs(want[i]) + 2e-36;
      if (activation == Activation::none || activation == Activation::relu) {
        bound[i] = 0.0;
      }
      if (activation == Activation::gelu_absolute) bound[i] = 1e-7 * (1.0 + z);
      if (activation == Activation::gelu_short)
        bound[i] = 5e-6 + 1e-6 * std::max(a, 0.0);
    }
    std::vector<float> y(x.size());
    const pybsp::Epilogue epilogue{nullptr, activation, nullptr};
    const pybsp::Product product{view, &schedule, epilogue, y.data()};
    pybsp::block_sparse_gemm(&product, 1, x.data(), tokens, 1);
    const std::string what = std::string("activation ") + activation_name(activation);
    report.close(what, y.data(), want.data(), bound.data(),
                 static_cast<int64_t>(x.size()), kFeatures);
    std::vector<float> one(x.size());
    for (int64_t token = 0; token < tokens; ++token) {
      const pybsp::Product single{view, &schedule, epilogue,
                                  one.data() + token * kFeatures};
      pybsp::block_sparse_gemm(&single, 1, x.data() + token * kFeatures, 1, 1);
    }
    for (size_t i = 0; i < x.size(); ++i) {  // the bits of a NaN are free
      if (std::isnan(y[i]) && std::isnan(one[i])) one[i] = y[i];
    }
    report.same_bits(what + " of many tokens and of one", y.data(), one.data(),
                     static_cast<int64_t>(x.size()), kFeatures);
  }
}

}  // namespace selftest
