// SPDX-License-Identifier: Apache-2.0
#include "int8_cases.h"

#include <cmath>
#include <limits>

#include "cases.h"
#include "kernels/int8_products.h"
#include "kernels/token_tiles.h"
#include "kernels/variants.h"
#include "runtime/isa.h"

namespace selftest {
namespace {

std::vector<int8_t> integers(size_t count, Int8Values kind, Random& random) {
  std::vector<int8_t> q(count);
  for (int8_t& value : q) {
    value = kind == Int8Values::random  ? static_cast<int8_t>(random.between(-128, 127))
            : random.between(0, 1) == 0 ? int8_t{-128}
                                        : int8_t{127};
  }
  return q;
}

// Of the first tokens all inputs have one magnitude, are zero, are zero but for one,
// are so small that they count as zero, and are not finite.
std::vector<float> inputs(int64_t tokens, int64_t features, Int8Values kind,
                          Random& random) {
  std::vector<float> x = random.floats(tokens * features);
  for (int64_t i = 0; i < tokens * features; ++i) {
    const int64_t token = i / features, k = i % features;
    float& value = x[static_cast<size_t>(i)];
    if (kind == Int8Values::extreme) value = value < 0.0f ? -3.0f : 3.0f;
    if (token == 1) value = 0.0f;
    if (token == 2) value = k == features / 2 ? 7.0f : 0.0f;
    if (token == 3) value *= 1e-31f;
    if (token == 4 && k == features - 1) value = std::numeric_limits<float>::infinity();
    if (token == 5 && k == 0) value = std::nanf("");
  }
  return x;
}

// Rounded by itself, whatever the compiler would like to fuse.
float rounded(float value) {
  volatile float stored = value;
  return stored;
}

}  // namespace

Int8Case::Int8Case(GemmShape shape, double density, int64_t max_tokens, Int8Values kind,
                   uint64_t seed)
    : name_("int8 " + std::to_string(shape.out) + "x" + std::to_string(shape.in) +
            " (" + std::to_string(shape.r) + ", " + std::to_string(shape.c) + ")"),
      weight_([&] {
        Random random(seed);
        return BlockSparse(shape, density, random);
      }()),
      q_([&] {
        Random random(seed + 1);
        return integers(weight_.values.size(), kind, random);
      }()),
      scales_([&] {
        Random random(seed + 2);
        std::vector<float> scales = random.floats(shape.out);
        scales[0] = 0.0f;
        return scales;
      }()),
      bias_([&] {
        Random random(seed + 3);
        return random.floats(shape.out);
      }()),
      x_([&] {
        Random random(seed + 4);
        return inputs(max_tokens, shape.in, kind, random);
      }()),
      packed_(weight_.view(), q_.data(), scales_.data()) {}

std::vector<float> Int8Case::expected(int64_t tokens, float input_scale) const {
  const GemmShape& shape = weight_.shape;
  const float least = std::ldexp(1.0f, -100);
  std::vector<float> y;
  for (int64_t token = 0; token < tokens; ++token) {
    const float* x = x_.data() + token * shape.in;
    float largest = 0.0f;
    bool finite = true;
    for (int64_t k = 0; k < shape.in; ++k) {
      largest = std::fmax(largest, std::fabs(x[k]));
      finite = finite && std::isfinite(x[k]);
    }
    const bool zero = input_scale == 0.0f && largest < least;
    const float scale = input_scale > 0.0f ? input_scale
                        : zero             ? 0.0f
                                           : largest / 127.0f;
    const float inverse = input_scale > 0.0f ? 1.0f / input_scale
                          : zero             ? 0.0f
                                             : 127.0f / largest;
    std::vector<int32_t> q(static_cast<size_t>(shape.in), 0);
    for (int64_t k = 0; finite && k < shape.in; ++k) {
      const float limited =
          std::fmax(-127.0f, std::fmin(127.0f, rounded(x[k] * inverse)));
      q[static_cast<size_t>(k)] = static_cast<int32_t>(std::nearbyint(limited));
    }
    for (int64_t out = 0; out < shape.out; ++out) {
      const int64_t row = out / shape.r;
      int32_t sum = 0;
      for (int32_t b = weight_.crow_indices[static_cast<size_t>(row)];
           b < weight_.crow_indices[static_cast<size_t>(row) + 1]; ++b) {
        for (int64_t col = 0; col < shape.c; ++col) {
          const int64_t k = weight_.col_indices[static_cast<size_t>(b)] * shape.c + col;
          const int64_t at = (b * shape.c + col) * shape.r + out % shape.r;
          sum += q[static_cast<size_t>(k)] * q_[static_cast<size_t>(at)];
        }
      }
      const float scaled =
          rounded(static_cast<float>(sum) * scales_[static_cast<size_t>(out)]);
      y.push_back(finite ? rounded(scaled * scale) + bias_[static_cast<size_t>(out)]
                         : std::numeric_limits<float>::quiet_NaN());
    }
  }
  return y;
}

std::vector<float> Int8Case::computed(int64_t tokens, float input_scale, bool tiles,
                                      int threads) const {
  const GemmShape& shape = weight_.shape;
  const pybsp::Epilogue epilogue{bias_.data(), pybsp::Activation::none, nullptr};
  std::vector<float> y(static_cast<size_t>(tokens * shape.out), -1.0f);
  if (!tiles) {
    const pybsp::Product product{
        weight_.view(), &packed_.schedule(), epilogue, y.data(), &packed_, input_scale};
    pybsp::block_sparse_gemm(&product, 1, x_.data(), tokens, threads);
    return y;
  }
  const int64_t lanes = pybsp::tile_lanes(tokens, pybsp::variants(pybsp::active_isa()));
  std::vector<float> x_tiles(static_cast<size_t>(lanes * shape.in));
  std::vector<float> y_tiles(static_cast<size_t>(lanes * shape.out));
  pybsp::pack_tiles(x_.data(), tokens, shape.in, x_tiles.data(), 1);
  const pybsp::Product product{weight_.view(), &packed_.schedule(),
                               epilogue,       y_tiles.data(),
                               &packed_,       input_scale};
  pybsp::block_sparse_gemm_tiles(&product, 1, x_tiles.data(), tokens, threads);
  pybsp::unpack_tiles(y_tiles.data(), tokens, shape.out, y.data(), 1);
  return y;
}

void Int8Case::check(Report& report, int64_t tokens) const {
  for (float input_scale : {0.0f, 0.004f}) {
    const std::vector<float> want = expected(tokens, input_scale);
    const std::string what = name_ + " tokens " + std::to_string(tokens) +
                             (input_scale > 0.0f ? " given scale" : "");
    for (bool tiles : {false, true}) {
      for (int threads : {1, 3}) {
        const std::vector<float> y = computed(tokens, input_scale, tiles, threads);
        const auto same = [&](size_t at) {  // NaN have no sign to speak of
          return want[at] == y[at] || (std::isnan(want[at]) && std::isnan(y[at]));
        };
        size_t at = 0;
        while (at < want.size() && same(at)) ++at;
        std::string how = what + (tiles ? " in tiles" : "") + " on " +
                          std::to_string(threads) + " threads is exact";
        if (at < want.size()) {
          how += ": element " + std::to_string(at) + " is " + std::to_string(y[at]) +
                 " for " + std::to_string(want[at]);
        }
        report.require(how, at == want.size());
      }
    }
  }
}

void check_int8(Report& report, bool quick) {
  const GemmShape shapes[] = {{96, 96, 8, 1},    {96, 96, 8, 4},   {96, 192, 16, 4},
                              {48, 96, 16, 1},   {96, 192, 1, 96}, {50, 64, 1, 64},
                              {64, 128, 32, 32}, {72, 90, 24, 2},  {36, 60, 12, 12},
                              {21, 35, 3, 5},    {40, 48, 40, 16}, {9, 7, 1, 1},
                              {10, 68, 2, 4},    {33, 52, 11, 4},  {250, 96, 1, 32},
                              {37, 208, 1, 16},  {21, 80, 1, 20}};
  uint64_t seed = 7000;
  bool by_column = false, in_parts = false;
  for (const GemmShape& shape : shapes) {
    for (double density : {0.0, 0.3, 1.0}) {
      for (Int8Values kind : {Int8Values::random, Int8Values::extreme}) {
        const Int8Case one(shape, density, 101, kind, ++seed);
        by_column = by_column || one.schedule().by_column;
        in_parts =
            in_parts || (one.schedule().by_column && one.schedule().num_parts() > 1);
        for (int64_t tokens : {0, 1, 3, 16, 17, 32, 47, 101}) {
          if (!quick || tokens == 17 || tokens == 101) one.check(report, tokens);
        }
      }
    }
  }
  report.require("int8 by column", by_column);
  report.require("int8 by column in several parts", in_parts);
  // Sums near the largest that are exact.
  Int8Case({8, 65536, 8, 4}, 1.0, 7, Int8Values::extreme, 7999).check(report, 7);
  Int8Case({8, 65536, 8, 1}, 1.0, 7, Int8Values::extreme, 7998).check(report, 7);
  const Int8Case columns({9, 65536, 1, 16384}, 0.7, 7, Int8Values::extreme, 7997);
  report.require("long int8 by column", columns.schedule().by_column);
  columns.check(report, 7);
}

}  // namespace selftest
