// SPDX-License-Identifier: Apache-2.0
// Bytes a second that one thread reads from a buffer of `bytes` >= 4096 it has read
// before, in vector loads summed in registers: the best of several runs of a
// millisecond or one pass, whichever is longer. Throws std::bad_alloc.
#pragma once

#include <cstdint>

namespace pybsp {

double read_bandwidth(int64_t bytes);

}  // namespace pybsp
