// SPDX-License-Identifier: Apache-2.0
// Working memory that a thread keeps from call to call: a fresh allocation of a
// megabyte would be mapped, zeroed and unmapped by the system each time.
#pragma once

#include <cstdint>

namespace pybsp {

// Who uses it: an encoder calls operations that have their own.
enum class Scratch { operation, encoder };

// At least `count` floats, 64-byte aligned, with any contents; valid until the calling
// thread's next call for the same use. Throws std::bad_alloc.
float* scratch_floats(int64_t count, Scratch use = Scratch::operation);

// Floats of whole cache lines.
inline int64_t in_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Bytes of the second-level cache of one core; a megabyte where the system does not
// say.
int64_t l2_cache_bytes();

}  // namespace pybsp
