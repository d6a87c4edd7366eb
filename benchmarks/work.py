"""Time against work: a straight line through sparsities from 0 % to 98 %.

``intercept_of_dense`` is the line's time at no nonzeros, as a share of dense time: the
shorter of torch's and pybsp's own at 0 % sparsity. Row-major in and out, bias.

    python -m benchmarks.work [--quick]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F

import pybsp
from benchmarks.layers import Layer, check, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns

LAYERS = ("bert_base_attention", "bert_base_ffn_up", "minilm_ffn_down")
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
BLOCKS = ((8, 1), (16, 4), (32, 32), (1, 96))
TOKENS = (128,)


def measure(options: Options) -> dict[str, Any]:
    rows = []
    for name, shape in options.shapes(LAYERS).items():
        for block in options.divisors(shape, BLOCKS):
            layers = [
                random_layer(name, shape, block, sparsity)
                for sparsity in options.sparsities or SPARSITIES
            ]
            rows += [_line(layers, tokens) for tokens in options.tokens or TOKENS]
    what = "time against nonzeros, M = 128, sparsity 0 to 0.98: "
    return {
        "rows": rows,
        "targets": reach(what + "R^2 of the line", [r["r_squared"] for r in rows],
                         every=0.99, form="{:.4f}")
        + reach(what + "intercept, of dense time",
                [r["intercept_of_dense"] for r in rows], median=0.03, at_most=True,
                form="{:.1%}"),
    }  # fmt: skip


def _line(layers: list[Layer], tokens: int) -> dict[str, Any]:
    x = random_tokens(tokens, layers[0].weight.shape[1])
    calls: dict[Any, Any] = {
        index: _call(x, layer) for index, layer in enumerate(layers)
    }
    for index, layer in enumerate(layers):
        check("block_sparse_linear", calls[index](), x, layer)
    calls["torch"] = lambda: F.linear(x, layers[0].weight, layers[0].bias)
    peak = pybsp.ops.fma_peak()
    rounds = take_turns(calls, seconds=0.8, min_rounds=9)
    work = np.array([layer.matrix.values.numel() for layer in layers], dtype=float)
    times = np.array([rounds.median(index) for index in range(len(layers))])
    slope, intercept = np.polyfit(work, times, 1)
    residual = np.square(times - (slope * work + intercept)).sum()
    row = layers[0].describe(tokens, peak)
    del row["sparsity"]
    return {
        **row,
        "milliseconds": {
            f"{layer.sparsity:.2f}": round(time * 1e3, 4)
            for layer, time in zip(layers, times, strict=True)
        },
        "times": {"torch": rounds.to_dict("torch")},
        "r_squared": round(1 - residual / np.square(times - times.mean()).sum(), 5),
        "intercept_of_dense": round(
            float(intercept) / min(rounds.median("torch"), float(times.max())), 4
        ),
    }


def _call(x: Any, layer: Layer) -> Any:
    return lambda: pybsp.block_sparse_linear(x, layer.matrix, layer.bias)


def summary(data: dict[str, Any]) -> Summary:
    return ("layer", "block", "M", "R^2", "intercept, of dense time"), [
        [
            f"{row['layer']} {row['N']}x{row['K']}",
            block_text(row["block_shape"]),
            str(row["M"]),
            f"{row['r_squared']:.4f}",
            f"{row['intercept_of_dense']:.1%}",
        ]
        for row in data["rows"]
    ]


SECTION = Section("work", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
