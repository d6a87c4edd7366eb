"""Every number of tokens from 1 to 160: does the time jump anywhere?

``over_line`` is the time at M over the straight line between the multiples of 48 around
it (48 tokens are a full tile with AVX-512, two with AVX2, four with NEON). Row-major in
and out, bias, 80 %.

    python -m benchmarks.tokens [--quick]
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import pybsp
from benchmarks.layers import Layer, check, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns

LAYERS = ("bert_base_attention", "bert_base_ffn_up")
BLOCKS = ((8, 1), (16, 4), (1, 96))
TILE = 48
MOST = 160
#: A line needs both ends; the last of them lies above ``MOST``.
ENDS = (48, 96, 144, 192)


def measure(options: Options) -> dict[str, Any]:
    step = 4 if options.quick else 1
    tokens = sorted(
        {*(options.tokens or range(1, MOST + 1, step)), *(end + 1 for end in ENDS[:3])}
        | set(ENDS)
    )
    rows = []
    for name, shape in options.shapes(LAYERS).items():
        for block, sparsity in itertools.product(
            options.divisors(shape, BLOCKS), options.sparsities or (0.8,)
        ):
            rows.append(_curve(random_layer(name, shape, block, sparsity), tokens))
    worst = [max(row["over_line"].values()) for row in rows]
    at_49 = [row["over_line"]["49"] for row in rows]
    return {
        "rows": rows,
        "targets": reach("M = 49 over the line between 48 and 96", at_49, every=0.15,
                         at_most=True, form="{:.0%}")
        + reach(f"the worst M from 49 to {MOST} over its line", worst, every=0.15,
                at_most=True, form="{:.0%}"),
    }  # fmt: skip


def _curve(layer: Layer, tokens: list[int]) -> dict[str, Any]:
    x = random_tokens(max(tokens), layer.weight.shape[1])
    calls: dict[Any, Any] = {count: _call(x[:count], layer) for count in tokens}
    for count, call in calls.items():
        check("block_sparse_linear", call(), x[:count], layer)
    peak = pybsp.ops.fma_peak()
    rounds = take_turns(calls, seconds=4.0, min_rounds=9)
    times = {count: rounds.median(count) * 1e3 for count in tokens}
    row = layer.describe(0, peak)
    del row["M"]
    return {
        **row,
        "milliseconds": {str(count): round(time, 4) for count, time in times.items()},
        "over_line": {
            str(count): round(times[count] / _line(times, count) - 1, 3)
            for count in tokens
            if TILE < count <= MOST and count not in ENDS
        },
    }


def _call(x: Any, layer: Layer) -> Any:
    return lambda: pybsp.block_sparse_linear(x, layer.matrix, layer.bias)


def _line(times: dict[int, float], count: int) -> float:
    return float(np.interp(count, ENDS, [times[end] for end in ENDS]))


def summary(data: dict[str, Any]) -> Summary:
    named = ("1", "8", "9", "16", "17", "32", "48", "49", "96", "97", "144", "145")
    shown = [m for m in named if m in data["rows"][0]["milliseconds"]]
    rows = []
    for row in data["rows"]:
        worst = max(row["over_line"], key=row["over_line"].__getitem__)
        rows.append(
            [
                f"{row['layer']} {row['N']}x{row['K']}",
                block_text(row["block_shape"]),
                *(f"{row['milliseconds'][m]:.3f}" for m in shown),
                f"{row['over_line'][worst]:+.0%} at M = {worst}",
            ]
        )
    return ["ms", "block", *(f"M = {m}" for m in shown), "worst over the line"], rows


SECTION = Section("tokens", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
