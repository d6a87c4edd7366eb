"""BERT-base packed in bfloat16 against the same in float32.

80 % of the ``(8, 1)`` blocks are zero. ``layers``: all 72 linear layers of the encoder
one after the other, row-major, so that their weights come from beyond L2 as in a model,
and one of each shape by itself, with warm weights; ``encoder``: token ids to hidden
states. In turns in one process; the ratio is the median over the rounds of that within
a round. ``bytes``: of the packed weights with their indices, and of packed files with
all that is in them.

    python -m benchmarks.bfloat16
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import pybsp
from benchmarks import result
from benchmarks.turns import take_turns
from benchmarks.whole_encoder import FromIds, pruned
from pybsp.cli.models import quiet
from pybsp.cli.timing import torch_threads
from pybsp.nn import BlockSparseLinear

TOKENS = (1, 4, 16, 32, 128)
TYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    quiet()
    with torch_threads(arguments.threads), torch.inference_mode():
        model, _ = pruned("bert_base", (8, 1), 0.8)
        models = {dtype: packed(model, dtype) for dtype in TYPES}
        rows = []
        for tokens in TOKENS:
            rows += layer_rows(models, tokens, arguments.seconds)
            rows.append(encoder_row(models, tokens, arguments.seconds))
            print(*rows[-5:], sep="\n", flush=True)
        sizes = {dtype: bytes_of(models[dtype]) for dtype in TYPES}
    print(sizes)
    result.save(
        "bfloat16", {"threads": arguments.threads, "bytes": sizes, "rows": rows}
    )


def packed(model: Any, dtype: str) -> Any:
    model = copy.deepcopy(model)
    pybsp.pack_(model, dtype=dtype, min_gain=0, shrink=False)
    return model


def layers_of(model: Any) -> list[BlockSparseLinear]:
    return [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


def layer_rows(
    models: dict[str, Any], tokens: int, seconds: float
) -> list[dict[str, Any]]:
    layers = {dtype: layers_of(model) for dtype, model in models.items()}
    inputs = {n: torch.randn(tokens, n) for n in (768, 3072)}
    # By shape the first one; then all.
    shapes: dict[str, list[int]] = {}
    for index, layer in enumerate(layers["float32"]):
        shapes.setdefault(f"{layer.out_features} x {layer.in_features}", [index])
    shapes["all"] = list(range(len(layers["float32"])))

    def calls(dtype: str, indices: list[int]) -> Callable[[], object]:
        products = [
            (inputs[layer.in_features], layer.matrix, layer.bias)
            for layer in (layers[dtype][i] for i in indices)
        ]
        return lambda: [pybsp.block_sparse_linear(*product) for product in products]

    rows = []
    for name, indices in shapes.items():
        found = {dtype: calls(dtype, indices) for dtype in TYPES}
        rows.append(row(f"layers {name}", tokens, found, seconds))
    return rows


def encoder_row(models: dict[str, Any], tokens: int, seconds: float) -> dict[str, Any]:
    ids = torch.randint(1000, 30000, (1, tokens))
    found = {}
    for dtype, model in models.items():
        encoder = FromIds(model)
        found[dtype] = lambda encoder=encoder: encoder(ids)
    return row("encoder", tokens, found, seconds)


def row(
    what: str, tokens: int, calls: dict[str, Callable[[], object]], seconds: float
) -> dict[str, Any]:
    rounds = take_turns(calls, seconds=seconds)
    return {
        "what": what,
        "M": tokens,
        **{f"{dtype}_ms": rounds.to_dict(dtype)["median_ms"] for dtype in TYPES},
        "ratio": round(rounds.ratio("bfloat16", "float32"), 3),
        "rounds": rounds.to_dict("float32")["rounds"],
    }


def bytes_of(model: Any) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = pybsp.save_packed(model, folder, dense=False)
        size = file.stat().st_size
    weights = sum(layer.matrix.nbytes for layer in layers_of(model))
    return {"packed_weights": weights, "packed_file": size}


if __name__ == "__main__":
    main()
