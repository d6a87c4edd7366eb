"""What pruning adds to a training step, on BERT-base-sized weights.

A real step (forward, backward, AdamW) of a randomly initialised BERT-base, and the time
inside the pruner's hooks during it, by phase of the run. The same penalty through torch
autograd stands beside it.

    python -m benchmarks.training_hook [--batch 8] [--sequence 128] [--steps 3]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

import pybsp
from benchmarks import result
from pybsp.blocks import block_view


def autograd_penalty(model: torch.nn.Module, pruner: pybsp.BlockPruner) -> float:
    """Seconds of the penalty written as a loss term: forward and backward."""
    start = time.perf_counter()
    total = torch.zeros(())
    for name, target in pruner.targets.items():
        weight = model.get_parameter(f"{name}.weight")
        norms = block_view(weight, target.block_shape).square().sum((2, 3)).sqrt()
        factors = 1 / (norms.detach() + 1e-3)
        total = total + 1e-4 * (factors * norms).sum()
    total.backward()
    return time.perf_counter() - start


def timed(function: Any, spent: list[float]) -> Any:
    def call(*arguments: Any) -> None:
        start = time.perf_counter()
        function(*arguments)
        spent.append(time.perf_counter() - start)

    return call


def measure(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], phase: str, steps: int,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    phases = (0, steps + 1, 1) if phase == "regularise" else (0, 2, steps)
    config = pybsp.BlockPruningConfig(
        phases=phases, reweight_every=1, reg_lambda=1e-6, **options
    )
    pruner = pybsp.BlockPruner(model, config, total_steps=sum(phases))
    hooks: list[float] = []
    pruner._before_step = timed(pruner._before_step, hooks)  # type: ignore[method-assign]
    pruner._after_step = timed(pruner._after_step, hooks)  # type: ignore[method-assign]
    if phase == "retrain":
        pruner.cut()
        pruner.step = 2
    pruner.attach(optimizer)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    pruner.detach()
    step = sorted(times)[len(times) // 2]
    # Two hook calls a step, before and after the optimizer.
    hook = sorted(a + b for a, b in zip(hooks[::2], hooks[1::2], strict=True))
    row = {
        "phase": phase,
        "step_ms": round(step * 1e3, 1),
        "hooks_ms": round(hook[len(hook) // 2] * 1e3, 2),
        "share": round(hook[len(hook) // 2] / (step - hook[len(hook) // 2]), 4),
        **{key: str(value) for key, value in options.items()},
    }
    if phase == "regularise":
        autograd = sorted(autograd_penalty(model, pruner) for _ in range(steps))
        row["autograd_penalty_ms"] = round(autograd[len(autograd) // 2] * 1e3, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).train()
    ids = torch.randint(0, 30000, (arguments.batch, arguments.sequence))
    inputs = {
        "input_ids": ids,
        "labels": torch.zeros(arguments.batch, dtype=torch.long),
    }
    rows = []
    for block_shape in [(8, 1), (16, 4), (1, "in/8")]:
        for phase, penalty in [
            ("regularise", "gradient"),
            ("regularise", "proximal"),
            ("retrain", "gradient"),
        ]:
            row = measure(
                model, inputs, phase, arguments.steps,
                block_shape=block_shape, penalty=penalty,
            )  # fmt: skip
            rows.append(row)
    table = Table(
        "block", "phase", "penalty", "step ms", "hooks ms", "share", "autograd"
    )
    for row in rows:
        table.add_row(
            row["block_shape"], row["phase"], row["penalty"], str(row["step_ms"]),
            str(row["hooks_ms"]), f"{row['share']:.2%}",
            str(row.get("autograd_penalty_ms", "")),
        )  # fmt: skip
    Console().print(table)
    data = {
        "threads": torch.get_num_threads(), "batch": arguments.batch,
        "sequence": arguments.sequence, "rows": rows,
    }  # fmt: skip
    print(result.save("training_hook", data))


if __name__ == "__main__":
    main()
