"""What recovers accuracy at 80 %: the options of pruning, one by one.

all-MiniLM-L6-v2, fine-tuned on a GLUE task, is pruned with each of ``VARIANTS`` for the
same number of epochs, and evaluated once, at the end. One JSON a run in
``results/accuracy/recovery/``. Finished runs are skipped, interrupted ones resumed.

    python -m benchmarks.recovery --data DIR --runs DIR --task sst2 --variant hidden
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import result
from pybsp import (
    BlockPruningCallback,
    BlockPruningConfig,
    DistillationConfig,
    prune_one_shot,
)
from pybsp.cli import metrics, models, tasks
from pybsp.cli.training import (
    TRAINER_STATE,
    Features,
    Fit,
    batches,
    by_length,
    encode,
    fit,
    predict,
    turn_off_dropout,
)
from pybsp.integrations.trainer import STATE_NAME
from pybsp.nn import unpack_

#: Rows to train on and epochs, dense and pruned.
BUDGET = {"sst2": (16000, 2, 2), "stsb": (None, 3, 4), "mrpc": (None, 3, 8)}
#: Sentences whose hidden states the one-shot cut reconstructs.
CALIBRATION = 2048


@dataclass(frozen=True)
class Variant:
    """One way to prune. ``config`` and ``distillation`` change the defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    one_shot: bool = False
    dropout: bool = True
    learning_rate: float = 2e-4
    unlabelled: bool = False


RAMP: dict[str, Any] = {
    "ramp": "cubic", "phases": (0.0, 0.4, 0.6), "packed_retraining": True,
}  # fmt: skip
CUT_FIRST: dict[str, Any] = {
    "method": "magnitude", "phases": (0.0, 0.0, 1.0), "packed_retraining": True,
}  # fmt: skip
LOGITS: dict[str, Any] = {"hidden_states": 0.0}
ONE_SHOT = Variant(CUT_FIRST, one_shot=True, dropout=False)
VARIANTS = {
    "logits": Variant(RAMP, LOGITS),
    "hidden": Variant(RAMP),
    "no_dropout": Variant(RAMP, dropout=False),
    "taylor": Variant({**RAMP, "method": "magnitude", "saliency": "taylor"}, LOGITS),
    "taylor-hidden": Variant(
        {**RAMP, "method": "magnitude", "saliency": "taylor"}, dropout=False
    ),
    "movement": Variant(
        {**RAMP, "method": "magnitude", "saliency": "movement"}, LOGITS
    ),
    "oneshot-logits": replace(ONE_SHOT, distillation=LOGITS, dropout=True),
    "oneshot-dropout": replace(ONE_SHOT, dropout=True),
    "oneshot": ONE_SHOT,
    "oneshot-fast": replace(ONE_SHOT, learning_rate=5e-4),
    "oneshot-unlabelled": replace(ONE_SHOT, unlabelled=True),
}


class Run:
    """One variant on one task."""

    def __init__(self, arguments: argparse.Namespace, task: str, name: str) -> None:
        self.variant = VARIANTS[name]
        self.arguments = arguments
        rows, self.dense_epochs, self.epochs = BUDGET[task]
        if arguments.epochs:
            self.epochs = arguments.epochs
        self.whole = tasks.load(task, arguments.data)
        self.data = tasks.subsample(self.whole, rows, 0)
        self.dense = arguments.runs / f"{task}-dense"
        tail = f"-e{arguments.epochs:g}" if arguments.epochs else ""
        tail += f"-{arguments.sparsity:.0%}" if arguments.sparsity != 0.8 else ""
        self.name = f"{task}-{name}{tail}" + (
            f"-seed{arguments.seed}" if arguments.seed else ""
        )
        self.folder = arguments.runs / self.name
        self.config = BlockPruningConfig(
            target_sparsity=arguments.sparsity, **self.variant.config
        )
        self.distillation = DistillationConfig(
            **{"cache_bytes": 1 << 30, **self.variant.distillation}
        )

    def fine_tune(self) -> None:
        """The dense model that all variants of a task share."""
        outputs, folder = self.data.task.outputs, self.dense
        torch.manual_seed(0)
        model, tokenizer = models.load_classifier(models.resolve("minilm"), outputs)
        self.tokenizer = tokenizer
        fit(
            model, self.encode(self.data.train), tokenizer,
            Fit(self.dense_epochs, 1e-4, 16, seed=0, title=folder.name),
            folder.with_name(f"{folder.name}-run"),
        )  # fmt: skip
        models.name_labels(model, self.data.task.labels)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def load(self, source: Path) -> Any:
        return models.load_classifier(str(source), self.data.task.outputs)

    def encode(self, split: tasks.Split) -> Features:
        classes = not self.data.task.is_regression
        return encode(self.tokenizer, split, 128, classes=classes)

    def score(self, model: Any) -> dict[str, float]:
        logits = predict(model, self.encode(self.data.dev), self.tokenizer)
        return metrics.score(self.data.task.metrics, self.data.dev.labels, logits)

    def run(self) -> None:
        if not self.dense.exists():
            self.fine_tune()
        started = time.process_time()
        teacher, self.tokenizer = self.load(self.dense)
        scores = {"dense": self.score(teacher)}
        start = self.dense
        features = self.encode(self.data.train)
        if self.variant.one_shot:
            start = self.one_shot(features)
        model, _ = self.load(start)
        if self.variant.one_shot:
            scores["one_shot"] = self.score(model)
            print(scores, flush=True)
            unpack_(model)
        if not self.variant.dropout:
            turn_off_dropout(model)
        callback = BlockPruningCallback(
            self.config, teacher, distillation=self.distillation
        )
        warmup, regularise, _ = self.config.phases
        fit(
            model, self.training(features), self.tokenizer,
            Fit(self.epochs, self.variant.learning_rate, 16, self.arguments.seed,
                stable=warmup + regularise, title=self.name),
            self.folder / "run", callbacks=[callback],
            whole=(TRAINER_STATE, STATE_NAME),
        )  # fmt: skip
        scores["final"] = self.score(model)
        self.save(scores, time.process_time() - started)

    def one_shot(self, features: Features) -> Path:
        folder = self.folder / "start"
        if not folder.exists():
            model, _ = self.load(self.dense)
            prune_one_shot(model, self.config, self.texts(features))
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

    def texts(self, features: Features) -> Iterator[dict[str, torch.Tensor]]:
        """A sample of the training texts, without their labels."""
        picked = random.Random(0).sample(features, min(CALIBRATION, len(features)))
        rows = [picked[row] for row in by_length(picked)]
        return batches(rows, self.tokenizer)

    def training(self, features: Features) -> Features:
        if not self.variant.unlabelled:
            return features
        return [
            {name: value for name, value in example.items() if name != "labels"}
            for example in self.encode(self.whole.train)
        ]

    def save(self, scores: dict[str, Any], seconds: float) -> None:
        record = {
            "task": self.data.task.name,
            "metric": self.data.task.metrics[0],
            "config": self.config.to_dict(),
            "distillation": asdict(self.distillation),
            "variant": asdict(self.variant),
            "epochs": self.epochs,
            "calibration_texts": CALIBRATION if self.variant.one_shot else 0,
            "train_examples": len(self.data.train),
            "seed": self.arguments.seed,
            "scores": scores,
            "cpu_seconds": round(seconds),
        }
        result.save(f"accuracy/recovery/{self.name}", record)
        print(
            json.dumps({self.name: scores, "cpu_seconds": round(seconds)}), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--task", choices=BUDGET, required=True)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, required=True)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.variant:
        run = Run(arguments, arguments.task, name)
        if not (result.RESULTS / f"accuracy/recovery/{run.name}.json").exists():
            run.run()


if __name__ == "__main__":
    main()
