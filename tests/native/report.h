// SPDX-License-Identifier: Apache-2.0
// What one instruction set got right and wrong, and the random numbers of the cases.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace selftest {

// u of binary32: a correctly rounded operation is off by at most this factor.
constexpr double kUnitRoundoff = 0x1p-24;

// SplitMix64: the same numbers with every compiler and standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  // Uniform in [0, 1) and [-1, 1), with 24 bits.
  float unit() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
  float symmetric() { return 2.0f * unit() - 1.0f; }
  // Uniform in [first, last].
  int64_t between(int64_t first, int64_t last);
  std::vector<float> floats(int64_t count);

 private:
  uint64_t state_;
};

// FNV-1a over the bits of outputs.
class Hash {
 public:
  void add(const float* values, int64_t count);
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

class Report {
 public:
  explicit Report(std::string isa) : isa_(std::move(isa)) {}

  // |got[i] - want[i]| <= bound[i] for a matrix of `cols` columns; a NaN fails unless
  // wanted. Prints the worst element of a failure.
  void close(const std::string& what, const float* got, const double* want,
             const double* bound, int64_t count, int64_t cols);
  void same_bits(const std::string& what, const float* a, const float* b, int64_t count,
                 int64_t cols);
  void require(const std::string& what, bool holds);

  // Outputs that are the same for all ISAs with a fused multiply-add, and all others,
  // which depend on the number of lanes.
  Hash tiles, rest;

  int64_t checks() const { return checks_; }
  int64_t failures() const { return failures_; }

 private:
  void fail(const std::string& what, const std::string& why);

  std::string isa_;
  int64_t checks_ = 0;
  int64_t failures_ = 0;
};

}  // namespace selftest
