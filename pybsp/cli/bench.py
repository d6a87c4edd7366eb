"""``pybsp bench``: how fast a packed model is on this CPU, against its dense form."""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import checkpoints
from .arguments import positive_int, positive_ints, positive_number
from .errors import WorkError
from .main import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a pruned checkpoint")
    parser.add_argument(
        "--batch", type=positive_ints, default=(1,), metavar="N,...",
        help="sequences in the input; several numbers are all tried (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--seq", type=positive_ints, default=(128,), metavar="N,...",
        help="tokens in a sequence; several numbers are all tried (default: 128)",
    )  # fmt: skip
    parser.add_argument(
        "--ragged", action="store_true",
        help="pad: the first sequence has all tokens, the others from 1 on, at random",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive_int, default=1, metavar="N",
        help="threads of every candidate (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive_number, default=6.0, metavar="X",
        help="time to spend on the comparison of one input, about (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-onnx", action="store_true",
        help="leave ONNX Runtime and OpenVINO out even when they are installed",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Result:
    folder = checkpoints.checked_folder(arguments.folder)
    from .. import ops
    from ..nn.linear import BlockSparseLinear
    from ..nn.pack import pack_, unpack_
    from . import bench_tables, breakdown, environment, measurement
    from .timing import torch_threads

    packed = checkpoints.load(folder)
    if not any(isinstance(module, BlockSparseLinear) for module in packed.modules()):
        # Loading keeps layers dense that would not be faster, or there was no record.
        packed = copy.deepcopy(packed)
        pack_(packed)
    dense = unpack_(copy.deepcopy(packed))
    shapes = list(itertools.product(arguments.batch, arguments.seq))
    # Before anything takes time.
    measurement.random_inputs(packed.config, 1, max(arguments.seq))
    check_same(dense, packed, min(arguments.seq))
    dtype = measurement.packed_dtype(packed)
    encoders = breakdown.encoders(packed)
    peaks = {
        "peak": arguments.threads * ops.fma_peak(),
        "int8_peak": arguments.threads * ops.dot_peak(),
    }
    data: dict[str, Any] = {
        "environment": environment.describe(),
        "dtype": dtype,
        "encoders": [asdict(encoder) for encoder in encoders],
        "memory": breakdown.memory(dense, packed),
        "measurements": [
            measure(dense, packed, batch, sequence, peaks, arguments)
            for batch, sequence in shapes
        ],
    }
    batch, sequence = shapes[0]
    with torch_threads(arguments.threads):
        report = pack_(dense, dtype=dtype, tokens=batch * sequence)
    # Of the model that was timed.
    report = replace(report, encoders=encoders)
    data["report"] = report.to_dict()
    layers = bench_tables.layers_table(report, dtype)
    return Result(data, [*bench_tables.tables(data, encoders), layers])


def measure(
    dense: Any, packed: Any, batch: int, sequence: int, peaks: dict[str, float],
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one input; ``peaks``: operations a second of all threads."""
    from . import breakdown, measurement

    print(f"timing {batch} x {sequence} tokens ...", file=sys.stderr, flush=True)
    seconds = arguments.seconds
    model, threads = packed.base_model, arguments.threads
    inputs = measurement.random_inputs(dense.config, batch, sequence, arguments.ragged)
    calls, notes = measurement.candidates(
        dense, packed, inputs, threads=threads, onnx=not arguments.no_onnx
    )
    latency = measurement.compare(
        calls, inputs, threads=threads, seconds=seconds, notes=notes,
        dtype=measurement.packed_dtype(packed),
    )  # fmt: skip
    # In the order of the rounds: first what comes after the packed model.
    others = [calls[name] for name in calls if name not in ("dense", "packed")]
    others.append(calls["dense"])
    median_ms = latency["candidates"]["packed"]["median_ms"]
    try:
        found: dict[str, Any] = {
            "floor": breakdown.floor(model, inputs, median_ms=median_ms, **peaks),
            "parts": breakdown.parts(
                model, inputs, others, threads=threads, seconds=seconds / 2
            ),
        }
    except breakdown.NotNative as reason:
        found = {"floor": None, "parts": None, "no_parts": str(reason)}
    return {**latency, **found}


def check_same(dense: Any, packed: Any, sequence: int) -> None:
    """``WorkError`` unless both give the same outputs: nothing wrong gets timed."""
    import torch

    from .measurement import difference, random_inputs, tolerance

    inputs = random_inputs(dense.config, 1, sequence)
    with torch.inference_mode():
        wrong = difference(
            packed(**inputs)[0], dense(**inputs)[0], tolerance=tolerance(packed)
        )
    if wrong:
        raise WorkError(f"the packed model's {wrong}; run pybsp check")
