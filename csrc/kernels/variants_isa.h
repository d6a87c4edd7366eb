// SPDX-License-Identifier: Apache-2.0
// The kernels of the instruction set that is being compiled; variants.h says what each
// does.
#pragma once

#include "kernels/variants.h"

namespace pybsp::PYBSP_ISA {

extern const BlockRowKernels<float> block_rows_float32;
extern const BlockRowKernels<Bfloat16> block_rows_bfloat16;
extern const Int8Kernels int8_kernels;
int32_t dot_chains(int64_t rounds);
void quantize_inputs(const float* x_tile, int64_t features, int vectors,
                     float input_scale, bool consecutive, int8_t* bytes, float* scales);
void pack_tokens(const float* x, int64_t in_features, int64_t tokens, int64_t first,
                 int64_t last, int vectors, float* tile);
void widen(const Bfloat16* values, int64_t count, float* floats);
void multiply_rows(const BlockSparseView& weight, int64_t first, int64_t last,
                   const float* x_tile, int vectors, const float* bias, float* y_tile);
void multiply_columns(const BlockSparseView& weight, ColumnTiles tiles,
                      const float* x_tile, int vectors, const float* bias,
                      float* y_tile);
void unpack_tokens(const float* y_tile, int64_t rows, int64_t tokens, int vectors,
                   Activation activation, const float* residual, float* y,
                   int64_t out_features);
void finish(const float* sums, int64_t count, Activation activation,
            const float* residual, float* y);
void multiply_few_tokens(const BlockSparseView& weight, int64_t first, int64_t last,
                         const float* x, int64_t tokens, const float* bias, float* y);
void attention(const AttentionPiece& piece);
int64_t attention_scratch(int64_t head_dim, int64_t keys);
void layer_norm(const float* x_tile, int64_t features, int vectors, const float* weight,
                const float* bias, float eps, float* y_tile);
void rotate(float* first, float* second, const float* cosines, const float* sines,
            int64_t count);
void gate(const float* a, const float* b, int64_t count, Activation activation,
          float* y);
void multiply_runs(const BlockSparseView& weight, RunTiles tiles, const float* dy_tile,
                   int vectors, float* dx_tile);
void multiply_block_columns(const BlockSparseView& weight, BlockColumns columns,
                            const float* dy_tile, int vectors, float* dx_tile);
void sampled_products(const SampledProducts& products);
void add_feature_sums(const float* panel, int64_t features, int64_t feature_step,
                      int64_t vectors, int64_t vector_step, float* sums);
float fma_chains(int64_t rounds);
float sum_floats(const float* data, int64_t count, int64_t rounds);

}  // namespace pybsp::PYBSP_ISA
