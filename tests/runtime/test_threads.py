"""One OpenMP runtime, torch's number of threads, forked workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from helpers import block_sparse_weight, same_bits

from pybsp import BlockSparseMatrix, ops

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.usefixtures("threads")
def test_one_openmp_runtime() -> None:
    torch.set_num_threads(2)
    W = BlockSparseMatrix.from_dense(torch.randn(256, 256), (8, 1))
    ops.block_sparse_linear(torch.randn(64, 256), W)
    # Other packages may bring their own copy (scikit-learn does, in its folder); what
    # counts is the one that the compiled module was linked to when it was loaded.
    program = (
        "import torch, pybsp;"
        "W = pybsp.BlockSparseMatrix.from_dense(torch.randn(256, 256), (8, 1));"
        "torch.set_num_threads(2);"
        "pybsp.block_sparse_linear(torch.randn(64, 256), W);"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*", maps))
    assert "_core" in maps
    assert len(found) == 1, found


@linux
def test_the_number_of_threads_is_torchs(threads: None) -> None:  # noqa: ARG001
    W = BlockSparseMatrix.from_dense(torch.randn(512, 512), (8, 1))
    x = torch.randn(96, 512)
    for number in (1, 2):
        torch.set_num_threads(number)
        ops.block_sparse_linear(x, W)
        ops.block_norms(torch.randn(512, 512), (8, 1))
        assert torch.get_num_threads() == number
        assert ops.config()["threads"] == str(number)


def _wait(child: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads_of_child", [1, 2])
def test_a_forked_child_computes(threads_of_child: int) -> None:
    torch.set_num_threads(2)
    weight = block_sparse_weight((512, 512), (8, 1), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (8, 1))
    x = torch.randn(256, 512)
    expected = ops.block_sparse_linear(x, W)  # starts the parent's pool of threads
    norms = ops.block_norms(weight, (8, 1))
    child = os.fork()
    if child == 0:
        # 1, as the workers of a torch DataLoader; 2 is what a child begins with. Its
        # pool has no threads: a parallel region would wait for them forever.
        torch.set_num_threads(threads_of_child)
        results = ops.block_sparse_linear(x, W), ops.block_norms(weight, (8, 1))
        torch.set_num_threads(1)  # Torch's comparison would wait.
        ok = same_bits(results[0], expected) and same_bits(results[1], norms)
        os._exit(0 if ok else 3)
    assert _wait(child, 60) == 0
    assert same_bits(ops.block_sparse_linear(x, W), expected)


class Products(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, W: BlockSparseMatrix, x: torch.Tensor) -> None:
        self.W, self.x = W, x

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, index: int) -> torch.Tensor:
        result: torch.Tensor = ops.block_sparse_linear(self.x[index], self.W)
        return result


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_data_loader_worker_computes() -> None:
    W = BlockSparseMatrix.from_dense(torch.randn(32, 16), (8, 1))
    x = torch.randn(6, 16)
    loader: Any = torch.utils.data.DataLoader(
        Products(W, x), batch_size=3, num_workers=1, multiprocessing_context="fork"
    )
    torch.testing.assert_close(torch.cat(list(loader)), x @ W.to_dense().t())


def test_the_openmp_of_the_build_is_reported() -> None:
    assert int(ops.config()["openmp"]) > 0
