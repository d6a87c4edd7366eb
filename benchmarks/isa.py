"""The kernel on every instruction set of this CPU, tiles in and out, 80 %.

Each is compared with its own multiply-add peak; plain C++ is there for information.

    python -m benchmarks.isa [--quick]
"""

from __future__ import annotations

import statistics
from typing import Any

import pybsp
from benchmarks import kernel
from benchmarks.section import Options, Section, Summary, block_text, main, reach

LAYERS = ("minilm_ffn_down", "bert_base_attention", "bert_base_ffn_up",
          "bert_base_ffn_down", "odd_312_up", "odd_1152_down")  # fmt: skip
TARGETS = {"avx2": 0.8, "neon": 0.8}


def measure(options: Options) -> dict[str, Any]:
    gone = kernel.missing()
    if gone:
        return gone
    rows: list[dict[str, Any]] = []
    active = pybsp.ops.active_isa()
    try:
        for isa in pybsp.ops.available_isas():
            pybsp.ops.set_active_isa(isa)
            rows += kernel.tile_rows(options, options.sparsities or (0.8,), LAYERS)
    finally:
        pybsp.ops.set_active_isa(active)
    targets = []
    for isa, bound in TARGETS.items():
        found = [row["of_peak"] for row in rows if row["isa"] == isa]
        what = f"kernel on {isa}, M >= 96, 80 %, of its FMA peak"
        targets += reach(what, found, median=bound)
    return {"rows": rows, "targets": targets}


def summary(data: dict[str, Any]) -> Summary:
    cells: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, float] = {}
    for row in data["rows"]:
        peaks[row["isa"]] = max(row["peak_gflops"], peaks.get(row["isa"], 0))
        blocks = cells.setdefault(row["isa"], {})
        blocks.setdefault(block_text(row["block_shape"]), []).append(row["of_peak"])
    heads = list(dict.fromkeys(block for isa in cells.values() for block in isa))
    return ["isa", "peak GFLOP/s", *heads], [
        [isa, f"{peaks[isa]:.0f}"]
        + [f"{statistics.median(blocks[b]):.2f}" if b in blocks else "" for b in heads]
        for isa, blocks in cells.items()
    ]


SECTION = Section("isa", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
