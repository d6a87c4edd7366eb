"""Accuracy right after the cut, without any training: by norm, and by reconstruction.

all-MiniLM-L6-v2, fine-tuned on a GLUE task, is cut to each sparsity by block norms
alone and by ``prune_one_shot`` on training texts without labels, which charges a block
with the error of its layer or of the model. The error shown is that of the last hidden
states on the dev texts, relative to their variance. The dense checkpoint is one that
``pybsp glue`` left in STUDY/dense.

    python -m benchmarks.one_shot --data DIR --dense STUDY/dense/sst2-seed0 --task sst2
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import result
from pybsp import BlockPruner, BlockPruningConfig, prune_one_shot
from pybsp.cli import metrics, models, tasks
from pybsp.cli.training import batches, by_length, encode, predict
from pybsp.pruning.one_shot import ERRORS


class Task:
    """A fine-tuned model, the texts of its task, and its hidden states."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data = tasks.load(arguments.task, arguments.data)
        outputs = self.data.task.outputs
        self.model, self.tokenizer = models.load_classifier(
            str(arguments.dense), outputs
        )
        self.model.eval()
        classes = not self.data.task.is_regression
        self.train, self.dev = (
            encode(self.tokenizer, split, 128, classes=classes)
            for split in (self.data.train, self.data.dev)
        )
        self.dense_states = self.states(self.model)

    def texts(self, count: int) -> list[dict[str, torch.Tensor]]:
        chosen = random.Random(0).sample(self.train, min(count, len(self.train)))
        chosen = [chosen[row] for row in by_length(chosen)]
        return list(batches(chosen, self.tokenizer))

    @torch.inference_mode()
    def states(self, model: Any) -> torch.Tensor:
        found = []
        for batch in batches(
            [self.dev[row] for row in by_length(self.dev)], self.tokenizer
        ):
            last = model(**batch, output_hidden_states=True).hidden_states[-1]
            found.append(last[batch["attention_mask"].bool()])
        return torch.cat(found)

    def row(self, model: Any, seconds: float, **how: Any) -> dict[str, Any]:
        logits = predict(model, self.dev, self.tokenizer)
        difference = self.states(model) - self.dense_states
        variance = self.dense_states.var(0).sum() * len(difference)
        row = {
            **how,
            **metrics.score(self.data.task.metrics, self.data.dev.labels, logits),
            "error": round(float(difference.square().sum() / variance), 4),
            "cpu_seconds": round(seconds, 1),
        }
        print(row, flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--texts", type=int, nargs="+", default=[512])
    parser.add_argument("--scope", nargs="+", default=["global"])
    parser.add_argument("--charged", nargs="+", choices=ERRORS, default=ERRORS[::-1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = Task(arguments)
    rows = [task.row(task.model, 0.0, cut="dense")]
    for sparsity in arguments.sparsity:
        for scope in arguments.scope:
            cfg = BlockPruningConfig(target_sparsity=sparsity, scope=scope)
            how = {"sparsity": sparsity, "scope": scope}
            model = copy.deepcopy(task.model)
            BlockPruner(model, cfg, total_steps=100).cut()
            rows.append(task.row(model, 0.0, cut="norm", **how))
            for count, error in itertools.product(arguments.texts, arguments.charged):
                model = copy.deepcopy(task.model)
                texts = task.texts(count)
                started = time.process_time()
                prune_one_shot(model, cfg, texts, error=error)
                seconds = time.process_time() - started
                how |= {"cut": "one shot", "texts": count, "charged": error}
                rows.append(task.row(model, seconds, **how))
    metric = task.data.task.metrics[0]
    record = {"task": arguments.task, "metric": metric, "rows": rows}
    result.save(f"accuracy/one_shot/{arguments.task}", record)


if __name__ == "__main__":
    main()
