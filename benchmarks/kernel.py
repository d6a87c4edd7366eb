"""The kernel alone: tokens in tiles, in and out, as a fraction of the FMA peak.

``of_peak`` is ``2 M nnz / time`` over the register-only multiply-add peak taken just
before; skipped zeros do not count as work. ``of_tile_peak`` is the same over what the
kernel's own tile reaches with weights and inputs in L1: CPUs lower their clock rate
with the power that the instructions draw, and loads draw some. Bias added, no
transposition, weights warm; REPEATS products in one native call, so that the Python
call does not count.

    python -m benchmarks.kernel [--quick] [--layers ...] [--blocks 8,1 ...]
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import pybsp
from benchmarks.layers import (
    SHAPES,
    Layer,
    check,
    family,
    random_layer,
    random_tokens,
)
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns
from pybsp import _core

TOKENS = (96, 144, 192)
SPARSITIES = (0.7, 0.8, 0.9, 0.95)
REPEATS = 8
NEEDS = ("pack_tokens", "block_sparse_linear_tiles", "unpack_tokens")


def missing() -> dict[str, Any] | None:
    """What a section on tiles returns when this build has none."""
    names = [f"pybsp.ops.{name}" for name in NEEDS if not hasattr(pybsp.ops, name)]
    return {"missing": ", ".join(names), "rows": [], "targets": []} if names else None


def measure(options: Options) -> dict[str, Any]:
    gone = missing()
    if gone:
        return gone
    sparsities = options.sparsities or ((0.8, 0.9) if options.quick else SPARSITIES)
    rows = list(tile_rows(options, sparsities))
    return {"rows": rows, "targets": targets(rows)}


def tile_rows(
    options: Options, sparsities: Sequence[float], names: Sequence[str] = tuple(SHAPES)
) -> Iterator[dict[str, Any]]:
    for name, shape in options.shapes(names).items():
        for block, sparsity in itertools.product(options.divisors(shape), sparsities):
            layer = random_layer(name, shape, block, sparsity)
            for tokens in options.tokens or TOKENS:
                yield measure_tiles(layer, tokens)


def measure_tiles(layer: Layer, tokens: int, seconds: float = 0.04) -> dict[str, Any]:
    ops: Any = pybsp.ops
    x = random_tokens(tokens, layer.weight.shape[1])
    tiles = ops.pack_tokens(x)
    call = ops.block_sparse_linear_tiles
    out = call(tiles, layer.matrix, layer.bias)
    call(tiles, layer.matrix, layer.bias, out=out)
    check("block_sparse_linear_tiles", ops.unpack_tokens(out), x, layer)
    products = [
        (layer.matrix.pattern, layer.matrix.values.data_ptr(), layer.bias.data_ptr(),
         0, 0, out.data.data_ptr())
    ] * REPEATS  # fmt: skip
    arguments = (products, tiles.data.data_ptr(), tokens, True, torch.get_num_threads())
    peak, tile_peak = ops.fma_peak(), ops.tile_peak()
    rounds = take_turns(
        {"pybsp": lambda: _core.multiply_many(*arguments)}, seconds=seconds
    )
    rate = REPEATS * layer.operations(tokens) / rounds.median("pybsp")
    row = layer.describe(tokens, peak)
    return {
        **row,
        "products": REPEATS,
        "times": {"pybsp": rounds.to_dict("pybsp")},
        "of_peak": round(rate / peak / row["threads"], 3),
        "of_tile_peak": round(rate / tile_peak / row["threads"], 3),
    }


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {"(r, c)": [], "(1, n)": []}
    for row in rows:
        found[family(row["block_shape"])].append(row["of_peak"])
    what = "kernel, tiles in and out, M >= 96, sparsity 0.7 to 0.95, of FMA peak: "
    return reach(
        what + "(8, 1) (16, 1) (16, 4) (32, 32)", found["(r, c)"], median=0.9, every=0.8
    ) + reach(what + "(1, 96) (1, 64)", found["(1, n)"], median=0.8, every=0.7)


def summary(data: dict[str, Any]) -> Summary:
    """By layer and block: the median and the least over M and sparsity."""
    cells: dict[str, dict[str, list[float]]] = {}
    of_tile: dict[str, list[float]] = {}
    for row in data["rows"]:
        name = f"{row['layer']} {row['N']}x{row['K']}"
        layer = cells.setdefault(name, {})
        layer.setdefault(block_text(row["block_shape"]), []).append(row["of_peak"])
        of_tile.setdefault(name, []).append(row["of_tile_peak"])
    heads = list(dict.fromkeys(block for layer in cells.values() for block in layer))
    last = "all, of tile peak"
    return ["of FMA peak: median (least)", *heads, last], [
        [name, *(_cell(layer.get(block, [])) for block in heads), _cell(of_tile[name])]
        for name, layer in cells.items()
    ]


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f})" if values else ""


SECTION = Section("kernel", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
