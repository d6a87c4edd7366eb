"""One to eight tokens: how near the time is to that of reading the packed weights.

``of_bandwidth`` is the bytes of values and indices over the time, as a fraction of the
bandwidth at which this core reads as many bytes, measured right before. Row-major in
and out, bias, weights as warm as their size allows.

    python -m benchmarks.few_tokens [--quick]
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pybsp
from benchmarks.layers import Layer, check, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns

TOKENS = (1, 2, 4, 8)
SPARSITIES = (0.5, 0.8, 0.9)
#: By name, the bytes under which they end.
SIZES = {
    "under 256 KB": 1 << 18,
    "256 KB to 1 MB": 1 << 20,
    "1 MB to 4 MB": 1 << 22,
    "4 MB and more": 1 << 62,
}


def measure(options: Options) -> dict[str, Any]:
    ops: Any = pybsp.ops
    if not hasattr(ops, "read_bandwidth"):
        return {"missing": "pybsp.ops.read_bandwidth", "rows": [], "targets": []}
    rows = []
    for name, shape in options.shapes().items():
        for block, sparsity in itertools.product(
            options.divisors(shape), options.sparsities or SPARSITIES
        ):
            layer = random_layer(name, shape, block, sparsity)
            peak = ops.fma_peak()
            bandwidth = ops.read_bandwidth(layer.matrix.nbytes)
            rows += [
                _one(layer, tokens, peak, bandwidth)
                for tokens in options.tokens or TOKENS
            ]
    return {"rows": rows, "targets": targets(rows)}


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the smallest weights the call itself takes the time; they have no target."""
    found = []
    for name in list(SIZES)[1:]:
        values = [
            row["of_bandwidth"]
            for row in rows
            if row["M"] == 1 and size_name(row["bytes"]) == name
        ]
        what = f"M = 1, packed weights of {name}, of the read bandwidth"
        found += reach(what, values, median=0.8)
    return found


def size_name(size: int) -> str:
    return next(name for name, limit in SIZES.items() if size < limit)


def _one(layer: Layer, tokens: int, peak: float, bandwidth: float) -> dict[str, Any]:
    x = random_tokens(tokens, layer.weight.shape[1])

    def call() -> Any:
        return pybsp.block_sparse_linear(x, layer.matrix, layer.bias)

    check("block_sparse_linear", call(), x, layer)
    size = layer.matrix.nbytes
    rounds = take_turns({"pybsp": call}, seconds=0.03)
    return {
        **layer.describe(tokens, peak),
        "times": {"pybsp": rounds.to_dict("pybsp")},
        "bytes": size,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "of_bandwidth": round(size / rounds.median("pybsp") / bandwidth, 3),
    }


def summary(data: dict[str, Any]) -> Summary:
    """By block and bytes: the median share of the bandwidth for each M."""
    cells: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in data["rows"]:
        key = (block_text(row["block_shape"]), size_name(row["bytes"]))
        by_tokens = cells.setdefault(key, {})
        by_tokens.setdefault(row["M"], []).append(row["of_bandwidth"])
    tokens = sorted({row["M"] for row in data["rows"]})
    blocks = list(dict.fromkeys(block for block, _ in cells))
    return ["block", "packed weights", *(f"M = {m}" for m in tokens)], [
        [block, size, *(f"{statistics.median(cells[block, size][m]):.2f}"
                        for m in tokens)]
        for block, size in itertools.product(blocks, SIZES)
        if (block, size) in cells
    ]  # fmt: skip


SECTION = Section("few_tokens", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
