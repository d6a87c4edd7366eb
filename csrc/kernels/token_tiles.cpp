// SPDX-License-Identifier: Apache-2.0
#include "kernels/token_tiles.h"

#include <algorithm>

#include "kernels/variants.h"
#include "runtime/isa.h"
#include "runtime/threads.h"

namespace pybsp {

std::vector<TokenTile> split_tokens(int64_t tokens, const Variants& isa) {
  std::vector<TokenTile> tiles;
  int64_t vectors = (tokens + isa.lanes - 1) / isa.lanes, slot = 0;
  int64_t left = (vectors + isa.max_vectors - 1) / isa.max_vectors;
  for (int64_t first = 0; first < tokens; --left) {
    const int64_t width = (vectors + left - 1) / left;
    const int64_t count = std::min<int64_t>(width * isa.lanes, tokens - first);
    tiles.push_back({first, count, static_cast<int>(width), slot});
    first += count;
    slot += width * isa.lanes;
    vectors -= width;
  }
  return tiles;
}

int64_t tile_lanes(int64_t tokens, const Variants& isa) {
  return (tokens + isa.lanes - 1) / isa.lanes * isa.lanes;
}

ThreadSplit split_threads(int64_t vectors, int threads) {
  int64_t groups = std::clamp<int64_t>(vectors / 2, 1, threads);
  while (threads % groups != 0) --groups;
  return {groups, threads / groups};
}

std::vector<std::vector<TokenTile>> split_groups(int64_t tokens, int64_t groups,
                                                 const Variants& isa) {
  const int64_t vectors = (tokens + isa.lanes - 1) / isa.lanes;
  std::vector<std::vector<TokenTile>> tiles;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = vectors * group / groups * isa.lanes;
    const int64_t last = std::min(tokens, vectors * (group + 1) / groups * isa.lanes);
    tiles.push_back(split_tokens(last - first, isa));
    for (TokenTile& tile : tiles.back()) tile.first += first;
  }
  return tiles;
}

void pack_tiles(const float* x, int64_t tokens, int64_t features, float* tiles,
                int threads) {
  const Variants& isa = variants(active_isa());
  const std::vector<TokenTile> split = split_tokens(tokens, isa);
  parallel(threads, [&](int thread, int count) {
    const Range range = share(static_cast<int64_t>(split.size()), thread, count);
    for (int64_t i = range.first; i < range.last; ++i) {
      const TokenTile& tile = split[static_cast<size_t>(i)];
      isa.pack_tokens(x + tile.first * features, features, tile.tokens, 0, features,
                      tile.vectors, tiles + tile.slot * features);
    }
  });
}

void unpack_tiles(const float* tiles, int64_t tokens, int64_t features, float* y,
                  int threads) {
  const Variants& isa = variants(active_isa());
  const std::vector<TokenTile> split = split_tokens(tokens, isa);
  parallel(threads, [&](int thread, int count) {
    const Range range = share(static_cast<int64_t>(split.size()), thread, count);
    for (int64_t i = range.first; i < range.last; ++i) {
      const TokenTile& tile = split[static_cast<size_t>(i)];
      isa.unpack_tokens(tiles + tile.slot * features, features, tile.tokens,
                        tile.vectors, Activation::none, nullptr,
                        y + tile.first * features, features);
    }
  });
}

}  // namespace pybsp
