"""The cost model against measured times of layers that it was not fitted to.

Fits a new model, then measures layers with warm weights, as the model defines a time:
the best call of several in a row, in sweeps. First those on a grid of BERT, MiniLM and
odd sizes, which was looked at while the terms of the model were chosen; then fresh ones
of other sizes, blocks, densities and tokens, drawn anew. Last, how much longer a call
takes between other layers than in a row of calls.

    python -m benchmarks.cost_model [--calls 1200] [--fresh 800] [--threads 1]
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pybsp
from benchmarks import result
from pybsp.cli.timing import torch_threads
from pybsp.costs import Call, CostModel
from pybsp.costs.measurement import Layers, best_times, measure

SHAPES = [
    (768, 768), (3072, 768), (768, 3072),
    (384, 384), (1536, 384), (384, 1536),
    (1024, 1024), (4096, 1024), (1024, 4096),
    (312, 312), (1200, 312), (312, 1200),
    (1152, 1728), (1728, 1152),
]  # fmt: skip
#: -8 stands for in/8.
BLOCKS = [
    (8, 1), (16, 1), (4, 1), (16, 4), (4, 4), (32, 32), (1, 96), (1, 64), (1, -8),
]  # fmt: skip
TOKENS = [
    1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 24, 31, 32, 37, 40, 47, 48, 50, 64,
    77, 80, 96, 100, 128, 144, 150, 197, 256, 300, 384, 512,
]  # fmt: skip
DENSITIES = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0]
FRESH_SHAPES = [
    (256, 1024), (1024, 256), (768, 2304), (2304, 768), (640, 1920), (1920, 640),
    (448, 1792), (1792, 448), (960, 960), (1536, 1536), (640, 2560), (2560, 640),
    (512, 512), (1280, 5120),
]  # fmt: skip
FRESH_BLOCKS = [
    (8, 1), (16, 1), (4, 1), (32, 1), (16, 4), (8, 8), (4, 4), (16, 16), (1, 32),
    (1, 128), (1, -8), (1, -4),
]  # fmt: skip
#: Bytes of the weights of other layers.
OTHERS = 75_000_000
#: Calls measured a second time.
AGAIN = 320
#: Calls measured together; all their weights are in memory at once.
GROUP = 32


def draw(calls: int, seed: int) -> list[Call]:
    """Random block-sparse calls from the grid of the lists above."""
    generator = random.Random(seed)
    found: list[Call] = []
    while len(found) < calls:
        shape, tokens = generator.choice(SHAPES), generator.choice(TOKENS)
        rows, cols = generator.choice(BLOCKS)
        block_shape = (rows, cols if cols > 0 else shape[1] // -cols)
        density = generator.choice(DENSITIES)
        if shape[0] % block_shape[0] == shape[1] % block_shape[1] == 0:
            found.append(Call.sparse(tokens, shape, block_shape, density))
    return found


def draw_fresh(calls: int, seed: int) -> list[Call]:
    """Any number of tokens to 512 and any density from 0.02, evenly by logarithm."""
    generator = random.Random(seed)
    found: list[Call] = []
    while len(found) < calls:
        shape = generator.choice(FRESH_SHAPES)
        rows, cols = generator.choice(FRESH_BLOCKS)
        block_shape = (rows, cols if cols > 0 else shape[1] // -cols)
        tokens, density = round(512 ** generator.random()), 0.02 ** generator.random()
        if shape[0] % block_shape[0] == shape[1] % block_shape[1] == 0:
            found.append(Call.sparse(tokens, shape, block_shape, density))
    return found


def compare(model: CostModel, drawn: list[Call]) -> list[dict[str, Any]]:
    """Sparse layers and their dense twins, predicted and measured."""
    rows = []
    for first in range(0, len(drawn), GROUP):
        group = drawn[first : first + GROUP]
        dense = [Call(call.tokens, call.shape) for call in group]
        times = measure([*group, *dense], 3, float("inf"), repeats=6)
        for index, call in enumerate(group):
            density = call.weights / (call.shape[0] * call.shape[1])
            cost = model.predict(call.tokens, call.shape, call.block_shape, density)
            rows.append(
                {
                    "tokens": call.tokens,
                    "shape": list(call.shape),
                    "block_shape": list(call.block_shape),
                    "density": round(density, 4),
                    "sparse_us": round(times[index], 2),
                    "predicted_sparse_us": round(cost.sparse_us, 2),
                    "dense_us": round(times[len(group) + index], 2),
                    "predicted_dense_us": round(cost.dense_us, 2),
                }
            )
    return rows


def between_others() -> list[dict[str, Any]]:
    """Best times in a row of calls, and medians of calls after a read of OTHERS.

    ``(8, 1)`` blocks at density 0.2, and dense.
    """
    others = torch.randn(OTHERS // 4)
    rows: list[dict[str, Any]] = []
    for shape, tokens in itertools.product([(768, 768), (3072, 768)], [1, 4, 16, 128]):
        layers = Layers()
        kinds = {
            "sparse": Call.sparse(tokens, shape, (8, 1), 0.2),
            "dense": Call(tokens, shape),
        }
        row: dict[str, Any] = {"tokens": tokens, "shape": list(shape)}
        with torch.inference_mode():
            calls = {kind: layers.runnable(call) for kind, call in kinds.items()}
            for kind, call in calls.items():
                row[f"{kind}_us"] = round(best_times([call], sweeps=5)[0], 1)
                after = []
                for _ in range(25):
                    others.sum()
                    after += best_times([call], sweeps=1, repeats=1)
                row[f"{kind}_after_others_us"] = round(float(np.median(after)), 1)
        rows.append(row)
    return rows


def measure_all(calls: int = 1200, fresh: int = 800, seed: int = 0) -> dict[str, Any]:
    """Fit, then the errors for both kinds of layers."""
    peaks = [pybsp.ops.fma_peak()]
    started = time.perf_counter()
    model = CostModel.fit()
    fit_seconds = time.perf_counter() - started
    rows = compare(model, draw(calls, seed))
    peaks.append(pybsp.ops.fma_peak())
    fresh_rows = compare(model, draw_fresh(fresh, seed + 2))
    peaks.append(pybsp.ops.fma_peak())
    # How far the same measurement agrees with itself after all others.
    again = compare(model, draw(min(calls, AGAIN), seed))
    same = [
        new["sparse_us"] / old["sparse_us"]
        for new, old in zip(again, rows, strict=False)
    ]
    return {
        "threads": torch.get_num_threads(),
        "fit_seconds": round(fit_seconds, 2),
        "model_error": round(model.error, 4),
        "peak_gflops": [round(min(peaks) / 1e9, 1), round(max(peaks) / 1e9, 1)],
        "errors": [*errors(rows), summary("sparse, measured again", same)],
        "fresh_errors": errors(fresh_rows),
        "between_others": between_others(),
        "rows": rows,
        "fresh_rows": fresh_rows,
    }


def family(row: dict[str, Any]) -> str:
    rows, cols = row["block_shape"]
    if rows == 1 and row["shape"][1] in (8 * cols, 4 * cols):
        return f"(1, in/{row['shape'][1] // cols})"
    return f"({rows}, {cols})"


def regime(row: dict[str, Any]) -> str:
    tokens = row["tokens"]
    for last, name in ((1, "1"), (15, "2-15"), (47, "16-47"), (127, "48-127")):
        if tokens <= last:
            return f"{name} tokens"
    return "128-512 tokens"


def errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Relative errors of all, of each kind of block and of each range of tokens."""
    gains = [
        (row["predicted_dense_us"] / row["predicted_sparse_us"])
        / (row["dense_us"] / row["sparse_us"])
        for row in rows
    ]
    sparse = [row["predicted_sparse_us"] / row["sparse_us"] for row in rows]
    dense = [row["predicted_dense_us"] / row["dense_us"] for row in rows]
    table = [
        summary("sparse", sparse), summary("dense", dense), summary("gain", gains),
    ]  # fmt: skip
    for kind in (family, regime):
        table += by(kind, "sparse", rows, sparse)
    return [*table, *by(regime, "dense", rows, dense)]


def by(
    kind: Callable[[dict[str, Any]], str],
    what: str,
    rows: list[dict[str, Any]],
    ratios: list[float],
) -> Iterable[dict[str, Any]]:
    names = [kind(row) for row in rows]
    for name in sorted(set(names), key=lambda name: (len(name), name)):
        chosen = [r for r, n in zip(ratios, names, strict=True) if n == name]
        yield summary(f"{what}, {name}", chosen)


def summary(name: str, ratios: list[float]) -> dict[str, Any]:
    wrong = np.abs(np.asarray(ratios) - 1)
    return {
        "what": name,
        "calls": len(ratios),
        "median": round(float(np.median(wrong)), 4),
        "p90": round(float(np.quantile(wrong, 0.9)), 4),
        "worst": round(float(wrong.max()), 4),
        "within_15_percent": round(float((wrong <= 0.15).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1200)
    parser.add_argument("--fresh", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with torch_threads(arguments.threads):
        data = measure_all(arguments.calls, arguments.fresh, arguments.seed)
    for name in ("errors", "fresh_errors"):
        print_errors(name.replace("_", " "), data[name])
    for row in data["between_others"]:
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
    low, high = data["peak_gflops"]
    print(f"fitted in {data['fit_seconds']} s; FMA peak {low}-{high} GFLOP/s meanwhile")
    for name in ("rows", "fresh_rows"):
        data.pop(name)
    print(result.save("cost_model", data))


def print_errors(title: str, summaries: list[dict[str, Any]]) -> None:
    heads = ("predicted time of", "calls", "median", "p90", "worst", "within 15 %")
    table = Table(*heads, title=title)
    for row in summaries:
        table.add_row(
            row["what"],
            str(row["calls"]),
            *(f"{row[key]:.1%}" for key in ("median", "p90", "worst")),
            f"{row['within_15_percent']:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
