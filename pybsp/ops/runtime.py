"""The instruction set, the threads and the build."""

from __future__ import annotations

import functools
import hashlib
import operator
import platform
from pathlib import Path

import torch

from .. import _core

set_active_isa = _core.set_active_isa
active_isa = _core.active_isa
available_isas = _core.available_isas
#: Operations a second of one thread on registers alone, two for each multiply-add.
dot_peak = _core.dot_peak
fma_peak = _core.fma_peak
#: The same of the forward kernel's widest tile with weights and inputs in L1: what its
#: instructions allow at the clock rate the CPU keeps while it loads.
tile_peak = _core.tile_peak
#: Inputs of a layer up to which 8-bit products are exact.
max_int8_inputs = _core.max_int8_inputs
#: Bytes of one core's second-level cache as the kernels take it.
l2_cache_bytes = _core.l2_cache_bytes
#: Tokens in a vector and vectors in the widest tile, of the instruction set in use.
token_tile = _core.token_tile
#: Whether any of some dictionaries was written to, by what Python itself counts:
#: ``DictVersions(dicts)``, and later, with the same list of dictionaries that are still
#: alive, ``unchanged(dicts)``. False may be said without a change: from Python 3.12 on
#: after a write to any dictionary that was ever asked about, in 3.13.0 always. What
#: happens within a value is not seen.
DictVersions = _core.DictVersions

# Fails at import, not in the first layer, when PYBSP_ISA names what cannot run.
active_isa()


def read_bandwidth(bytes: int) -> float:
    """Bytes a second at which one thread reads a buffer of this size, over and over.

    The yardstick of operations that memory limits: vector loads, summed in registers,
    best of several runs. A buffer as large as the data tells the cache or memory that
    the data come from.
    """
    if operator.index(bytes) < 4096:
        raise ValueError(
            f"bytes must be at least 4096, or calls would be measured; got {bytes}"
        )
    return _core.read_bandwidth(bytes)


@functools.cache
def build_id() -> str:
    """A hash of the compiled module: another build has another one."""
    content = Path(_core.__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def cpu_name() -> str:
    """The processor's model name, as the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show_config() -> None:
    """Print the instruction sets found and used, the threads and the build."""
    print("\n".join(f"{name:>10}: {value}" for name, value in config().items()))


def config() -> dict[str, str]:
    """What ``show_config`` prints."""
    build = _core.build_info()
    return {
        "pybsp": build["version"],
        "isa": f"{active_isa()} (available: {', '.join(available_isas())}; "
        "PYBSP_ISA forces one)",
        "threads": str(torch.get_num_threads()),
        "compiler": build["compiler"],
        "openmp": str(build["openmp"]),
        "torch": torch.__version__,
    }
