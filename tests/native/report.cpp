// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

namespace selftest {
namespace {

constexpr int64_t kPrintedFailures = 20;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

std::string element(int64_t index, int64_t cols) {
  return "[" + std::to_string(index / cols) + ", " + std::to_string(index % cols) + "]";
}

std::string text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.9g", value);
  return buffer;
}

}  // namespace

uint64_t Random::bits() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t Random::between(int64_t first, int64_t last) {
  return first + static_cast<int64_t>(bits() % static_cast<uint64_t>(last - first + 1));
}

std::vector<float> Random::floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = symmetric();
  return values;
}

void Hash::add(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    value_ = (value_ ^ bits_of(values[i])) * 0x100000001b3u;
  }
}

void Report::close(const std::string& what, const float* got, const double* want,
                   const double* bound, int64_t count, int64_t cols) {
  ++checks_;
  int64_t worst = -1;
  double worst_excess = 1.0;
  for (int64_t i = 0; i < count; ++i) {
    const double difference = std::fabs(static_cast<double>(got[i]) - want[i]);
    if (difference <= bound[i]) continue;
    if (std::isnan(want[i]) && std::isnan(got[i])) continue;
    if (static_cast<double>(got[i]) == want[i]) continue;  // infinities
    const double excess = std::isnan(difference) || bound[i] == 0.0
                              ? std::numeric_limits<double>::infinity()
                              : difference / bound[i];
    if (worst < 0 || excess > worst_excess) {
      worst = i;
      worst_excess = excess;
    }
  }
  if (worst < 0) return;
  fail(what, "worst element " + element(worst, cols) + " is " +
                 text(static_cast<double>(got[worst])) + ", expected " +
                 text(want[worst]) + " +- " + text(bound[worst]));
}

void Report::same_bits(const std::string& what, const float* a, const float* b,
                       int64_t count, int64_t cols) {
  ++checks_;
  for (int64_t i = 0; i < count; ++i) {
    if (bits_of(a[i]) == bits_of(b[i])) continue;
    fail(what, "element " + element(i, cols) +
                   " differs: " + text(static_cast<double>(a[i])) + " and " +
                   text(static_cast<double>(b[i])));
    return;
  }
}

void Report::require(const std::string& what, bool holds) {
  ++checks_;
  if (!holds) fail(what, "does not hold");
}

void Report::fail(const std::string& what, const std::string& why) {
  if (++failures_ <= kPrintedFailures) {
    std::printf("FAIL %s %s: %s\n", isa_.c_str(), what.c_str(), why.c_str());
  }
}

}  // namespace selftest
