// SPDX-License-Identifier: Apache-2.0
#include "kernels/variants.h"

namespace pybsp {
namespace {

[[maybe_unused]] Variants with_int8(const Variants& others, const Int8Kernels& int8) {
  Variants all = others;
  all.int8 = &int8;
  return all;
}

[[maybe_unused]] Variants with_int8(const Variants& others, const Int8Kernels& int8,
                                    void (*attention)(const AttentionPiece&),
                                    int64_t (*attention_scratch)(int64_t, int64_t)) {
  Variants all = with_int8(others, int8);
  all.attention = attention;
  all.attention_scratch = attention_scratch;
  return all;
}

}  // namespace

const Variants& variants(Isa isa) {
  switch (isa) {
#ifdef PYBSP_HAVE_AVX2
    case Isa::avx2:
      return avx2::variants();
#endif
#ifdef PYBSP_HAVE_AVX2_VNNI
    case Isa::avx2_vnni: {
      static const Variants all =
          with_int8(avx2::variants(), avx2_vnni::int8_kernels, avx2_vnni::attention,
                    avx2_vnni::attention_scratch);
      return all;
    }
#endif
#ifdef PYBSP_HAVE_AVX512
    case Isa::avx512:
      return avx512::variants();
#endif
#ifdef PYBSP_HAVE_AVX512_VNNI
    case Isa::avx512_vnni: {
      static const Variants all =
          with_int8(avx512::variants(), avx512_vnni::int8_kernels,
                    avx512_vnni::attention, avx512_vnni::attention_scratch);
      return all;
    }
#endif
#ifdef PYBSP_HAVE_AMX
    case Isa::amx: {
      static const Variants all = [] {
        Variants with_amx = with_int8(avx512::variants(), amx::int8_kernels,
                                      amx::attention, amx::attention_scratch);
        with_amx.end_attention = amx::end_attention;
        return with_amx;
      }();
      return all;
    }
#endif
#ifdef PYBSP_HAVE_NEON
    case Isa::neon:
      return neon::variants();
#endif
#ifdef PYBSP_HAVE_NEON_DOT
    case Isa::neon_dot: {
      static const Variants all = with_int8(neon::variants(), neon_dot::int8_kernels);
      return all;
    }
#endif
    default:
      return generic::variants();
  }
}

}  // namespace pybsp
