#!/usr/bin/env bash
# Runs the test program compiled for AArch64 under emulation: the neon variant and the
# generic one of that architecture.
#
#   tests/native/run_aarch64.sh [arguments of pybsp_selftest; default: --quick, and
#                                then --fuzz 50]
#
# Needs CMake, aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu) and qemu-aarch64
# (Debian: qemu-user). Takes about four minutes of CPU time, two of them compiling.
set -euo pipefail
cd "$(dirname "$0")/../.."

cmake --preset aarch64 >/dev/null
cmake --build --preset aarch64 --parallel 2 >/dev/null
selftest() { qemu-aarch64 build/aarch64/pybsp_selftest "$@"; }
if [[ $# -gt 0 ]]; then
  selftest "$@"
else
  selftest --quick
  selftest --fuzz 50
fi
