// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pybsp::amx {
namespace {

// What _tile_loadconfig reads.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles of rows of 64 bytes: tile 7 has 16 of them and the others `rows`.
inline void configure_tiles(int64_t rows) {
  alignas(64) TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile == 7 ? 16 : rows);
  }
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace pybsp::amx
