// SPDX-License-Identifier: Apache-2.0
#include "encoder/encoder.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "encoder/group_run.h"
#include "encoder/token_runs.h"
#include "runtime/threads.h"

namespace pybsp {
namespace {

// Tokens that go through all layers together: enough that reading the weights for each
// group is hidden, few enough that its activations stay in or near L2.
constexpr int64_t kGroupTokens = 256;
constexpr int64_t kFewestTokens = 32;

void check_range(const int64_t* values, const KeptTokens& kept, int64_t count,
                 const char* name, const char* table) {
  for (const int64_t row : kept.rows) {
    if (values[row] < 0 || values[row] >= count) {
      throw std::out_of_range(std::string(name) + " holds " +
                              std::to_string(values[row]) + " and the table of " +
                              table + " has " + std::to_string(count) + " rows");
    }
  }
}

void check_input(const Encoder& encoder, const EncoderInput& input,
                 const KeptTokens& kept) {
  const auto check_length = [&](int64_t most, const char* what) {
    if (input.length > most) {
      throw std::out_of_range("a row holds " + std::to_string(input.length) +
                              " tokens and the " + what + " reach to " +
                              std::to_string(most));
    }
  };
  for (const EncoderLayer& layer : encoder.layers) {
    const SelfAttention& attention = layer.attention;
    if (attention.cosines) check_length(attention.rotary_positions, "rotations");
    if (attention.relative_bias) {
      check_length(attention.bias_positions, "relative positions");
    }
  }
  if (!input.ids) return;
  check_range(input.ids, kept, encoder.words.count, "ids", "words");
  if (encoder.token_types.rows && input.token_types) {
    check_range(input.token_types, kept, encoder.token_types.count, "token_types",
                "token types");
  }
  if (!encoder.positions.rows) return;
  if (input.positions) {
    check_range(input.positions, kept, encoder.positions.count, "positions",
                "positions");
  } else {
    check_length(encoder.positions.count, "positions");
  }
}

// Groups that keep every thread busy by themselves, or none.
std::vector<SequenceGroup> groups_for_threads(const KeptTokens& kept, int threads) {
  const int64_t total = static_cast<int64_t>(kept.rows.size());
  if (threads < 2 || static_cast<int64_t>(kept.sequences.size()) < threads) return {};
  const int64_t rounds =
      (total + threads * kGroupTokens - 1) / (threads * kGroupTokens);
  const int64_t share = (total + threads * rounds - 1) / (threads * rounds);
  if (share < kFewestTokens) return {};
  std::vector<SequenceGroup> groups = group_sequences(kept, share);
  int64_t largest = 0;
  for (const SequenceGroup& group : groups) {
    largest = std::max(largest, group.last_token - group.first_token);
  }
  // One after the other, the last to be taken makes the others wait for at most itself.
  const bool balanced =
      static_cast<int64_t>(groups.size()) >= threads && 4 * largest <= 5 * share;
  return balanced ? groups : std::vector<SequenceGroup>{};
}

void clear_padding(const EncoderInput& input, int64_t features, float* y) {
  if (!input.mask) return;
  for (int64_t row = 0; row < input.batch * input.length; ++row) {
    if (input.mask[row]) continue;
    std::memset(y + row * features, 0, static_cast<size_t>(features) * sizeof(float));
  }
}

}  // namespace

void run_encoder(const Encoder& encoder, const EncoderInput& input, float* y,
                 int threads, PartTimes* times) {
  PartClock clock(times);
  const KeptTokens kept = keep_tokens(input.batch, input.length, input.mask);
  check_input(encoder, input, kept);
  clear_padding(input, encoder.features, y);
  const std::vector<SequenceGroup> shared = groups_for_threads(kept, threads);
  if (shared.empty()) {
    for (const SequenceGroup& group : group_sequences(kept, kGroupTokens)) {
      GroupRun(encoder, input, kept, group, threads).run(y, clock);
    }
    return;
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel(threads, [&](int thread, int) {
    PartClock idle(nullptr);
    // Nothing may be thrown out of a parallel region.
    try {
      for (size_t i = next++; i < shared.size(); i = next++) {
        GroupRun(encoder, input, kept, shared[i], 1).run(y, thread == 0 ? clock : idle);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace pybsp
