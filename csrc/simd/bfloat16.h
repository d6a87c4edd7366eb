// SPDX-License-Identifier: Apache-2.0
// The upper half of a float: what bfloat16 tensors hold.
#pragma once

#include <cstdint>

namespace pybsp {

struct Bfloat16 {
  uint16_t bits;
};

}  // namespace pybsp
