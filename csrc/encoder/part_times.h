// SPDX-License-Identifier: Apache-2.0
// Where the time of an encoder call goes.
#pragma once

#include <chrono>

namespace pybsp {

enum class Part {
  embeddings,       // rows of the tables, or hidden states, into tiles
  query_key_value,  // with rotations and tables of biases
  attention,
  output,  // projection, with the residual
  norms,   // all of them
  up,      // with the activation, and the gate
  down,    // with the residual
  storing,
  rest,  // groups and tiles, working memory, clearing padding, waiting at the end
};
constexpr int kParts = 9;
inline constexpr const char* kPartNames[kParts] = {
    "embeddings", "query_key_value", "attention", "output", "norms", "up",
    "down",       "storing",         "rest"};

// Seconds of the calling thread, over all layers. Several threads have the same parts
// side by side; waiting for them belongs to the part before.
struct PartTimes {
  double seconds[kParts];
};

// Follows one thread from part to part; without `times` it does nothing.
class PartClock {
 public:
  explicit PartClock(PartTimes* times) : times_(times) {
    if (times_) started_ = std::chrono::steady_clock::now();
  }
  PartClock(const PartClock&) = delete;
  PartClock& operator=(const PartClock&) = delete;
  ~PartClock() { enter(Part::rest); }

  // What comes now belongs to `part`; the first is `rest`.
  void enter(Part part) {
    if (!times_) return;
    const auto now = std::chrono::steady_clock::now();
    times_->seconds[static_cast<int>(part_)] +=
        std::chrono::duration<double>(now - started_).count();
    started_ = now;
    part_ = part;
  }

 private:
  PartTimes* times_;
  Part part_ = Part::rest;
  std::chrono::steady_clock::time_point started_;
};

}  // namespace pybsp
