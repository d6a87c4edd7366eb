"""What every test shares: the report header, the seed and the instruction sets."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

# Before anything imports a library that would ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from pybsp import ops

# A forced instruction set is the only one tested, so that CI can run each by itself.
_ISAS = (
    [ops.active_isa()] if os.environ.get("PYBSP_ISA") else list(ops.available_isas())
)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pytest_report_header() -> list[str]:
    config = ops.config()
    return [
        f"cpu: {_cpu_name()} ({os.cpu_count()} logical)",
        f"isa: {config['isa']}; tested: {', '.join(_ISAS)}",
        f"threads: {config['threads']}, torch {config['torch']}, "
        f"numpy {np.__version__}, pybsp {config['pybsp']} ({config['compiler']})",
    ]


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests start look for modules in the current folder first, and the
    source tree has no compiled module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("away"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _first_calls_of_mkl() -> None:
    """The first call of MKL's vector functions in a process can be inexact, if rarely,
    when several threads make it (github.com/pytorch/pytorch 188792). Here one does, but
    not in the processes that tests start."""
    for dtype in (torch.float32, torch.float64):
        for function in (torch.erf, torch.exp, torch.log, torch.sqrt, torch.tanh):
            function(torch.ones(1, dtype=dtype))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The costs of this CPU are measured once for all tests, and kept from users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set that this CPU has."""
    before = ops.active_isa()
    ops.set_active_isa(request.param)
    yield request.param
    ops.set_active_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets the test call ``torch.set_num_threads``; restores the number after it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
