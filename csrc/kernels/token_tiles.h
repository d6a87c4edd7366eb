// SPDX-License-Identifier: Apache-2.0
// Activations (tokens, features) with tokens in SIMD lanes.
//
// Tokens are cut into as few tiles of at most max_vectors vectors as possible, of
// widths that differ by one at most; a tile is [feature][lanes x vectors] float32 and
// tiles lie one after the other. Lanes past the last token repeat it. The layout
// belongs to the active instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace pybsp {

struct Variants;

struct TokenTile {
  int64_t first;   // token
  int64_t tokens;  // 1 to lanes x vectors
  int vectors;
  int64_t slot;  // lanes of the tiles before it; times features: its first float
};

std::vector<TokenTile> split_tokens(int64_t tokens, const Variants& isa);

// Lanes of all tiles of so many tokens: the floats that one feature takes.
int64_t tile_lanes(int64_t tokens, const Variants& isa);

// How threads share tiles: `groups` of them take other tokens, and the `teams` of each
// group other parts of the outputs. Every thread transposes what it reads, so that none
// waits for lines in the cache of another core.
struct ThreadSplit {
  int64_t groups;
  int64_t teams;
};

// groups x teams = threads; two vectors of tokens a group where there are as many, for
// one alone has too few sums to keep the FMA units busy.
ThreadSplit split_threads(int64_t vectors, int threads);

// The tiles of each of `groups` groups, which share the vectors of tokens evenly; slots
// count from the start of a group. Before a parallel region: it may throw.
std::vector<std::vector<TokenTile>> split_groups(int64_t tokens, int64_t groups,
                                                 const Variants& isa);

// x, y (tokens, features) row-major; tiles (tile_lanes x features). No overlap. Safe to
// call from several threads at once.
void pack_tiles(const float* x, int64_t tokens, int64_t features, float* tiles,
                int threads);
void unpack_tiles(const float* tiles, int64_t tokens, int64_t features, float* y,
                  int threads);

}  // namespace pybsp
