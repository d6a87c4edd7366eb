// SPDX-License-Identifier: Apache-2.0
// Multiply-adds a second of one thread on registers alone, two operations each, in the
// active instruction set: the best of several runs of a few milliseconds.
#pragma once

namespace pybsp {

double fma_peak();

// The same of the widest tile of block_sparse_gemm on 8 outputs and so few inputs that
// weights and inputs come from L1: what the instructions of the kernel allow, at the
// clock rate that the CPU keeps while it also loads.
double tile_peak();

// The same for 8-bit products of vectors: multiplications and additions a second. AMX
// does more of them.
double dot_peak();

}  // namespace pybsp
