// SPDX-License-Identifier: Apache-2.0
// Multiply-adds a second of one thread on registers alone, two operations each, in the
// active instruction set: the best of several runs of a few milliseconds.
#pragma once

namespace pybsp {

double fma_peak();

}  // namespace pybsp
