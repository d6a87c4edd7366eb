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


def measure(options: Options) -> dict[str, Any]:
    if not hasattr(pybsp.ops, "read_bandwidth"):
        return {"missing": "pybsp.ops.read_bandwidth", "rows": [], "targets": []}
    rows = []
    for name, shape in options.shapes().items():
        for block, sparsity in itertools.product(
            options.divisors(shape), options.sparsities or SPARSITIES
        ):
            layer = random_layer(name, shape, block, sparsity)
            peak = pybsp.ops.fma_peak()
            rows += [_one(layer, tokens, peak) for tokens in options.tokens or TOKENS]
    # Under a quarter of a megabyte the call itself is what takes the time.
    one = [r["of_bandwidth"] for r in rows if r["M"] == 1 and r["bytes"] >= 1 << 18]
    what = "M = 1, packed weights of 256 KB and more, of the read bandwidth"
    return {"rows": rows, "targets": reach(what, one, median=0.8)}


def _one(layer: Layer, tokens: int, peak: float) -> dict[str, Any]:
    x = random_tokens(tokens, layer.weight.shape[1])

    def call() -> Any:
        return pybsp.block_sparse_linear(x, layer.matrix, layer.bias)

    check("block_sparse_linear", call(), x, layer)
    size = layer.matrix.nbytes
    bandwidth = pybsp.ops.read_bandwidth(size)  # type: ignore[attr-defined]
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
        limits = {"under 256 KB": 1 << 18, "to 1 MB": 1 << 20, "to 4 MB": 1 << 22}
        size = next((n for n, b in limits.items() if row["bytes"] < b), "above")
        by_tokens = cells.setdefault((block_text(row["block_shape"]), size), {})
        by_tokens.setdefault(row["M"], []).append(row["of_bandwidth"])
    tokens = sorted({row["M"] for row in data["rows"]})
    return ["block", "packed weights", *(f"M = {m}" for m in tokens)], [
        [*key, *(f"{statistics.median(found[m]):.2f}" for m in tokens)]
        for key, found in sorted(cells.items())
    ]


SECTION = Section("few_tokens", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
