"""Query, key and value in one call, which transposes their common input once.

Against three calls of ``block_sparse_linear``, and against the best dense peer on the
three weights stacked into one. Row-major in and out, bias, 80 %.

    python -m benchmarks.block_sparse_linears [--quick]
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

import pybsp
from benchmarks import peers
from benchmarks.layers import Layer, check, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main
from benchmarks.turns import take_turns

LAYERS = ("minilm_attention", "bert_base_attention", "bert_large_attention")
BLOCKS = ((8, 1), (16, 4), (32, 32), (1, 64))
TOKENS = (16, 128, 512)


def measure(options: Options) -> dict[str, Any]:
    if not hasattr(pybsp.ops, "block_sparse_linears"):
        return {"missing": "pybsp.ops.block_sparse_linears", "rows": [], "targets": []}
    rows = []
    for name, (outputs, inputs) in options.shapes(LAYERS).items():
        for block, sparsity in itertools.product(
            options.divisors((outputs, inputs), BLOCKS), options.sparsities or (0.8,)
        ):
            stacked = random_layer(name, (3 * outputs, inputs), block, sparsity)
            rows += [_three(stacked, tokens) for tokens in options.tokens or TOKENS]
    return {"rows": rows, "targets": []}


def _three(stacked: Layer, tokens: int) -> dict[str, Any]:
    ops: Any = pybsp.ops
    x = random_tokens(tokens, stacked.weight.shape[1])
    block = stacked.matrix.block_shape
    matrices = [
        pybsp.BlockSparseMatrix.from_dense(part, block)
        for part in stacked.weight.chunk(3)
    ]
    biases = list(stacked.bias.chunk(3))
    dense = peers.dense_float32(x, stacked)

    def together() -> Any:
        return ops.block_sparse_linears(x, matrices, biases=biases)

    def one_by_one() -> Any:
        pairs = zip(matrices, biases, strict=True)
        return [pybsp.block_sparse_linear(x, W, bias) for W, bias in pairs]

    for name, call in (("together", together), ("one by one", one_by_one)):
        check(name, torch.cat(list(call()), 1), x, stacked)
    for name, call in dense.items():
        check(name, call(), x, stacked)
    peak = ops.fma_peak()
    calls = {"pybsp": together, "one by one": one_by_one, **dense}
    rounds = take_turns(calls, seconds=0.3)
    best = min(dense, key=rounds.median)
    row = stacked.describe(tokens, peak)
    rate = stacked.operations(tokens) / rounds.median("pybsp")
    return {
        **row,
        "times": {name: rounds.to_dict(name) for name in calls},
        "best_dense": best,
        "speedup": round(rounds.ratio(best, "pybsp"), 2),
        "over_one_by_one": round(rounds.ratio("one by one", "pybsp"), 3),
        "of_peak": round(rate / peak / row["threads"], 3),
    }


def summary(data: dict[str, Any]) -> Summary:
    head = ("layer", "block", "M", "ms", "faster than three calls",
            "than the best dense peer", "of FMA peak")  # fmt: skip
    return head, [
        [
            f"{row['layer']} {row['N']}x{row['K']}",
            block_text(row["block_shape"]),
            str(row["M"]),
            f"{row['times']['pybsp']['median_ms']:.3f}",
            f"{row['over_one_by_one']:.2f}x",
            f"{row['speedup']:.1f}x",
            f"{row['of_peak']:.0%}",
        ]
        for row in data["rows"]
    ]


SECTION = Section("block_sparse_linears", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
