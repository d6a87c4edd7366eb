// SPDX-License-Identifier: Apache-2.0
#include "bfloat16_cases.h"

#include <cstring>

#include "cases.h"
#include "kernels/token_tiles.h"
#include "kernels/variants.h"
#include "runtime/isa.h"

namespace selftest {
namespace {

// The upper half of `number`, which becomes what is left of it.
pybsp::Bfloat16 cut(float& number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  bits &= 0xffff0000u;
  std::memcpy(&number, &bits, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace

Bfloat16Case::Bfloat16Case(GemmShape shape, double density, int64_t max_tokens,
                           uint64_t seed)
    : name_("bfloat16 (" + std::to_string(shape.out) + ", " + std::to_string(shape.in) +
            ") blocks (" + std::to_string(shape.r) + ", " + std::to_string(shape.c) +
            ")"),
      weight_([&] {
        Random random(seed);
        return BlockSparse(shape, density, random);
      }()),
      float32_schedule_(pybsp::token_lane_schedule(weight_.view())),
      schedule_(pybsp::bfloat16_schedule(weight_.view())) {
  for (float& number : weight_.values) bfloat16_.push_back(cut(number));
  Random random(seed + 1);
  bias_ = random.floats(shape.out);
  x_ = random.floats(max_tokens * shape.in);
}

std::vector<std::vector<float>> Bfloat16Case::products(int64_t tokens, bool tiles,
                                                       int threads) const {
  const GemmShape& shape = weight_.shape;
  const pybsp::Variants& isa = pybsp::variants(pybsp::active_isa());
  const int64_t lanes = tiles ? pybsp::tile_lanes(tokens, isa) : tokens;
  std::vector<std::vector<float>> results(
      3, std::vector<float>(static_cast<size_t>(lanes * shape.out), -1.0f));
  pybsp::BlockSparseView wide = weight_.view(), narrow = weight_.view();
  narrow.values = nullptr;
  narrow.bfloat16 = bfloat16_.data();
  const pybsp::Epilogue epilogue{bias_.data(), pybsp::Activation::relu, nullptr};
  const pybsp::Product both[] = {
      {wide, &float32_schedule_, epilogue, results[0].data()},
      {narrow, &schedule_, epilogue, results[1].data()},
      {narrow, &schedule_, epilogue, results[2].data()}};
  if (!tiles) {
    pybsp::block_sparse_gemm(both, 2, x_.data(), tokens, threads);
    pybsp::block_sparse_gemm(both + 2, 1, x_.data(), tokens, threads);
    return results;
  }
  std::vector<float> x_tiles(static_cast<size_t>(lanes * shape.in));
  pybsp::pack_tiles(x_.data(), tokens, shape.in, x_tiles.data(), 1);
  pybsp::block_sparse_gemm_tiles(both, 2, x_tiles.data(), tokens, threads);
  pybsp::block_sparse_gemm_tiles(both + 2, 1, x_tiles.data(), tokens, threads);
  return results;
}

void Bfloat16Case::check(Report& report, int64_t tokens) const {
  for (bool tiles : {false, true}) {
    for (int threads : {1, 3}) {
      const auto results = products(tokens, tiles, threads);
      const std::string what = name_ + " tokens " + std::to_string(tokens) +
                               (tiles ? " in tiles" : "") + " on " +
                               std::to_string(threads) + " threads";
      const auto count = static_cast<int64_t>(results[0].size());
      const int64_t cols = tiles ? count : weight_.shape.out;
      report.same_bits(what + " beside float32", results[0].data(), results[1].data(),
                       count, cols);
      report.same_bits(what + " alone", results[0].data(), results[2].data(), count,
                       cols);
    }
  }
}

void check_bfloat16(Report& report, bool quick) {
  const GemmShape shapes[] = {{96, 90, 8, 1},   {96, 92, 16, 4},  {68, 72, 4, 4},
                              {50, 96, 1, 12},  {50, 99, 1, 33},  {45, 96, 1, 4},
                              {84, 61, 12, 1},  {75, 63, 5, 3},   {96, 96, 32, 32},
                              {77, 51, 1, 1},   {70, 33, 70, 33}, {1200, 48, 8, 1},
                              {1200, 48, 1, 12}};
  uint64_t seed = 8000;
  bool in_parts = false;
  for (const GemmShape& shape : shapes) {
    for (double density : {0.0, 0.3, 1.0}) {
      const Bfloat16Case one(shape, density, 131, seed += 2);
      in_parts = in_parts || one.schedule().num_parts() > 1;
      for (int64_t tokens : {0, 1, 2, 3, 4, 5, 8, 16, 17, 33, 48, 131}) {
        if (!quick || tokens == 3 || tokens == 17 || tokens == 131) {
          one.check(report, tokens);
        }
      }
    }
  }
  report.require("bfloat16 in several parts", in_parts);
}

}  // namespace selftest
