// SPDX-License-Identifier: Apache-2.0
// Checks every kernel of every instruction set that this CPU has, without Python.
//
//   pybsp_selftest [--quick] [--isa NAME]... [--fuzz CASES] [--seed N] [--list]
//
// Prints a line for each instruction set: the number of checks, and two hashes of the
// outputs. `tiles` is equal for all instruction sets with a fused multiply-add: it
// covers the encoder, dx and the products, but not those of blocks (1, 8 or more) for
// counts of tokens that 48 does not divide. `rest` depends on the number of lanes. Both
// are equal wherever the same mode runs, on hardware or emulated. Exit status: 0, 1
// when a check failed, 2 for a wrong command line.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "runtime/isa.h"

namespace {

struct Options {
  bool quick = false;
  bool list = false;
  int64_t fuzz_cases = 0;
  uint64_t seed = 1;
  std::vector<std::string> isas;
};

uint64_t number(const std::string& option, const std::string& value) {
  char* end = nullptr;
  const uint64_t parsed = std::strtoull(value.c_str(), &end, 10);
  if (value.empty() || *end != '\0' || value[0] == '-') {
    throw std::invalid_argument(option + " needs a number; got '" + value + "'");
  }
  return parsed;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--quick") {
      options.quick = true;
      continue;
    }
    if (option == "--list") {
      options.list = true;
      continue;
    }
    if (option != "--isa" && option != "--fuzz" && option != "--seed") {
      throw std::invalid_argument("unknown option '" + option +
                                  "'; there are --quick, --list, --isa NAME, "
                                  "--fuzz CASES and --seed N");
    }
    if (++i == argc) throw std::invalid_argument(option + " needs a value");
    if (option == "--isa") options.isas.emplace_back(argv[i]);
    if (option == "--fuzz") {
      options.fuzz_cases = static_cast<int64_t>(number(option, argv[i]));
    }
    if (option == "--seed") options.seed = number(option, argv[i]);
  }
  return options;
}

bool passes(const std::string& isa, const Options& options) {
  pybsp::set_active_isa(isa);
  selftest::Report report(isa);
  if (options.fuzz_cases == 0) {
    selftest::check_block_sparse_gemm(report, options.quick);
    selftest::check_products(report, options.quick);
    selftest::check_token_tiles(report);
    selftest::check_block_sparse_grad(report, options.quick);
    selftest::check_encoder(report, options.quick);
    selftest::check_int8(report, options.quick);
    selftest::check_bfloat16(report, options.quick);
    selftest::check_activations(report, options.quick);
    selftest::check_group_lasso(report, options.quick);
    selftest::check_block_mask(report, options.quick);
  }
  selftest::Random random(options.seed);
  for (int64_t i = 0; i < options.fuzz_cases; ++i) selftest::fuzz(report, random);
  std::printf("%-11s %s %" PRId64 " of %" PRId64 " checks failed  tiles %016" PRIx64
              "  rest %016" PRIx64 "\n",
              isa.c_str(), report.failures() == 0 ? "ok    " : "FAILED",
              report.failures(), report.checks(), report.tiles.value(),
              report.rest.value());
  std::fflush(stdout);
  return report.failures() == 0;
}

int run(Options options) {
  if (options.isas.empty()) {
    for (pybsp::Isa isa : pybsp::available_isas()) {
      options.isas.emplace_back(pybsp::isa_name(isa));
    }
  }
  bool all = true;
  for (const std::string& isa : options.isas) {
    if (options.list) {
      std::printf("%s\n", isa.c_str());
    } else {
      all = passes(isa, options) && all;
    }
  }
  return all ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pybsp_selftest: %s\n", error.what());
    return 2;
  }
}
