// SPDX-License-Identifier: Apache-2.0
// The cases of each operation. Every function runs the active instruction set against
// scalar double precision and reports what differs by more than rounding explains.
#pragma once

#include "report.h"

namespace selftest {

// `quick` keeps every kernel and every edge but fewer sizes, for slow emulators.
void check_block_sparse_gemm(Report& report, bool quick);
void check_products(Report& report, bool quick);
void check_token_tiles(Report& report);
void check_block_sparse_grad(Report& report, bool quick);
void check_encoder(Report& report, bool quick);
void check_int8(Report& report, bool quick);
void check_bfloat16(Report& report, bool quick);
void check_activations(Report& report, bool quick);
void check_group_lasso(Report& report, bool quick);
void check_block_mask(Report& report, bool quick);

// One random case of attention, of each kind, drawn from `random`.
void check_random_attention(Report& report, Random& random);

// One random case of an operation drawn from `random`.
void fuzz(Report& report, Random& random);

}  // namespace selftest
