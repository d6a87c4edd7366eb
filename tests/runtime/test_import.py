"""What is printed about the build, and what a missing build says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pybsp
from pybsp import ops


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    pybsp.show_config()
    printed = capsys.readouterr().out
    lines = dict(line.strip().split(": ", 1) for line in printed.splitlines())
    assert set(lines) == {"pybsp", "isa", "threads", "compiler", "openmp", "torch"}
    assert lines["isa"].startswith(ops.active_isa())
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["torch"] == torch.__version__


def test_a_missing_compiled_module_says_how_to_build_it(tmp_path: Path) -> None:
    source = Path(pybsp.__file__).parent
    shutil.copytree(
        source, tmp_path / "pybsp", ignore=shutil.ignore_patterns("_core*", "*.pyc")
    )
    result = subprocess.run(
        [sys.executable, "-c", "import pybsp"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled module pybsp._core")
    assert "pip install ." in last


def test_torch_comes_first_and_transformers_stays_out() -> None:
    program = (
        "import sys, pybsp;"
        "names = list(sys.modules);"
        "assert names.index('torch') < names.index('pybsp._core');"
        "assert 'transformers' not in names, 'transformers was imported'"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
