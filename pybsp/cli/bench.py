"""``pybsp bench``: how fast a packed model is on this CPU, against its dense form."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from . import checkpoints
from .arguments import positive_int, positive_number
from .errors import WorkError
from .main import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a pruned checkpoint")
    parser.add_argument(
        "--batch", type=positive_int, default=1, metavar="N",
        help="sequences in the input (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seq", type=positive_int, default=128, metavar="N",
        help="tokens in a sequence (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive_int, default=1, metavar="N",
        help="threads of every candidate (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive_number, default=6.0, metavar="X",
        help="time to spend on the comparison, about (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-onnx", action="store_true",
        help="leave ONNX Runtime out even when it is installed",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Result:
    folder = checkpoints.checked_folder(arguments.folder)
    from ..nn.linear import BlockSparseLinear
    from ..nn.pack import pack_
    from . import environment, measurement
    from .reporting import latency_table
    from .timing import torch_threads

    packed = checkpoints.load(folder)
    if not any(isinstance(module, BlockSparseLinear) for module in packed.modules()):
        # Loading keeps layers dense that would not be faster, or there was no record.
        packed = copy.deepcopy(packed)
        pack_(packed)
    dense = copy.deepcopy(packed)
    dense = dense.dequantize() if hasattr(dense, "hf_quantizer") else unpacked(dense)
    check_same(dense, packed, arguments.seq)
    latency = measurement.latency(
        dense, packed, batch=arguments.batch, sequence=arguments.seq,
        threads=arguments.threads, seconds=arguments.seconds,
        onnx=not arguments.no_onnx,
    )  # fmt: skip
    with torch_threads(arguments.threads):
        report = pack_(dense, tokens=arguments.batch * arguments.seq)
    data: dict[str, Any] = {
        "environment": environment.describe(),
        "latency": latency,
        "report": report.to_dict(),
    }
    host = data["environment"]
    where = f"{host['cpu']}, {host['isa']}; times are medians of interleaved rounds"
    return Result(data, [latency_table(latency), where, report])


def unpacked(model: Any) -> Any:
    from ..nn.pack import unpack_

    return unpack_(model)


def check_same(dense: Any, packed: Any, sequence: int) -> None:
    """``WorkError`` unless both give the same outputs: nothing wrong gets timed."""
    import torch

    from .measurement import random_inputs

    inputs = random_inputs(dense.config, 1, sequence)
    with torch.inference_mode():
        expected, found = dense(**inputs)[0], packed(**inputs)[0]
    scale = float(expected.abs().max())
    difference = float((expected - found).abs().max())
    if not difference <= 1e-3 * max(scale, 1e-6):
        raise WorkError(
            "the packed model's output differs from the dense one's by "
            f"{difference:.3g} (largest value {scale:.3g}); run pybsp check"
        )
