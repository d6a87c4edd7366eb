// SPDX-License-Identifier: Apache-2.0
// Tiles of inputs as 8-bit integers; int8_products.h says how they are rounded.
#include "kernels/int8_tiles.h"
#include "kernels/variants_isa.h"

namespace pybsp::PYBSP_ISA {
namespace {

// How the lanes of a tile become integers. `bad` is 0, or NaN where an input is not
// finite.
template <int kVectors, bool kGiven>
struct Quantizer {
  Vec inverse[kVectors];
  Vec bad[kVectors];

  // One feature.
  inline Bytes operator()(const float* x) {
    Sums q[4];
    PYBSP_UNROLL
    for (int v = 0; v < 4; ++v) {
      q[v] = v < kVectors ? lane_values(x, v) : set1_sums(0);
    }
    return narrow(q[0], q[1], q[2], q[3]);
  }

 private:
  inline Sums lane_values(const float* x, int v) {
    const Vec a = load(x + v * kLanes), scaled = mul(a, inverse[v]);
    if constexpr (!kGiven) return to_ints(scaled);
    bad[v] = fma(a, zero(), bad[v]);
    return to_ints(max(min(scaled, set1(127.0f)), set1(-127.0f)));
  }
};

// The largest magnitude in each lane, NaN above all.
template <int kVectors>
inline void find_largest(const float* x_tile, int64_t features,
                         Vec (&largest)[kVectors]) {
  constexpr int64_t kWidth = kVectors * kLanes;
  constexpr int kChains = 4 / kVectors;  // all features of one vector would wait
  Vec found[kChains][kVectors];
  PYBSP_UNROLL
  for (int chain = 0; chain < kChains; ++chain) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) found[chain][v] = zero();
  }
  const auto see = [&](int chain, const float* row) {
    PYBSP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      found[chain][v] = max_bits(found[chain][v], magnitude(load(row + v * kLanes)));
    }
  };
  int64_t i = 0;
  for (; i + kChains <= features; i += kChains) {
    PYBSP_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      see(chain, x_tile + (i + chain) * kWidth);
    }
  }
  for (; i < features; ++i) see(0, x_tile + i * kWidth);
  PYBSP_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = found[0][v];
    PYBSP_UNROLL
    for (int chain = 1; chain < kChains; ++chain) {
      largest[v] = max_bits(largest[v], found[chain][v]);
    }
  }
}

template <int kVectors, bool kGiven>
void quantize_tile(const float* x_tile, int64_t features, float input_scale,
                   bool consecutive, int8_t* bytes, float* scales) {
  constexpr int64_t kWidth = kVectors * kLanes;
  Quantizer<kVectors, kGiven> quantized;
  Vec scale[kVectors], largest[kVectors];
  if constexpr (!kGiven) find_largest<kVectors>(x_tile, features, largest);
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kGiven) {
      scale[v] = set1(input_scale);
      quantized.inverse[v] = div(set1(1.0f), scale[v]);
      quantized.bad[v] = zero();
    } else {
      const Vec a = largest[v];
      const Vec least = set1(kLeastInput), most = set1(127.0f);
      scale[v] = select_gt(least, a, zero(), div(a, most));
      quantized.inverse[v] = select_gt(least, a, zero(), div(most, a));
      quantized.bad[v] = sub(a, a);
    }
  }
  if (consecutive) {
    for (int64_t i = 0; i < features; i += 4) {
      Bytes rows[4], quad[kVectors];
      PYBSP_UNROLL
      for (int k = 0; k < 4; ++k) rows[k] = quantized(x_tile + (i + k) * kWidth);
      bring_together<kVectors>(rows, quad);
      PYBSP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        store_bytes(bytes + (i / 4 * kVectors + v) * kVectorBytes, quad[v]);
      }
    }
  } else {
    for (int64_t i = 0; i < features; ++i) {
      store_bytes(bytes + i * kVectorBytes, quantized(x_tile + i * kWidth));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(scales + v * kLanes, add(scale[v], quantized.bad[v]));
  }
}

template <int kVectors>
void quantize_width(const float* x_tile, int64_t features, float input_scale,
                    bool consecutive, int8_t* bytes, float* scales) {
  if (input_scale == 0.0f) {
    quantize_tile<kVectors, false>(x_tile, features, 0.0f, consecutive, bytes, scales);
  } else {
    quantize_tile<kVectors, true>(x_tile, features, input_scale, consecutive, bytes,
                                  scales);
  }
}

}  // namespace

void quantize_inputs(const float* x_tile, int64_t features, int vectors,
                     float input_scale, bool consecutive, int8_t* bytes,
                     float* scales) {
  switch (vectors) {
    case 1:
      return quantize_width<1>(x_tile, features, input_scale, consecutive, bytes,
                               scales);
    case 2:
      return quantize_width<2>(x_tile, features, input_scale, consecutive, bytes,
                               scales);
    default:
      return quantize_width<3>(x_tile, features, input_scale, consecutive, bytes,
                               scales);
  }
}

}  // namespace pybsp::PYBSP_ISA
