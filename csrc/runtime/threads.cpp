// SPDX-License-Identifier: Apache-2.0
#include "runtime/threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pybsp {

void run_on_threads(int threads, void (*body)(void*, int, int), void* context) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
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
