"""Whole encoders of 8-bit weights and inputs against 8-bit and float32 engines.

The models, inputs and turns of ``benchmarks.whole_encoder``, packed with
``dtype="int8"``: integers for every linear layer of the encoder, scales for each token,
attention and norms in float32. The 8-bit peers quantise the same dense weights: torch
and ONNX Runtime dynamically, OpenVINO by NNCF for transformers, from the timed input.
``over_floor`` is the time over that of the arithmetic alone, kept weights at the peak
of 8-bit products of vectors and attention at the multiply-add peak, both measured in
every round; AMX does more products than vectors, OpenVINO's among them. ``error``: of
the hidden states against float64, relative, by norms.

    python -m benchmarks.whole_encoder_int8 [--deepsparse PYTHON] [--quick]
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import pybsp
from benchmarks import deepsparse, peers
from benchmarks.section import Options, Section, Summary, block_text, main
from benchmarks.turns import OneOperation, take_turns
from benchmarks.whole_encoder import (
    PEAK,
    Case,
    FromIds,
    chosen,
    describe,
    floor_head,
    floor_targets,
    floor_text,
    onnx_bytes,
    over_floor,
    over_peers,
    pack,
    pruned,
    ratio_targets,
    rounds_of,
)
from pybsp.blocks import BlockShape

#: As whole_encoder.CASES.
CASES: tuple[Case, ...] = (
    ("bert_base", (8, 1), 0.8, 1, 128),
    ("bert_base", (16, 4), 0.8, 1, 128),
    ("bert_base", (32, 32), 0.8, 1, 128),
    ("bert_base", (1, 96), 0.8, 1, 128),
    ("bert_base", (8, 1), 0.9, 1, 128),
    ("bert_base", (16, 4), 0.9, 1, 128),
    ("bert_base", (8, 1), 0.8, 1, 16),
    ("bert_base", (16, 4), 0.8, 32, 128),
    ("minilm", (8, 1), 0.8, 1, 128),
    ("minilm", (16, 4), 0.8, 1, 128),
    ("minilm", (8, 1), 0.8, 1, 16),
)
HEADLINE = CASES[:2]
#: 8-bit products on registers, among the candidates.
DOT_PEAK = "peak_int8_gops"
#: A peer that computes the rest, attention above all, in bfloat16: shown, and not
#: counted among those whose rest is float32 as ours.
BFLOAT16 = "openvino int8, bfloat16"
#: The largest relative error of hidden states that is rounding and no mistake.
TOLERANCE = 0.1


def measure(options: Options) -> dict[str, Any]:
    rows = [
        compare(*case, options, rounds_of(case, HEADLINE))
        for case in chosen(HEADLINE if options.quick else CASES, options)
    ]
    targets = []
    for block in ((8, 1), (16, 4)):
        head = [
            row
            for row in rows
            if (row["model"], row["sparsity"], row["batch"], row["M"])
            == ("bert_base", 0.8, 1, 128)
            and row["block_shape"] == list(block)
        ]
        what = f"int8 BERT-base, ids to states, 1 x 128, 80 % {block_text(block)}"
        targets += [
            *floor_targets(what, head, 1.6),
            *ratio_targets(f"{what}, over the best dense int8 peer", head,
                           "over_dense_int8", 3.5),
            *ratio_targets(f"{what}, over the best dense float32 peer", head,
                           "over_dense", 10.0),
            *ratio_targets(f"{what}, over float32", head, "over_float32", 2.0),
        ]  # fmt: skip
    return {"rows": rows, "targets": targets}


def compare(
    name: str, block: BlockShape, sparsity: float, batch: int, length: int,
    options: Options, min_rounds: int,
) -> dict[str, Any]:  # fmt: skip
    model, kept = pruned(name, block, sparsity)
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    ids = torch.randint(1000, 30000, (batch, length))
    dense = FromIds(model).eval()
    exported = onnx_bytes(dense, ids)
    packed = {
        dtype: FromIds(pack(model, block, dtype)).eval()
        for dtype in ("int8", "float32")
    }
    float_calls = {"torch": lambda: dense(ids), **peers.onnx_calls(exported, ids)}
    int8_calls = dense_int8(model, exported, ids)
    calls: dict[str, Any] = {
        "pybsp": lambda: packed["int8"](ids),
        "pybsp float32": lambda: packed["float32"](ids),
        **float_calls,
        **int8_calls,
    }
    expected = copy.deepcopy(dense).double()(ids[:1])
    errors = {}
    with contextlib.ExitStack() as stack:
        if options.deepsparse:
            server = stack.enter_context(
                deepsparse.serve_model(options.deepsparse, ids, exported)
            )
            calls["DeepSparse"] = server
        for peer, call in calls.items():
            states = server.output if peer == "DeepSparse" else torch.as_tensor(call())
            errors[peer] = relative_error(states[:1], expected)
            if errors[peer] > TOLERANCE:
                raise AssertionError(f"{peer} is {errors[peer]:.3f} off, relatively")
        yardsticks = {
            PEAK: OneOperation(pybsp.ops.fma_peak),
            DOT_PEAK: OneOperation(pybsp.ops.dot_peak),
        }
        rounds = take_turns(
            {**yardsticks, **calls}, seconds=4.0,
            min_rounds=min_rounds, always_warm=batch == 1,
        )  # fmt: skip
    tokens = batch * length
    attention = layers * 4 * tokens * length * hidden
    return {
        **describe(name, model, block, sparsity, batch, length, dtype="int8"),
        **over_floor(rounds, {PEAK: attention, DOT_PEAK: 2 * tokens * kept}),
        "error": {peer: round(error, 5) for peer, error in errors.items()},
        **over_peers(
            rounds, calls,
            over_dense=float_calls,
            over_dense_int8=[peer for peer in int8_calls if peer != BFLOAT16],
            over_float32=["pybsp float32"],
        ),
    }  # fmt: skip


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def dense_int8(model: Any, exported: bytes, ids: torch.Tensor) -> dict[str, peers.Call]:
    """The same model in the 8-bit forms of those engines that are installed."""
    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: deprecated
        dynamic = FromIds(
            torch.ao.quantization.quantize_dynamic(
                copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8
            )
        ).eval()
    calls: dict[str, peers.Call] = {"torch int8 dynamic": lambda: dynamic(ids)}
    if find_spec("onnxruntime"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(exported)
            logging.getLogger().setLevel(logging.ERROR)  # it advises to infer shapes
            quantize_dynamic(
                source, target, per_channel=True, weight_type=QuantType.QInt8
            )
            calls["onnxruntime int8 dynamic"] = peers.onnxruntime_call(
                target.read_bytes(), ids
            )
    if find_spec("openvino") and find_spec("nncf"):
        quantized = peers.openvino_int8(exported, ids)
        calls["openvino int8"] = peers.openvino_call(quantized, ids)
        calls[BFLOAT16] = peers.openvino_call(quantized, ids, "bf16")
    return calls


def summary(data: dict[str, Any]) -> Summary:
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["speedup"]))
    head = [
        "model", "block", "sparsity", "batch x tokens", "ms", floor_head(data["rows"]),
        "error",
        *names,
    ]  # fmt: skip
    rows = [
        [
            row["model"],
            block_text(row["block_shape"]),
            f"{row['sparsity']:.0%}",
            f"{row['batch']} x {row['M']}",
            f"{row['times']['pybsp']['median_ms']:.2f}",
            floor_text(row),
            f"{row['error']['pybsp']:.1%}",
            *(f"{row['speedup'].get(name, float('nan')):.2f}x" for name in names),
        ]
        for row in data["rows"]
    ]
    return head, rows


SECTION = Section("whole_encoder_int8", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
