// SPDX-License-Identifier: Apache-2.0
// Which tokens of a padded batch (rows, length) are computed, and where they lie.
//
// The kept tokens of all sequences follow each other without padding. Sequences are
// taken in groups that go through the encoder one after the other, or each on its own
// thread; the tiles of a group hold only its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/token_tiles.h"

namespace pybsp {

struct Sequence {
  int64_t first;  // kept token
  int64_t tokens;
};

struct KeptTokens {
  std::vector<int64_t> rows;        // row * length + position of every kept token
  std::vector<Sequence> sequences;  // those with at least one token
};

// `mask` (batch, length), false where there is padding; null keeps all.
KeptTokens keep_tokens(int64_t batch, int64_t length, const bool* mask);

// Consecutive sequences [first, last) and their kept tokens [first_token, last_token).
struct SequenceGroup {
  size_t first;
  size_t last;
  int64_t first_token;
  int64_t last_token;
};

// Groups of about `tokens` tokens, one sequence at least.
std::vector<SequenceGroup> group_sequences(const KeptTokens& kept, int64_t tokens);

// Tokens of one sequence with consecutive lanes of one tile.
struct TokenRun {
  int32_t tile;
  int32_t lane;
  int32_t count;
};

// The runs of the sequence of `tokens` tokens that begins with the tiles' token
// `first`.
void append_runs(const std::vector<TokenTile>& tiles, int64_t first, int64_t tokens,
                 std::vector<TokenRun>& runs);

}  // namespace pybsp
