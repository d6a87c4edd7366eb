"""The choice of the instruction set, by this process and by ``PYBSP_ISA``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import block_sparse_weight

from pybsp import BlockSparseMatrix, ops

ALL = [
    "generic",
    "avx2",
    "avx2_vnni",
    "avx512",
    "avx512_vnni",
    "amx",
    "neon",
    "neon_dot",
]


def start(program: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter with ``PYBSP_ISA`` set to ``isa``."""
    environment = {k: v for k, v in os.environ.items() if k != "PYBSP_ISA"}
    if isa is not None:
        environment["PYBSP_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 "])
def test_an_unknown_isa_fails_at_import(name: str) -> None:
    result = start("import pybsp", name)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: PYBSP_ISA={name} is not an ISA; available: ")
    assert "generic" in last


def test_an_isa_that_cannot_run_here_fails_at_import() -> None:
    missing = next(name for name in ALL if name not in ops.available_isas())
    result = start("import pybsp", missing)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: PYBSP_ISA={missing} cannot run on this CPU")


def test_the_forced_isa_is_used_and_an_empty_one_is_none() -> None:
    program = "import pybsp; pybsp.show_config()"
    forced = start(program, "generic")
    assert forced.returncode == 0, forced.stderr
    assert "isa: generic (available: generic" in forced.stdout
    empty = start("import pybsp; print(pybsp.ops.active_isa())", "")
    assert empty.stdout.strip() == ops.available_isas()[-1]


def test_names_and_order() -> None:
    available = ops.available_isas()
    assert available == [name for name in ALL if name in available]
    assert available[0] == "generic"


def test_set_active_isa(isa: str) -> None:
    assert ops.active_isa() == isa
    for name in ("sse9", "", "AVX2"):
        with pytest.raises(ValueError, match="is not an ISA; available"):
            ops.set_active_isa(name)
    for name in set(ALL) - set(ops.available_isas()):
        with pytest.raises(ValueError, match="cannot run on this CPU"):
            ops.set_active_isa(name)
    assert ops.active_isa() == isa


def test_one_matrix_serves_every_isa() -> None:
    weight = block_sparse_weight((48, 96), (1, 12), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (1, 12))
    x = torch.randn(33, 96)
    before = ops.active_isa()
    try:
        for name in ops.available_isas():
            ops.set_active_isa(name)
            y = ops.block_sparse_linear(x, W)
            torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-4)
    finally:
        ops.set_active_isa(before)


def test_read_bandwidth(isa: str) -> None:
    fast, slow = ops.read_bandwidth(16 << 10), ops.read_bandwidth(64 << 20)
    assert fast > slow > 1e8, isa
    assert fast < 64 * 3 * 10e9  # three vectors a cycle at 10 GHz
    for size in (0, -1, 4095):
        with pytest.raises(ValueError, match="bytes must be at least 4096"):
            ops.read_bandwidth(size)
    with pytest.raises(TypeError):
        ops.read_bandwidth(1e6)  # type: ignore[arg-type]
    assert ops.read_bandwidth(4099) > 1e8
