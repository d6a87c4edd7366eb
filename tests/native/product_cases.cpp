// SPDX-License-Identifier: Apache-2.0
#include "product_cases.h"

#include <cmath>

#include "cases.h"
#include "kernels/token_tiles.h"
#include "kernels/variants.h"
#include "runtime/isa.h"

namespace selftest {

using pybsp::Activation;
using Outputs = std::vector<std::vector<float>>;

namespace {

std::vector<float> unwritten(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count), std::nanf(""));
}

std::vector<float> packed(const float* x, int64_t tokens, int64_t features) {
  const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
  std::vector<float> tiles = unwritten(pybsp::tile_lanes(tokens, isa) * features);
  pybsp::pack_tiles(x, tokens, features, tiles.data(), 2);
  return tiles;
}

std::vector<float> unpacked(const float* tiles, int64_t tokens, int64_t features) {
  std::vector<float> y = unwritten(tokens * features);
  pybsp::unpack_tiles(tiles, tokens, features, y.data(), 2);
  return y;
}

}  // namespace

// The epilogue of one matrix; `in_place`: the residual is y itself.
struct ProductCase::Call {
  const GemmCase* matrix;
  pybsp::Epilogue epilogue;
  bool in_place;
  std::string what;
};

ProductCase::ProductCase(const std::vector<GemmShape>& shapes, double density,
                         int64_t max_tokens, uint64_t seed) {
  Random random(seed + 2);
  for (const GemmShape& shape : shapes) {
    const double kept = matrices_.size() == 1 ? 0.0 : density;
    matrices_.emplace_back(shape, kept, max_tokens, seed);
    residuals_.push_back(random.floats(max_tokens * shape.out));
  }
}

// Every combination comes up as the tokens are counted: 2 x 3 x 5 have no common
// factor.
ProductCase::Call ProductCase::call(size_t matrix, int64_t tokens) const {
  const GemmCase& one = matrices_[matrix];
  const int64_t turn = static_cast<int64_t>(matrix) + tokens;
  const Activation activation = kActivations[turn % 5];
  const bool with_bias = turn % 2 == 0, in_place = turn % 3 == 2;
  const float* residual = turn % 3 == 0 ? nullptr : residuals_[matrix].data();
  const std::string what = one.name() + " tokens " + std::to_string(tokens) + " " +
                           activation_name(activation) + (with_bias ? " bias" : "") +
                           (in_place   ? " residual in y"
                            : residual ? " residual"
                                       : "");
  return {
      &one, {with_bias ? one.bias() : nullptr, activation, residual}, in_place, what};
}

Outputs ProductCase::row_major(const std::vector<Call>& calls, int64_t tokens,
                               int threads) const {
  Outputs outputs;
  std::vector<pybsp::Product> products;
  for (const Call& call : calls) {
    const int64_t count = tokens * call.matrix->shape().out;
    pybsp::Epilogue epilogue = call.epilogue;
    outputs.push_back(
        call.in_place ? std::vector<float>(epilogue.residual, epilogue.residual + count)
                      : unwritten(count));
    if (call.in_place) epilogue.residual = outputs.back().data();
    products.push_back(call.matrix->product(epilogue, outputs.back().data()));
  }
  pybsp::block_sparse_gemm(products.data(), static_cast<int64_t>(products.size()),
                           calls[0].matrix->x(), tokens, threads);
  return outputs;
}

Outputs ProductCase::in_tiles(const std::vector<Call>& calls, int64_t tokens,
                              int threads) const {
  Outputs outputs, residuals;
  std::vector<pybsp::Product> products;
  for (const Call& call : calls) {
    const int64_t out = call.matrix->shape().out;
    pybsp::Epilogue epilogue = call.epilogue;
    outputs.push_back(packed(unwritten(tokens * out).data(), tokens, out));
    if (epilogue.residual) {
      std::vector<float> residual = packed(epilogue.residual, tokens, out);
      (call.in_place ? outputs.back() : residuals.emplace_back()).swap(residual);
      epilogue.residual = (call.in_place ? outputs : residuals).back().data();
    }
    products.push_back(call.matrix->product(epilogue, outputs.back().data()));
  }
  const GemmCase& first = *calls[0].matrix;
  const std::vector<float> x = packed(first.x(), tokens, first.shape().in);
  pybsp::block_sparse_gemm_tiles(products.data(), static_cast<int64_t>(products.size()),
                                 x.data(), tokens, threads);
  for (size_t i = 0; i < calls.size(); ++i) {
    outputs[i] = unpacked(outputs[i].data(), tokens, calls[i].matrix->shape().out);
  }
  return outputs;
}

void ProductCase::check(Report& report, int64_t tokens) const {
  std::vector<Call> calls;
  for (size_t i = 0; i < matrices_.size(); ++i) calls.push_back(call(i, tokens));
  const Outputs rows = row_major(calls, tokens, 1), tiles = in_tiles(calls, tokens, 1);
  for (size_t i = 0; i < calls.size(); ++i) {
    const Call& call = calls[i];
    const int64_t out = call.matrix->shape().out, count = tokens * out;
    const Expected want = call.matrix->expected(tokens, call.epilogue);
    const auto close = [&](const std::string& what, const std::vector<float>& y) {
      report.close(what + call.what, y.data(), want.values.data(), want.bounds.data(),
                   count, out);
    };
    close("products ", rows[i]);
    close("products in tiles ", tiles[i]);
    report.same_bits("products, one alone " + call.what, rows[i].data(),
                     row_major({call}, tokens, 1)[0].data(), count, out);
    if (call.matrix->ordered()) {
      report.same_bits("products, row-major and in tiles " + call.what, rows[i].data(),
                       tiles[i].data(), count, out);
      report.tiles.add(rows[i].data(), count);
    }
  }
  for (int threads : {2, 3, 8}) {
    const Outputs other_rows = row_major(calls, tokens, threads);
    const Outputs other_tiles = in_tiles(calls, tokens, threads);
    for (size_t i = 0; i < calls.size(); ++i) {
      const int64_t out = calls[i].matrix->shape().out, count = tokens * out;
      const std::string what =
          calls[i].what + " on " + std::to_string(threads) + " threads";
      report.same_bits("products " + what, rows[i].data(), other_rows[i].data(), count,
                       out);
      report.same_bits("products in tiles " + what, tiles[i].data(),
                       other_tiles[i].data(), count, out);
    }
  }
}

void check_products(Report& report, bool quick) {
  const ProductCase mixed({{96, 96, 8, 1},
                           {50, 96, 2, 2},
                           {50, 96, 1, 48},
                           {96, 96, 16, 4},
                           {75, 96, 5, 3},
                           {9, 96, 9, 96},
                           {1, 96, 1, 1}},
                          0.4, 131, 5000);
  for (int64_t tokens = 0; tokens <= (quick ? 19 : 53); ++tokens) {
    mixed.check(report, tokens);
  }
  mixed.check(report, 131);
  // So many weights that a few tokens, too, are worth eight threads, for more threads
  // than vectors of tokens; and matrices smaller than a share of the work.
  const ProductCase large(
      {{768, 768, 8, 1}, {8, 768, 8, 1}, {8, 768, 8, 1}, {64, 768, 1, 64}}, 0.9, 49,
      5001);
  for (int64_t tokens : {1, 2, 4, 17, 49}) large.check(report, tokens);
}

void check_token_tiles(Report& report) {
  const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
  Random random(6000);
  for (int64_t features : {1, 3, 8, 15, 16, 17, 45}) {
    for (int64_t tokens = 0; tokens <= 101; ++tokens) {
      const std::vector<float> x = random.floats(tokens * features);
      const std::vector<float> tiles = packed(x.data(), tokens, features);
      report.same_bits("pack_tiles and back, tokens " + std::to_string(tokens),
                       x.data(), unpacked(tiles.data(), tokens, features).data(),
                       tokens * features, features);
    }
  }
  for (Activation activation : kActivations) {
    for (int64_t count = 0; count <= 2 * isa.lanes + 1; ++count) {
      const size_t size = static_cast<size_t>(count);
      const std::vector<float> sums = random.floats(count),
                               residual = random.floats(count);
      std::vector<double> want(size), bound(size);
      for (size_t i = 0; i < size; ++i) {
        const double a = activate(activation, static_cast<double>(sums[i]));
        want[i] = a + static_cast<double>(residual[i]);
        bound[i] = kUnitRoundoff * (16 * std::fabs(a) + 2 * std::fabs(want[i]));
      }
      const std::string what =
          std::string("finish ") + activation_name(activation) + " ";
      const auto check = [&](const std::string& how, std::vector<float> y,
                             bool sums_in_y, bool residual_in_y) {
        y.push_back(1.0f);  // must stay
        isa.finish(sums_in_y ? y.data() : sums.data(), count, activation,
                   residual_in_y ? y.data() : residual.data(), y.data());
        report.close(what + how, y.data(), want.data(), bound.data(), count, count);
        report.require(what + how + " ends in time", y.back() == 1.0f);
      };
      check("to y", unwritten(count), false, false);
      check("in y", sums, true, false);
      check("onto y", residual, false, true);
    }
  }
}

}  // namespace selftest
