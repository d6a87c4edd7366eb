// SPDX-License-Identifier: Apache-2.0
#include "runtime/threads.h"

#ifdef _OPENMP
#include <omp.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#endif

namespace pybsp {

#ifdef _OPENMP
namespace {

// A handler and not a comparison of process ids: getpid is a system call, and this is
// asked on every parallel call. Written while a child has one thread, so no atomic.
bool in_forked_child = false;

#if defined(__unix__) || defined(__APPLE__)
// Fails only for want of memory while the library is being loaded.
[[maybe_unused]] const int handler_set =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace
#endif

void run_on_threads(int threads, void (*body)(void*, int, int), void* context) {
#ifdef _OPENMP
  if (threads > 1 && !in_forked_child && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(context, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  body(context, 0, 1);
}

void wait_for_threads() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

int openmp_version() {
#ifdef _OPENMP
  return _OPENMP;
#else
  return 0;
#endif
}

}  // namespace pybsp
