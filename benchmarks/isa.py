"""The kernel and whole encoders on every instruction set of this CPU, 80 %.

The kernel has tiles in and out. Encoders are those of ``benchmarks.whole_encoder``,
without its peers. All are compared with the instruction set's own multiply-add peak;
plain C++ is there for information.

    python -m benchmarks.isa [--quick]
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

import pybsp
from benchmarks import kernel, whole_encoder
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import OneOperation, take_turns

LAYERS = ("minilm_ffn_down", "bert_base_attention", "bert_base_ffn_up",
          "bert_base_ffn_down", "odd_312_up", "odd_1152_down")  # fmt: skip
#: Others differ from one of these in products of 8 bits alone.
FLOAT_ISAS = ("generic", "neon", "avx2", "avx512")
TARGETS = {"avx2": 0.8, "neon": 0.8}
#: Of 128 tokens in (8, 1) blocks, over the floor of the arithmetic.
ENCODERS = {"bert_base": 1.3, "minilm": 1.43}


def measure(options: Options) -> dict[str, Any]:
    gone = kernel.missing()
    if gone:
        return gone
    rows: list[dict[str, Any]] = []
    encoders: list[dict[str, Any]] = []
    active = pybsp.ops.active_isa()
    try:
        for isa in [isa for isa in pybsp.ops.available_isas() if isa in FLOAT_ISAS]:
            pybsp.ops.set_active_isa(isa)
            rows += kernel.tile_rows(options, options.sparsities or (0.8,), LAYERS)
            encoders += [encoder_row(name) for name in ENCODERS]
    finally:
        pybsp.ops.set_active_isa(active)
    targets = []
    for isa, bound in TARGETS.items():
        found = [row["of_peak"] for row in rows if row["isa"] == isa]
        what = f"kernel on {isa}, M >= 96, 80 %, of its FMA peak"
        targets += reach(what, found, median=bound)
        for name, most in ENCODERS.items():
            what = f"{name}, ids to states, 1 x 128, 80 %, on {isa}, over its floor"
            ratios = [
                row["over_floor"]
                for row in encoders
                if (row["model"], row["isa"]) == (name, isa)
            ]
            targets += reach(what, ratios, median=most, at_most=True, form="{:.2f}x")
    return {"rows": rows, "encoders": encoders, "targets": targets}


@torch.inference_mode()
def encoder_row(name: str, length: int = 128) -> dict[str, Any]:
    """One sequence through a whole encoder in (8, 1) blocks, 80 %."""
    block, sparsity = (8, 1), 0.8
    model, kept = whole_encoder.pruned(name, block, sparsity)
    ids = torch.randint(1000, 30000, (1, length))
    packed = whole_encoder.pack(model, block)
    expected = model.double()(ids).last_hidden_state
    whole_encoder.check(name, packed(ids).last_hidden_state, expected)
    calls: dict[str, Any] = {
        whole_encoder.PEAK: OneOperation(pybsp.ops.fma_peak),
        "pybsp": lambda: packed(ids),
    }
    rounds = take_turns(calls, seconds=2.0, min_rounds=15)
    operations = whole_encoder.arithmetic(model.config, kept, 1, length)
    return {
        **whole_encoder.describe(name, model, block, sparsity, 1, length),
        **whole_encoder.over_floor(rounds, {whole_encoder.PEAK: operations}),
        "times": {"pybsp": rounds.to_dict("pybsp")},
    }


def summary(data: dict[str, Any]) -> Summary:
    cells: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, float] = {}
    for row in data["rows"]:
        peaks[row["isa"]] = max(row["peak_gflops"], peaks.get(row["isa"], 0))
        blocks = cells.setdefault(row["isa"], {})
        blocks.setdefault(block_text(row["block_shape"]), []).append(row["of_peak"])
    heads = list(dict.fromkeys(block for isa in cells.values() for block in isa))
    floors = {(row["isa"], row["model"]): row["over_floor"] for row in data["encoders"]}
    return [
        "isa",
        "peak GFLOP/s",
        *heads,
        *(f"{name}, over floor" for name in ENCODERS),
    ], [
        [isa, f"{peaks[isa]:.0f}"]
        + [f"{statistics.median(blocks[b]):.2f}" if b in blocks else "" for b in heads]
        + [f"{floors[isa, name]:.2f}x" for name in ENCODERS]
        for isa, blocks in cells.items()
    ]


SECTION = Section("isa", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
