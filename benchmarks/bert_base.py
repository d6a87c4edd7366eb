"""A BERT-base encoder, batch 1, 128 tokens, 80 %: whole against other engines.

Random weights with zero blocks, the same in every engine; hidden states in and out,
without embeddings and attention mask. ``over_floor`` is the time over that of the
arithmetic alone: kept weights and attention at the multiply-add peak of the same run.
Checkpoints with an accuracy are timed by ``benchmarks.encoder``.

    python -m benchmarks.bert_base [--deepsparse PYTHON] [--quick]
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

import pybsp
from benchmarks import deepsparse, peers
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import take_turns
from pybsp.blocks import BlockShape, expand_blocks, grid_shape

BLOCKS = ((8, 1), (1, 96))
SPARSITY, TOKENS = 0.8, 128


class Encoder(nn.Module):
    """The layers of a BERT model, on hidden states ``(1, tokens, hidden)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = model.encoder.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            x = y[0] if isinstance(y, tuple) else y
        return x


def measure(options: Options) -> dict[str, Any]:
    layers = 2 if options.quick else 12
    sparsity = (options.sparsities or (SPARSITY,))[0]
    rows = [
        compare(layers, block, sparsity, tokens, options.deepsparse)
        for block in options.blocks or BLOCKS[: 1 if options.quick else None]
        for tokens in options.tokens or (TOKENS,)
    ]
    targets = reach("BERT-base encoder, 80 %, time over its arithmetic floor",
                    [row["over_floor"] for row in rows], median=1.3, at_most=True,
                    form="{:.2f}x")  # fmt: skip
    against = [row["speedup"].get("DeepSparse") for row in rows]
    return {
        "rows": rows,
        "targets": targets
        + reach("BERT-base encoder, 80 %, over DeepSparse",
                [ratio for ratio in against if ratio], median=1.5, form="{:.2f}x"),
    }  # fmt: skip


def compare(
    layers: int, block: BlockShape, sparsity: float, tokens: int, python: str | None
) -> dict[str, Any]:
    model, kept = pruned_bert(layers, block, sparsity)
    hidden = model.config.hidden_size
    x = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(1))
    dense = Encoder(model).eval()  # the exporter restores the mode it finds
    packed_model = copy.deepcopy(model)
    pybsp.pack_(packed_model, block_shape=block)
    packed = Encoder(packed_model).eval()
    exported = onnx_bytes(dense, x)
    calls: dict[str, Any] = {"pybsp": lambda: packed(x), "torch": lambda: dense(x)}
    calls |= peers.onnx_calls(exported, x)
    expected = copy.deepcopy(dense).double()(x.double())
    with contextlib.ExitStack() as stack:
        for name, call in calls.items():
            check(name, torch.as_tensor(call()), expected)
        if python:
            server = stack.enter_context(deepsparse.serve_model(python, x, exported))
            check("DeepSparse", server.output, expected)
            calls["DeepSparse"] = server
        peak = pybsp.ops.fma_peak() * torch.get_num_threads()
        rounds = take_turns(calls, seconds=5.0, min_rounds=7)
    # Two products of (tokens, tokens, hidden) a layer beside the linear ones.
    operations = 2 * tokens * kept + layers * 4 * tokens * tokens * hidden
    return {
        "layers": layers,
        "M": tokens,
        "block_shape": list(block),
        "sparsity": sparsity,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "isa": pybsp.ops.active_isa(),
        "peak_gflops": round(peak / 1e9, 1),
        "times": {name: rounds.to_dict(name) for name in calls},
        "floor_ms": round(operations / peak * 1e3, 3),
        "over_floor": round(rounds.median("pybsp") * peak / operations, 3),
        "speedup": {
            name: round(rounds.ratio(name, "pybsp"), 2)
            for name in calls
            if name != "pybsp"
        },
    }


def pruned_bert(layers: int, block: BlockShape, sparsity: float) -> tuple[Any, int]:
    """A random model with zero blocks in its encoder's linear weights, and how many
    of these weights are kept."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).eval()
    kept = 0
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            scores = torch.rand(grid_shape(module.weight.shape, block))
            mask = pybsp.ops.block_mask(scores, round((1 - sparsity) * scores.numel()))
            module.weight.mul_(expand_blocks(mask, block))
            kept += int(mask.sum()) * block[0] * block[1]
    return model, kept


def onnx_bytes(encoder: nn.Module, x: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter warns about itself and about traced shapes, both intended.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder, (x,), buffer, input_names=["x"], output_names=["y"],
            opset_version=14, dynamo=False,
        )  # fmt: skip
    return buffer.getvalue()


def check(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Hidden states are normalised: ten thousandths are many roundings, no mistake."""
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-3, msg=lambda text: f"{what}: {text}"
    )


def summary(data: dict[str, Any]) -> Summary:
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["speedup"]))
    head = ["block", "layers", "ms", "over the floor", *names]
    return head, [
        [
            block_text(row["block_shape"]),
            str(row["layers"]),
            f"{row['times']['pybsp']['median_ms']:.1f}",
            f"{row['over_floor']:.2f}x",
            *(f"{row['speedup'].get(name, float('nan')):.2f}x" for name in names),
        ]
        for row in data["rows"]
    ]


SECTION = Section("bert_base", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
