"""Accuracy of all-MiniLM-L6-v2 at 80 % in int8, against its own float32 form.

For every task and seed ``pybsp prune`` makes the float32 checkpoint. Its int8 forms:
quantised as it is (``post_training``), and trained in int8 for some more epochs
(``aware``), beside the same epochs in float32 (``longer``), since training on helps by
itself. All learn from the dense model's outputs too. Scores are those of the whole
development set after the last step; int8 layers compute as the int8 product does, in
torch. Finished parts are skipped and interrupted ones resumed.

    python -m benchmarks.quantization_accuracy --data DIR --runs DIR --task sst2
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from pybsp.cli.distillation import DistillingTrainer, add_teacher_logits
from rich.table import Table
from transformers import TrainerCallback

from benchmarks import PYBSP, result
from benchmarks.accuracy import METHOD
from benchmarks.section import console
from pybsp import QuantizationAwareTraining, QuantizationCallback, preserve_sparsity
from pybsp.cli import glue, metrics
from pybsp.cli.models import load_classifier, quiet
from pybsp.cli.timing import torch_threads
from pybsp.cli.training import Fit, encode, fit, predict

#: Epochs of the dense model and of pruning, epochs in int8 after it, training rows.
BUDGET = {
    "mrpc": (4, 10, 3, None),
    "stsb": (4, 8, 2, None),
    "sst2": (2, 3, 1, 16000),
}
FORMS = ("post_training", "longer", "aware")
LEARNING_RATE, BATCH, DISTILL, LENGTH = 5e-5, 16, 0.5, 128


class Preserve(TrainerCallback):
    """Keeps the zero blocks while the control trains on in float32."""

    def on_train_begin(self, *_event: Any, **details: Any) -> None:
        self.kept = preserve_sparsity(details["model"], details["optimizer"])

    def on_train_end(self, *_event: Any, **_details: Any) -> None:
        self.kept.remove()


class Run:
    """One task and seed; ``scores`` lie in a JSON file beside the checkpoints."""

    def __init__(self, arguments: argparse.Namespace, task: str, seed: int) -> None:
        self.arguments, self.seed = arguments, seed
        self.name = f"{task}-80%-8x1-seed{seed}"
        self.folder = arguments.runs / self.name
        self.file = arguments.runs / f"{self.name}.json"
        self.epochs_dense, self.epochs, self.epochs_int8, rows = BUDGET[task]
        self.rows = arguments.rows or rows
        self.data = glue.subsample(glue.load(task, arguments.data), self.rows, seed)
        self.scores: dict[str, Any] = {}
        if self.file.exists():
            self.scores = json.loads(self.file.read_text(encoding="utf-8"))

    def complete(self) -> dict[str, Any]:
        self.prune()
        for form in FORMS:
            if form not in self.scores:
                self.keep(form, self.score(getattr(self, form)()))
        return self.scores

    def prune(self) -> None:
        if "float32" in self.scores:
            return
        task = self.data.task.name
        options = ["prune", "--model", "minilm", "--task", task, "--resume", "--json",
                   "--data", str(self.arguments.data), "--out", str(self.folder),
                   "--threads", str(self.arguments.threads), "--seed", str(self.seed),
                   "--sparsity", "0.8", "--block-shape", "8,1",
                   "--epochs", str(self.epochs), *METHOD]  # fmt: skip
        if self.dense.exists():
            options += ["--dense-checkpoint", str(self.dense)]
        else:
            options += ["--epochs-dense", str(self.epochs_dense),
                        "--save-dense", str(self.dense)]  # fmt: skip
        if self.rows:
            options += ["--max-train-samples", str(self.rows)]
        subprocess.run([PYBSP, *options], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        self.keep("dense", found["scores"]["dense"])
        self.keep("float32", found["scores"]["packed"])

    @property
    def dense(self) -> Path:
        return self.folder.with_name(f"{self.name}-dense")

    def load(self) -> tuple[Any, Any]:
        """The pruned model, dense with zero blocks."""
        outputs = self.data.task.outputs
        model, tokenizer = load_classifier(str(self.folder), outputs)
        if getattr(model, "is_quantized", False):
            model = model.dequantize()
        return model, tokenizer

    def score(self, model_and_tokenizer: tuple[Any, Any]) -> dict[str, float]:
        model, tokenizer = model_and_tokenizer
        features = self.encode(tokenizer, self.data.dev)
        logits = predict(model, features, tokenizer)
        return metrics.score(self.data.task.metrics, self.data.dev.labels, logits)

    def encode(self, tokenizer: Any, split: glue.Split) -> list[dict[str, Any]]:
        classes = not self.data.task.is_regression
        return encode(tokenizer, split, LENGTH, classes=classes)

    def post_training(self) -> tuple[Any, Any]:
        model, tokenizer = self.load()
        return in_int8(model), tokenizer

    def longer(self) -> tuple[Any, Any]:
        return self.train_on("longer", Preserve())

    def aware(self) -> tuple[Any, Any]:
        model, tokenizer = self.train_on("aware", QuantizationCallback())
        return in_int8(model), tokenizer

    def train_on(self, form: str, callback: TrainerCallback) -> tuple[Any, Any]:
        model, tokenizer = self.load()
        teacher, _ = load_classifier(str(self.dense), self.data.task.outputs)
        features = self.encode(tokenizer, self.data.train)
        settings = Fit(
            epochs=self.epochs_int8, learning_rate=LEARNING_RATE, batch_size=BATCH,
            seed=self.seed, checkpoints=3, title=f"{self.name} {form}",
        )  # fmt: skip
        torch.manual_seed(self.seed)
        fit(
            model, add_teacher_logits(features, teacher, tokenizer), tokenizer,
            settings, self.folder.with_name(f"{self.name}-{form}"),
            callbacks=[callback], trainer_class=DistillingTrainer, weight=DISTILL,
        )  # fmt: skip
        return model, tokenizer

    def keep(self, form: str, scores: dict[str, float]) -> None:
        self.scores[form] = scores
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(self.scores, indent=1), encoding="utf-8")
        beside.replace(self.file)


def in_int8(model: Any) -> Any:
    """A copy whose encoder computes in int8."""
    model = copy.deepcopy(model)
    QuantizationAwareTraining(model).begin()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--task", nargs="+", choices=BUDGET, default=list(BUDGET))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--rows", type=int, help="training rows, fewer than usual: nothing is saved"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    quiet()
    table = Table("run", "dense", "float32", *FORMS)
    with torch_threads(arguments.threads):
        for task in arguments.task:
            metric = glue.find_task(task).metrics[0]
            for seed in arguments.seeds:
                run = Run(arguments, task, seed)
                scores = run.complete()
                if arguments.rows is None:
                    result.save(
                        f"quantization_accuracy/{run.name}",
                        {"metric": metric, "rows": len(run.data.train),
                         "epochs": list(BUDGET[task][:3]), "scores": scores},
                    )  # fmt: skip
                figures = [scores[key][metric] for key in ("dense", "float32", *FORMS)]
                table.add_row(run.name, *(f"{100 * value:.2f}" for value in figures))
    console().print(table)


if __name__ == "__main__":
    main()
