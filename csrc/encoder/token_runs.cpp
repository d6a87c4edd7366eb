// SPDX-License-Identifier: Apache-2.0
#include "encoder/token_runs.h"

#include <algorithm>

namespace pybsp {

KeptTokens keep_tokens(int64_t batch, int64_t length, const bool* mask) {
  KeptTokens kept;
  kept.rows.reserve(static_cast<size_t>(batch * length));
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t first = static_cast<int64_t>(kept.rows.size());
    for (int64_t at = row * length; at < (row + 1) * length; ++at) {
      if (!mask || mask[at]) kept.rows.push_back(at);
    }
    const int64_t tokens = static_cast<int64_t>(kept.rows.size()) - first;
    if (tokens > 0) kept.sequences.push_back({first, tokens});
  }
  return kept;
}

std::vector<SequenceGroup> group_sequences(const KeptTokens& kept, int64_t tokens) {
  std::vector<SequenceGroup> groups;
  for (size_t i = 0; i < kept.sequences.size(); ++i) {
    const Sequence& sequence = kept.sequences[i];
    const int64_t end = sequence.first + sequence.tokens;
    if (groups.empty() || end - groups.back().first_token > tokens) {
      groups.push_back({i, i, sequence.first, end});
    }
    groups.back().last = i + 1;
    groups.back().last_token = end;
  }
  return groups;
}

void append_runs(const std::vector<TokenTile>& tiles, int64_t first, int64_t tokens,
                 std::vector<TokenRun>& runs) {
  size_t tile = 0;
  while (tiles[tile].first + tiles[tile].tokens <= first) ++tile;
  for (int64_t token = 0; token < tokens;) {
    const TokenTile& in = tiles[tile];
    const int64_t lane = first + token - in.first;
    const int64_t count = std::min(tokens - token, in.tokens - lane);
    runs.push_back({static_cast<int32_t>(tile), static_cast<int32_t>(lane),
                    static_cast<int32_t>(count)});
    token += count;
    if (lane + count == in.tokens) ++tile;
  }
}

}  // namespace pybsp
