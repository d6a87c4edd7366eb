#!/usr/bin/env bash
# Runs the test program compiled for AArch64 under emulation: the neon variant and the
# generic one of that architecture.
#
#   tests/native/run_aarch64.sh [arguments of pybsp_selftest; default --quick]
#
# Needs CMake, aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu) and qemu-aarch64
# (Debian: qemu-user). Takes about two minutes, most of it compiling.
set -euo pipefail
cd "$(dirname "$0")/../.."

cmake --preset aarch64 >/dev/null
cmake --build --preset aarch64 --parallel 2 >/dev/null
[[ $# -gt 0 ]] || set -- --quick
exec qemu-aarch64 build/aarch64/pybsp_selftest "$@"
