"""One linear layer: ``pybsp.block_sparse_linear`` against the dense peers.

Row-major in and out, bias added, weights warm. Every block shape and sparsity of a
layer takes turns with torch, ONNX Runtime and OpenVINO, whose times depend on neither.
``speedup`` is over the fastest of them; ``of_peak`` as in ``benchmarks.kernel``.

    python -m benchmarks.block_sparse_linear [--tokens 1 16 128] [--sparsity 0.8]
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pybsp
from benchmarks import peers
from benchmarks.layers import Layer, check, family, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns

TOKENS = (1, 8, 16, 32, 48, 128, 512)
SPARSITIES = (0.5, 0.8, 0.9)


def measure(options: Options) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    dense: list[dict[str, Any]] = []
    tokens = options.tokens or ((1, 16, 128) if options.quick else TOKENS)
    for name, shape in options.shapes().items():
        cases = itertools.product(
            options.divisors(shape), options.sparsities or SPARSITIES
        )
        layers = [random_layer(name, shape, *case) for case in cases]
        for count in tokens:
            found, peers_found = compare(layers, count)
            rows += found
            dense.append(peers_found)
    return {"rows": rows, "dense": dense, "targets": targets(rows)}


def compare(
    layers: list[Layer], tokens: int, seconds: float = 0.4
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Layers of one shape in turns with the dense peers on the last of them.

    A row for each layer, and one for the peers.
    """
    x = random_tokens(tokens, layers[0].weight.shape[1])
    dense = peers.dense_float32(x, layers[-1])
    calls: dict[Any, Any] = dict(dense)
    for index, layer in enumerate(layers):
        calls[index] = _pybsp(x, layer)
    for name, call in calls.items():
        check(str(name), call(), x, layers[-1] if name in dense else layers[name])
    peak = pybsp.ops.fma_peak()
    rounds = take_turns(calls, seconds=seconds)
    best = min(dense, key=rounds.median)
    rows = []
    for index, layer in enumerate(layers):
        rate = layer.operations(tokens) / rounds.median(index)
        row = layer.describe(tokens, peak)
        rows.append(
            {
                **row,
                "times": {"pybsp": rounds.to_dict(index)},
                "best_dense": best,
                "best_dense_ms": round(rounds.median(best) * 1e3, 4),
                "speedup": round(rounds.ratio(best, index), 2),
                "of_peak": round(rate / peak / row["threads"], 3),
            }
        )
    described = {**layers[-1].describe(tokens, peak), "block_shape": None}
    times = {name: rounds.to_dict(name) for name in dense}
    return rows, {**described, "sparsity": None, "times": times}


def _pybsp(x: Any, layer: Layer) -> peers.Call:
    return lambda: pybsp.block_sparse_linear(x, layer.matrix, layer.bias)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def of(key: str, kind: str, sparsity: float, *tokens: int) -> list[float]:
        return [
            row[key]
            for row in rows
            if family(row["block_shape"]) == kind
            and row["sparsity"] == sparsity
            and row["M"] in tokens
        ]

    found = []
    for kind in ("(r, c)", "(1, n)"):
        large, what = (128, 512), f"block_sparse_linear, {kind} blocks, "
        found += reach(what + "M >= 96, 80 %, of FMA peak",
                       of("of_peak", kind, 0.8, *large), median=0.75)  # fmt: skip
        for sparsity, bound in ((0.8, 4.5), (0.9, 8.0)):
            case = f"M >= 96, {100 * sparsity:.0f} %, over the best dense peer"
            found += reach(what + case,
                           of("speedup", kind, sparsity, *large), median=bound,
                           form="{:.2f}x")  # fmt: skip
        for tokens in (16, 32):
            found += reach(what + f"M = {tokens}, 80 %, of FMA peak",
                           of("of_peak", kind, 0.8, tokens), median=0.6)  # fmt: skip
            found += reach(what + f"M = {tokens}, 50 %, over the best dense peer",
                           of("speedup", kind, 0.5, tokens), every=1.0,
                           form="{:.2f}x")  # fmt: skip
    return found


def summary(data: dict[str, Any]) -> Summary:
    """By block and sparsity: medians over the layers, one column for each M."""
    cells: dict[tuple[str, float], dict[int, list[dict[str, Any]]]] = {}
    for row in data["rows"]:
        key = (block_text(row["block_shape"]), row["sparsity"])
        cells.setdefault(key, {}).setdefault(row["M"], []).append(row)
    tokens = sorted({row["M"] for row in data["rows"]})
    head = ["block", "sparsity", *(f"M = {m}" for m in tokens)]
    return head, [
        [block, f"{sparsity:.0%}", *(_cell(by_tokens.get(m, [])) for m in tokens)]
        for (block, sparsity), by_tokens in cells.items()
    ]


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    speedup = statistics.median(row["speedup"] for row in rows)
    of_peak = statistics.median(row["of_peak"] for row in rows)
    return f"{speedup:.1f}x ({of_peak:.0%})"


SECTION = Section("block_sparse_linear", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
