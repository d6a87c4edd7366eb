"""Two threads against one, beside what two threads of pure multiply-adds gain.

The second core may be busy with something else. In the same rounds, multiply-adds on
registers run alone and then on two threads at once; ``free`` is twice the time alone
over the time until both have ended: what a loop split in halves could have gained.
``torch`` is what the dense layer gains in torch. 80 %, row-major.

    python -m benchmarks.threads [--quick]
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.nn.functional as F

import pybsp
from benchmarks.layers import Layer, check, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from pybsp.cli import environment
from pybsp.cli.timing import torch_threads

LAYERS = ("bert_base_attention", "bert_base_ffn_up", "bert_base_ffn_down",
          "minilm_ffn_down")  # fmt: skip
BLOCKS = ((8, 1), (16, 4), (1, 96))
TOKENS = (128, 512)
ROUNDS = 15
#: The second core counts as free from this gain of pure multiply-adds on.
FREE = 1.9


def measure(options: Options) -> dict[str, Any]:
    if environment.available_cores() < 2:
        return {"missing": "a second core", "rows": [], "targets": []}
    rows = []
    for name, shape in options.shapes(LAYERS).items():
        for block, sparsity in itertools.product(
            options.divisors(shape, BLOCKS), options.sparsities or (0.8,)
        ):
            layer = random_layer(name, shape, block, sparsity)
            rows += [_scaling(layer, tokens) for tokens in options.tokens or TOKENS]
    what = "two threads over one, M >= 128, "
    return {
        "rows": rows,
        "targets": reach(what + "second core free", [
            row["speedup"] for row in rows if row["free"] >= FREE
        ], median=1.85, form="{:.2f}x")
        + reach(what + "of what the machine had to give",
                [row["speedup"] / min(row["free"], 2.0) for row in rows], median=0.925),
    }  # fmt: skip


def _scaling(layer: Layer, tokens: int) -> dict[str, Any]:
    x = random_tokens(tokens, layer.weight.shape[1])
    calls: dict[str, Callable[[], Any]] = {
        "pybsp": lambda: pybsp.block_sparse_linear(x, layer.matrix, layer.bias),
        "torch": lambda: F.linear(x, layer.weight, layer.bias),
    }
    for count in (1, 2):
        with torch_threads(count):
            for name, call in calls.items():
                check(name, call(), x, layer)
    alone: list[float] = []
    gains: dict[str, list[float]] = {name: [] for name in calls}
    free: list[float] = []
    peaks: list[float] = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            for name, call in calls.items():
                with torch_threads(1):
                    one = _seconds(call)
                with torch_threads(2):
                    gains[name].append(one / _seconds(call))
                if name == "pybsp":
                    alone.append(one)
            started = time.perf_counter()
            peaks.append(pybsp.ops.fma_peak())
            middle = time.perf_counter()
            list(pool.map(lambda _: pybsp.ops.fma_peak(), range(2)))
            free.append(2 * (middle - started) / (time.perf_counter() - middle))
    return {
        **layer.describe(tokens, statistics.median(peaks)),
        "threads": 2,
        "times": {"one_thread": {"median_ms": round(statistics.median(alone) * 1e3, 4),
                                 "best_ms": round(min(alone) * 1e3, 4),
                                 "rounds": ROUNDS}},
        "speedup": round(statistics.median(gains["pybsp"]), 3),
        "best_speedup": round(max(gains["pybsp"]), 3),
        "torch": round(statistics.median(gains["torch"]), 3),
        "free": round(statistics.median(free), 3),
    }  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    """The median of some calls after two untimed ones, which wake the threads."""
    call(), call()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def summary(data: dict[str, Any]) -> Summary:
    head = ("layer", "block", "M", "one thread ms", "two threads", "torch",
            "pure multiply-adds")  # fmt: skip
    return head, [
        [
            f"{row['layer']} {row['N']}x{row['K']}",
            block_text(row["block_shape"]),
            str(row["M"]),
            f"{row['times']['one_thread']['median_ms']:.3f}",
            f"{row['speedup']:.2f}x",
            f"{row['torch']:.2f}x",
            f"{row['free']:.2f}x",
        ]
        for row in data["rows"]
    ]


SECTION = Section("threads", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
