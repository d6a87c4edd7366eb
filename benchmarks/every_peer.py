"""One layer against everything else that computes it here, sparse, dense and 8 bits.

``speedup`` is how many times faster pybsp is in float32 than each, and than itself in 8
bits. The 8-bit ones compute other numbers and are anchors; the "static" peers, torch's
sparse kernel for ``(1, 4)`` blocks among them, get their input quantised and leave
their output so.

    python -m benchmarks.every_peer [--deepsparse PYTHON] [--quick]
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch

import pybsp
from benchmarks import deepsparse, peers
from benchmarks.layers import Layer, check, check_int8, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main
from benchmarks.turns import take_turns

LAYERS = ("bert_base_ffn_up", "minilm_ffn_down")
BLOCKS = ((8, 1), (16, 4), (32, 32), (1, 96), (1, 4))
TOKENS = (1, 16, 128)
SPARSITIES = (0.8, 0.9)
#: pybsp itself, the same layer quantised.
INT8 = "pybsp int8"


def measure(options: Options) -> dict[str, Any]:
    shapes = options.shapes(LAYERS[:1] if options.quick else LAYERS)
    sparsities = options.sparsities or (SPARSITIES[:1] if options.quick else SPARSITIES)
    rows = []
    for name, shape in shapes.items():
        for block, sparsity in itertools.product(
            options.divisors(shape, BLOCKS), sparsities
        ):
            layer = random_layer(name, shape, block, sparsity)
            rows += [
                compare(layer, tokens, options.deepsparse)
                for tokens in options.tokens or TOKENS
            ]
    return {"rows": rows, "targets": []}


def compare(layer: Layer, tokens: int, python: str | None) -> dict[str, Any]:
    x = random_tokens(tokens, layer.weight.shape[1])
    exact: dict[str, Any] = {
        "pybsp": lambda: pybsp.block_sparse_linear(x, layer.matrix, layer.bias),
        **peers.dense_float32(x, layer),
        **peers.sparse(x, layer),
    }
    int8 = layer.matrix.quantize("int8")
    rounded = {
        INT8: lambda: pybsp.block_sparse_linear(x, int8, layer.bias),
        **peers.dense_int8(x, layer),
        **peers.sparse_int8(x, layer),
    }
    for name, call in exact.items():
        check(name, call(), x, layer)
    for name, call in rounded.items():
        y = call()
        plain = y.dequantize() if isinstance(y, torch.Tensor) else y
        check_int8(name, plain, x, layer)
    peak = pybsp.ops.fma_peak()
    with contextlib.ExitStack() as stack:
        calls = {**exact, **rounded}
        if python:
            server = stack.enter_context(deepsparse.serve(python, x, layer))
            check("DeepSparse", server.output, x, layer)
            calls["DeepSparse"] = server
        rounds = take_turns(calls, seconds=0.5)
    return {
        **layer.describe(tokens, peak),
        "times": {name: rounds.to_dict(name) for name in calls},
        "speedup": {
            name: round(rounds.ratio(name, "pybsp"), 2)
            for name in calls
            if name != "pybsp"
        },
    }


def summary(data: dict[str, Any]) -> Summary:
    """How many times faster than each peer."""
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["speedup"]))
    head = ["layer", "block", "sparsity", "M", "pybsp ms", *names]
    return head, [
        [
            f"{row['N']}x{row['K']}",
            block_text(row["block_shape"]),
            f"{row['sparsity']:.0%}",
            str(row["M"]),
            f"{row['times']['pybsp']['median_ms']:.3f}",
            *(
                f"{row['speedup'][name]:.2f}x" if name in row["speedup"] else ""
                for name in names
            ),
        ]
        for row in data["rows"]
    ]


SECTION = Section("every_peer", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
