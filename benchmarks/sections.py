"""The sections of ``python -m benchmarks``, in their order."""

from __future__ import annotations

from typing import Any

from benchmarks import (
    block_sparse_linear,
    block_sparse_linears,
    break_even,
    cost_model,
    every_peer,
    few_tokens,
    int8_linear,
    isa,
    kernel,
    threads,
    tokens,
    training_ops,
    whole_encoder,
    whole_encoder_int8,
    work,
)
from benchmarks.section import Options, Section, every_column, reach


def measure_training_ops(options: Options) -> dict[str, Any]:
    blocks = options.blocks or training_ops.BLOCKS[: 3 if options.quick else None]
    rows = training_ops.measure_all(seconds=0.1, blocks=tuple(blocks))
    cold = [r for r in rows if r["dtype"] == "float32" and r["footprint"] != "one"]
    norms = [r["of_bound"] for r in cold if r["operation"] == "block_norms"]
    autograd = [r["over_autograd"] for r in cold if "over_autograd" in r]
    encoder = "all weights of BERT-base's encoder, float32"
    targets = reach(f"block norms of {encoder}, of read bandwidth", norms, median=0.8)
    targets += reach(
        f"penalty gradient of {encoder}, over torch autograd",
        autograd, median=5.0, form="{:.1f}x",
    )  # fmt: skip
    return {"rows": rows, "targets": targets}


def measure_cost_model(options: Options) -> dict[str, Any]:
    calls = 200 if options.quick else 600
    data = cost_model.measure_all(calls, calls // 2)
    targets = []
    for row in data["errors"][:2]:
        what = f"cost model, {row['what']}: held-out layers within 15 %"
        targets += reach(what, [row["within_15_percent"]], every=0.9)
    return {**data, "rows": data["errors"], "targets": targets}


SECTIONS: tuple[Section, ...] = (
    kernel.SECTION,
    block_sparse_linear.SECTION,
    block_sparse_linears.SECTION,
    every_peer.SECTION,
    whole_encoder.SECTION,
    int8_linear.SECTION,
    whole_encoder_int8.SECTION,
    few_tokens.SECTION,
    break_even.SECTION,
    work.SECTION,
    tokens.SECTION,
    threads.SECTION,
    isa.SECTION,
    Section("training_ops", measure_training_ops, every_column),
    Section("cost_model", measure_cost_model, every_column),
)
