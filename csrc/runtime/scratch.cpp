// SPDX-License-Identifier: Apache-2.0
#include "runtime/scratch.h"

#if defined(__unix__)
#include <unistd.h>
#endif

#include <memory>
#include <new>

namespace pybsp {
namespace {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

struct Memory {
  std::unique_ptr<float[], AlignedDelete> floats;
  int64_t count = 0;
};

}  // namespace

float* scratch_floats(int64_t count, Scratch use) {
  thread_local Memory memory[2];
  Memory& scratch = memory[static_cast<int>(use)];
  if (count > scratch.count) {
    scratch.floats.reset();
    scratch.count = 0;
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    scratch.floats.reset(
        static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
    scratch.count = count;
  }
  return scratch.floats.get();
}

int64_t l2_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace pybsp
