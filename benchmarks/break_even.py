"""The smallest sparsity at which pybsp is no slower than the best dense float32 peer.

Sparsities from 0 % to 50 % in steps of 5; the break-even is the one from which on no
measured sparsity is slower. Row-major in and out, bias.

    python -m benchmarks.break_even [--quick]
"""

from __future__ import annotations

from typing import Any

from benchmarks.block_sparse_linear import compare
from benchmarks.layers import random_layer
from benchmarks.section import Options, Section, Summary, block_text, main, reach

LAYERS = ("minilm_attention", "minilm_ffn_up", "bert_base_attention",
          "bert_base_ffn_up", "odd_312_down", "odd_1152_down")  # fmt: skip
SPARSITIES = tuple(step / 20 for step in range(11))
BLOCKS = ((8, 1), (16, 4), (32, 32), (1, 96))
#: Break-even at or under, by tokens.
TARGETS = {128: 0.2, 16: 0.5, 32: 0.5}


def measure(options: Options) -> dict[str, Any]:
    rows = []
    for name, shape in options.shapes(LAYERS).items():
        for block in options.divisors(shape, BLOCKS):
            layers = [
                random_layer(name, shape, block, sparsity)
                for sparsity in options.sparsities or SPARSITIES
            ]
            for tokens in options.tokens or tuple(TARGETS):
                found, dense = compare(layers, tokens, seconds=0.3)
                rows.append({**_row(found), "times": dense["times"]})
    targets = []
    for tokens, bound in TARGETS.items():
        values = [row["break_even"] for row in rows if row["M"] == tokens]
        targets += reach(
            f"break-even with the best dense peer, M = {tokens}", values,
            every=bound, at_most=True, form="{:.0%}",
        )  # fmt: skip
    return {"rows": rows, "targets": targets}


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One layer, block shape and M: what ``compare`` said of each sparsity."""
    slower = [row["sparsity"] for row in found if row["speedup"] < 1]
    later = [r["sparsity"] for r in found if r["sparsity"] > max(slower, default=-1)]
    same = {key: found[0][key] for key in found[0] if key not in ("sparsity", "times")}
    for key in ("speedup", "of_peak"):
        same[key] = {f"{row['sparsity']:.2f}": row[key] for row in found}
    same["milliseconds"] = {
        f"{row['sparsity']:.2f}": row["times"]["pybsp"]["median_ms"] for row in found
    }
    # 100 % when even the largest measured sparsity is slower.
    return {**same, "break_even": min(later, default=1.0)}


def summary(data: dict[str, Any]) -> Summary:
    """By layer and M, one column for each block shape."""
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in data["rows"]:
        key = (f"{row['layer']} {row['N']}x{row['K']}", row["M"])
        cells.setdefault(key, {})[block_text(row["block_shape"])] = row["break_even"]
    heads = list(dict.fromkeys(block for found in cells.values() for block in found))
    return ["layer", "M", *heads], [
        [name, str(m), *(_percent(found.get(block)) for block in heads)]
        for (name, m), found in cells.items()
    ]


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return "over 50 %" if value > SPARSITIES[-1] else f"{value:.0%}"


SECTION = Section("break_even", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
