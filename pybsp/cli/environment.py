"""What a measurement ran on: versions, processor, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import ops

PACKAGES = (
    "pybsp", "torch", "transformers", "tokenizers", "numpy", "onnxruntime", "openvino",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Everything that a number in ``results.json`` depends on besides its options."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": ops.cpu_name(),
        "cores": available_cores(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def version_line() -> str:
    found = versions()
    rest = ", ".join(
        f"{name} {number}" for name, number in found.items() if name != "pybsp"
    )
    return f"pybsp {found.get('pybsp', 'unknown')} ({rest}; isa {isa()})"


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def isa() -> str:
    """The instruction set in use."""
    return ops.active_isa()
