// SPDX-License-Identifier: Apache-2.0
#include "kernels/variants.h"

namespace pybsp {

const Variants& variants(Isa isa) {
  switch (isa) {
#ifdef PYBSP_HAVE_AVX2
    case Isa::avx2:
      return avx2::variants();
#endif
#ifdef PYBSP_HAVE_AVX512
    case Isa::avx512:
      return avx512::variants();
#endif
#ifdef PYBSP_HAVE_NEON
    case Isa::neon:
      return neon::variants();
#endif
    default:
      return generic::variants();
  }
}

}  // namespace pybsp
