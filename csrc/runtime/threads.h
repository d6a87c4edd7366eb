// SPDX-License-Identifier: Apache-2.0
// The only files that mention OpenMP are this one's implementation and the build.
#pragma once

#include <cstdint>

namespace pybsp {

// Calls body(context, thread, threads) once on each of `threads` threads and waits.
// Runs body(context, 0, 1) in the caller when threads <= 1, when the caller is itself
// inside a parallel region, and in a process made by fork() without exec(): it has of
// its parent's pool of threads the memory but not the threads, and OpenMP would wait
// for them forever. body must not throw.
void run_on_threads(int threads, void (*body)(void* context, int thread, int threads),
                    void* context);

// Called by every thread of a parallel region: returns when all have called it.
void wait_for_threads();

template <typename Body>
void parallel(int threads, Body body) {
  run_on_threads(
      threads,
      [](void* context, int thread, int count) {
        (*static_cast<Body*>(context))(thread, count);
      },
      &body);
}

// The share [first, last) of `count` items that belongs to `thread`.
struct Range {
  int64_t first;
  int64_t last;
};
inline Range share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// OpenMP's version date (for example 201511), 0 when built without OpenMP.
int openmp_version();

}  // namespace pybsp
