"""Encoder latency of pruned checkpoints: packed, torch dense and ONNX Runtime in turn.

For folders that ``pybsp prune`` wrote; batch 1, 128 tokens, one thread, embeddings and
encoder. All three compute the same masked model; their outputs are compared first.

    python -m benchmarks.encoder RUN [RUN ...] [--seconds 12] [--name encoder]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pybsp
from benchmarks import result
from pybsp.cli import checkpoints, measurement
from pybsp.cli.bench import check_same


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    packed = checkpoints.load(folder)
    dense = copy.deepcopy(packed).dequantize()
    check_same(dense, packed, arguments.sequence)
    peak = pybsp.ops.fma_peak()
    latency = measurement.latency(
        dense, packed, batch=arguments.batch, sequence=arguments.sequence,
        threads=arguments.threads, seconds=arguments.seconds,
    )  # fmt: skip
    return {"run": folder.name, "peak_gflops": round(peak / 1e9, 1), **latency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--name", default="encoder", help="of the results' file")
    arguments = parser.parse_args()
    table = Table("run", "packed ms", "dense ms", "onnxruntime ms", "speed-up")
    rows = []
    for folder in arguments.runs:
        row = measure(folder, arguments)
        rows.append(row)
        times = {name: t["median_ms"] for name, t in row["candidates"].items()}
        table.add_row(
            row["run"],
            f"{times['packed']:.2f}",
            f"{times['dense']:.2f}",
            f"{times.get('onnxruntime', float('nan')):.2f}",
            f"{row['speedup']['median']:.2f}x",
        )
    Console().print(table)
    print(result.save(arguments.name, {"rows": rows}))


if __name__ == "__main__":
    main()
