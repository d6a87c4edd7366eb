"""A pruned model in a few minutes: cut by reconstruction, then a short masked training.

``benchmarks.quantization_accuracy`` and ``benchmarks.size`` share these runs. The
dense model is RUNS/<task>-dense, one for all seeds, as ``benchmarks.recovery`` makes
it. A seed draws its own calibration texts and its own order of the training rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.recovery import Run
from pybsp import BlockPruningCallback, QuantizationCallback, pack_, save_packed
from pybsp.cli import metrics, tasks
from pybsp.cli.training import (
    TRAINER_STATE,
    Features,
    Fit,
    batches,
    by_length,
    fit,
    predict,
    turn_off_dropout,
)
from pybsp.integrations.trainer import STATE_NAME
from pybsp.nn import unpack_

#: Epochs of training after the cut, and of training on in float32 or int8.
EPOCHS = {"mrpc": (2.0, 0.5), "stsb": (1.0, 0.5), "sst2": (0.25, 0.125)}
LEARNING_RATE, LEARNING_RATE_ON = 2e-4, 5e-5
#: Texts that the cut reconstructs.
CALIBRATION = 1024
#: Training rows that no run sees, where not all are trained on: more than a development
#: set has, for differences that are small.
UNSEEN = 8000
UNSEEN_METRIC = "accuracy, unseen rows"


class OneShotTraining(Run):
    """One task, sparsity, block shape and seed; ``scores`` lie in a file beside it."""

    def __init__(
        self, data: Path, runs: Path, task: str, sparsity: float = 0.8,
        block_shape: tuple[int, int] = (8, 1), seed: int = 0,
    ) -> None:  # fmt: skip
        # A dense model in the packed format needs no cut, and there is none to nothing.
        options = argparse.Namespace(
            data=data, runs=runs, sparsity=sparsity or 0.5, seed=seed, epochs=None
        )
        super().__init__(options, task, "oneshot")
        self.config = replace(self.config, block_shape=block_shape)
        rows, columns = block_shape
        self.name = f"{task}-{sparsity:.0%}-{rows}x{columns}-seed{seed}"
        self.folder = runs / self.name
        self.seed = seed
        self.epochs, self.epochs_on = EPOCHS[task]
        self.file = runs / f"{self.name}.json"
        self.scores: dict[str, dict[str, float]] = {}
        if self.file.exists():
            self.scores = json.loads(self.file.read_text(encoding="utf-8"))
        if not self.dense.exists():
            self.fine_tune()
        self.teacher, self.tokenizer = self.load(self.dense)

    def texts(self, features: Features) -> Iterator[dict[str, torch.Tensor]]:
        picked = random.Random(self.seed).sample(
            features, min(CALIBRATION, len(features))
        )
        return batches([picked[row] for row in by_length(picked)], self.tokenizer)

    def splits(self) -> dict[str, tasks.Split]:
        """The development set, and rows of the training set that are left out of
        ``data``, if there are."""
        found = {"dev": self.data.dev}
        seen, every = set(examples(self.data.train)), examples(self.whole.train)
        rest = [example for example in every if example not in seen]
        if len(rest) >= UNSEEN:
            texts, labels = zip(*random.Random(0).sample(rest, UNSEEN), strict=True)
            found["unseen"] = tasks.Split(list(texts), list(labels))
        return found

    def logits(self, form: str, model: Any = None) -> dict[str, NDArray[np.float32]]:
        """Of the packed model, by split; without ``model`` those that were saved."""
        file = self.folder / f"{form}.npz"
        if model is not None or not file.exists():
            model = self.load(self.packed(form))[0] if model is None else model
            found = {
                name: predict(model, self.encode(split), self.tokenizer)
                for name, split in self.splits().items()
            }
            np.savez(file, **found)
        return dict(np.load(file))

    def changed(self, form: str, other: str) -> dict[str, int]:
        """How many examples of each split the two forms put into different classes."""
        if self.data.task.is_regression:
            return {}
        ours, theirs = self.logits(form), self.logits(other)
        return {
            name: int((ours[name].argmax(1) != theirs[name].argmax(1)).sum())
            for name in ours
        }

    def prune(self) -> None:
        """The float32 checkpoint in ``packed``, scored there and on its way."""
        if "float32" in self.scores:
            return
        self.keep("dense", self.score(self.teacher))
        model, _ = self.load(self.one_shot(self.encode(self.data.train)))
        self.keep("cut", self.score(model))
        unpack_(model)
        self.train(model, "float32", self.epochs, LEARNING_RATE)
        self.save_form(model, "float32")

    def pruned(self) -> Any:
        """The float32 model, dense with zero blocks."""
        model, _ = self.load(self.packed("float32"))
        return unpack_(model)

    def packed(self, form: str) -> Path:
        return self.folder / form

    def running(self, form: str) -> Path:
        return self.folder / f"{form}-run"

    def train(self, model: Any, form: str, epochs: float, learning_rate: float) -> None:
        """Train the kept blocks, in int8 if ``form`` is ``aware``."""
        turn_off_dropout(model)
        aware = form == "aware"
        config = replace(self.config, packed_retraining=not aware)
        callbacks: list[Any] = [
            BlockPruningCallback(config, self.teacher, distillation=self.distillation)
        ]
        fit(
            model, self.encode(self.data.train), self.tokenizer,
            Fit(epochs, learning_rate, 16, self.seed, checkpoints=1,
                title=f"{self.name} {form}"),
            self.running(form), callbacks=callbacks + [QuantizationCallback()] * aware,
            whole=(TRAINER_STATE, STATE_NAME),
        )  # fmt: skip

    def train_on(self, form: str) -> Any:
        """The float32 model after more training, with ``form`` as for ``train``."""
        model = self.pruned()
        self.train(model, form, self.epochs_on, LEARNING_RATE_ON)
        return model

    def save_form(self, model: Any, form: str, dtype: str = "float32") -> None:
        """Pack a copy of ``model``, score and save it."""
        model = copy.deepcopy(model)
        pack_(model, dtype=dtype, min_gain=0)
        save_packed(model, self.packed(form))
        self.tokenizer.save_pretrained(self.packed(form))
        logits, splits = self.logits(form, model), self.splits()
        task = self.data.task
        scores = metrics.score(task.metrics, splits["dev"].labels, logits["dev"])
        if "unseen" in splits:
            labels = splits["unseen"].labels
            found = metrics.score(("accuracy",), labels, logits["unseen"])
            scores[UNSEEN_METRIC] = found["accuracy"]
        self.keep(form, scores)
        shutil.rmtree(self.running(form), ignore_errors=True)

    def keep(self, form: str, scores: dict[str, float]) -> None:
        self.scores[form] = scores
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(self.scores, indent=1), encoding="utf-8")
        beside.replace(self.file)


def examples(split: tasks.Split) -> list[tuple[tasks.Text, float]]:
    return list(zip(split.texts, split.labels, strict=True))
