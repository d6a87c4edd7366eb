"""One linear layer of 8-bit weights and inputs against 8-bit and float32 peers.

``pybsp.block_sparse_linear`` on int8 matrices, row-major float32 in and out, inputs
quantised token by token within the call, bias added, weights warm; all blocks and
sparsities of a layer in turns with the peers of ``benchmarks.every_peer``. ``of_peak``
is ``2 M nnz / time`` over the peak of 8-bit products of vectors taken just before,
which AMX exceeds.

    python -m benchmarks.int8_linear [--quick] [--layers ...] [--blocks 8,1 ...]
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch

import pybsp
from benchmarks import peers
from benchmarks.layers import Layer, check, check_int8, random_layer, random_tokens
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns

LAYERS = (
    "minilm_ffn_up",
    "bert_base_attention",
    "bert_base_ffn_up",
    "bert_base_ffn_down",
)
TOKENS = (16, 128)
SPARSITIES = (0.8, 0.9)
STATIC = "torch int8 static"


def measure(options: Options) -> dict[str, Any]:
    rows = []
    tokens = options.tokens or TOKENS
    for name, shape in options.shapes(LAYERS).items():
        cases = itertools.product(
            options.divisors(shape), options.sparsities or SPARSITIES
        )
        layers = [random_layer(name, shape, *case) for case in cases]
        for count in tokens:
            rows += compare(layers, count)
    return {"rows": rows, "targets": targets(rows)}


def compare(layers: list[Layer], tokens: int) -> list[dict[str, Any]]:
    x = random_tokens(tokens, layers[0].weight.shape[1])
    float_calls = peers.dense_float32(x, layers[-1])
    int8_calls = peers.dense_int8(x, layers[-1])
    calls: dict[Any, Any] = {**float_calls, **int8_calls}
    for name, call in calls.items():
        y = call()
        plain = y.dequantize() if isinstance(y, torch.Tensor) and y.is_quantized else y
        (check if name in float_calls else check_int8)(name, plain, x, layers[-1])
    for index, layer in enumerate(layers):
        int8 = layer.matrix.quantize("int8")
        calls[index, "int8"] = product(x, int8, layer.bias)
        calls[index, "float32"] = product(x, layer.matrix, layer.bias)
        check_int8("pybsp", calls[index, "int8"](), x, layer)
        check("pybsp float32", calls[index, "float32"](), x, layer)
    peak, threads = pybsp.ops.dot_peak(), torch.get_num_threads()
    rounds = take_turns(calls, seconds=0.6)
    # The static peer is given its input quantised and leaves its output so.
    best_int8 = min((name for name in int8_calls if name != STATIC), key=rounds.median)
    best_float = min(float_calls, key=rounds.median)
    return [
        {
            **layer.describe(tokens, peak),
            "dtype": "int8",
            "times": {
                name: rounds.to_dict(key)
                for name, key in (
                    ("pybsp", (index, "int8")),
                    ("pybsp float32", (index, "float32")),
                    *((name, name) for name in (*float_calls, *int8_calls)),
                )
            },
            "best_dense_int8": best_int8,
            "best_dense": best_float,
            "over_dense_int8": round(rounds.ratio(best_int8, (index, "int8")), 2),
            "over_dense": round(rounds.ratio(best_float, (index, "int8")), 2),
            "over_float32": round(
                rounds.ratio((index, "float32"), (index, "int8")), 2
            ),
            "of_peak": round(
                layer.operations(tokens) / rounds.median((index, "int8"))
                / peak / threads, 3,
            ),
        }
        for index, layer in enumerate(layers)
    ]  # fmt: skip


def product(x: torch.Tensor, matrix: Any, bias: torch.Tensor) -> peers.Call:
    return lambda: pybsp.block_sparse_linear(x, matrix, bias)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def of(key: str, sparsity: float) -> list[float]:
        return [
            row[key]
            for row in rows
            if row["block_shape"][1] % 4 == 0
            and row["sparsity"] == sparsity
            and row["M"] >= 96
        ]

    what = "int8 block_sparse_linear, in-extent 4 and more, M = 128, "
    return [
        *reach(f"{what}80 %, of the peak of 8-bit products of vectors",
               of("of_peak", 0.8), median=0.75),
        *reach(f"{what}80 %, over the best dense int8 peer",
               of("over_dense_int8", 0.8), median=2.0, form="{:.2f}x"),
        *reach(f"{what}90 %, over the best dense int8 peer",
               of("over_dense_int8", 0.9), median=3.5, form="{:.2f}x"),
    ]  # fmt: skip


def summary(data: dict[str, Any]) -> Summary:
    """By block and sparsity: medians over the layers."""
    cells: dict[tuple[str, float], dict[int, list[dict[str, Any]]]] = {}
    for row in data["rows"]:
        key = (block_text(row["block_shape"]), row["sparsity"])
        cells.setdefault(key, {}).setdefault(row["M"], []).append(row)
    tokens = sorted({row["M"] for row in data["rows"]})
    figures = (
        ("over dense int8", "over_dense_int8", "{:.1f}x"),
        ("over dense float32", "over_dense", "{:.1f}x"),
        ("over float32", "over_float32", "{:.1f}x"),
        ("of peak", "of_peak", "{:.0%}"),
    )
    head = [
        "block", "sparsity",
        *(f"M = {count}: {what}" for count in tokens for what, _, _ in figures),
    ]  # fmt: skip
    return head, [
        [
            block,
            f"{sparsity:.0%}",
            *(
                form.format(statistics.median(row[key] for row in by_tokens[count]))
                for count in tokens
                for _, key, form in figures
            ),
        ]
        for (block, sparsity), by_tokens in cells.items()
    ]


SECTION = Section("int8_linear", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
