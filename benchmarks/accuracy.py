"""Accuracy, size and speed of all-MiniLM-L6-v2 pruned on GLUE tasks.

Runs ``pybsp prune`` for every task, sparsity and block shape, sharing one dense
fine-tuning a task, and copies each ``results.json`` to ``results/accuracy/``. Finished
runs are skipped and interrupted ones resumed, so the command may be repeated. Tasks may
run side by side in processes of their own; take the latencies afterwards, on a quiet
machine, with ``python -m benchmarks.encoder``.

    python -m benchmarks.accuracy --data DIR --runs DIR --task mrpc sst2 --threads 1
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
from pathlib import Path

from benchmarks import PYBSP, result

#: Dense epochs and rows to train on.
BUDGET = {"mrpc": (2, None), "sst2": (2, 8000)}
#: Sparsity and epochs of the pruning run.
SPARSITIES = {0.8: 2, 0.5: 1}
BLOCKS = ("8,1", "16,4", "1,in/8")
METHOD = ["--penalty", "proximal", "--lambda", "auto", "--ramp", "cubic",
          "--phases", "0,0.4,0.6"]  # fmt: skip


def name(task: str, sparsity: float, block: str) -> str:
    return f"{task}-{sparsity:.0%}-{block}".replace(",", "x").replace("/", "_")


def command(
    arguments: argparse.Namespace, task: str, sparsity: float, block: str
) -> list[str]:
    epochs_dense, rows = BUDGET[task]
    dense = arguments.runs / f"{task}-dense"
    options = ["prune", "--model", "minilm", "--task", task, "--resume", "--json",
               "--data", str(arguments.data), "--threads", str(arguments.threads),
               "--out", str(arguments.runs / name(task, sparsity, block)),
               "--sparsity", str(sparsity), "--block-shape", block,
               "--epochs", str(SPARSITIES[sparsity]), "--seed", "0",
               *METHOD]  # fmt: skip
    if rows:
        options += ["--max-train-samples", str(rows)]
    if dense.exists():
        options += ["--dense-checkpoint", str(dense)]
    else:
        options += ["--epochs-dense", str(epochs_dense), "--save-dense", str(dense)]
    return [PYBSP, *options]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--task", nargs="+", choices=BUDGET, default=list(BUDGET))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for task, sparsity, block in itertools.product(arguments.task, SPARSITIES, BLOCKS):
        run = name(task, sparsity, block)
        subprocess.run(
            command(arguments, task, sparsity, block), check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        result.keep(arguments.runs / run, f"accuracy/{run}", arguments)
        print(run, flush=True)


if __name__ == "__main__":
    main()
