"""A checkpoint that ``pybsp glue`` left, and what is made of it: other types, and more
training.

``benchmarks.quantization_accuracy`` and ``benchmarks.size`` share what they make, in
STUDY/forms: a folder for each run of the study, with a packed checkpoint, and its
logits, for each form.
"""

from __future__ import annotations

import copy
import random
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pybsp import (
    BlockPruningCallback,
    BlockPruningConfig,
    DistillationConfig,
    QuantizationCallback,
    pack_,
    save_packed,
)
from pybsp.cli import metrics, models, tasks
from pybsp.cli.errors import WorkError
from pybsp.cli.prune import SAMPLE_SEED
from pybsp.cli.study import Cell, read_results
from pybsp.cli.training import (
    TRAINER_STATE,
    Features,
    Fit,
    encode,
    fit,
    predict,
    turn_off_dropout,
)
from pybsp.cli.workspace import RESULTS, read_json, write_json
from pybsp.integrations.trainer import STATE_NAME
from pybsp.nn import unpack_

#: The form that the study left.
AS_PRUNED = "float32"
LEARNING_RATE = 5e-5
#: Rows of the training set that the study left out, where there are as many: more than
#: a development set has, for differences that are small.
UNSEEN = 8000
UNSEEN_METRIC = "accuracy, unseen rows"


class Studied:
    """The run ``cell`` of ``pybsp glue --out study``.

    ``scores`` of its forms lie in a file beside them, and are read back. ``WorkError``
    when the study has no such run, or the forms are those of another one.
    """

    def __init__(self, data: Path, study: Path, cell: Cell) -> None:
        self.cell = cell
        self.pruned_folder = study / "runs" / cell.name
        self.dense = study / "dense" / cell.dense
        self.folder = study / "forms" / cell.name
        if not (self.pruned_folder / RESULTS).is_file():
            raise WorkError(
                f"{study} has no finished run {cell.name}; make it with pybsp glue"
            )
        self.results = read_results(self.pruned_folder / RESULTS)
        options = self.results["options"]
        self.whole = tasks.load(cell.task, data)
        self.data = tasks.subsample(
            self.whole, options["max_train_samples"], SAMPLE_SEED
        )
        self.max_length: int = options["max_length"]
        self.batch_size: int = options["batch_size"]
        self.config = BlockPruningConfig(**self.results["config"])
        self.teacher, self.tokenizer = self.load(self.dense)
        self.file = self.folder / "scores.json"
        self.scores: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.scores = read_json(self.file)
        origin = {key: self.results[key] for key in ("options", "scores")}
        if self.scores.setdefault("origin", origin) != origin:
            raise WorkError(
                f"{self.folder} holds forms of an earlier run {cell.name}; remove it"
            )

    def load(self, source: Path) -> Any:
        return models.load_classifier(str(source), self.data.task.outputs)

    def packed(self, form: str) -> Path:
        return self.pruned_folder if form == AS_PRUNED else self.folder / form

    def pruned(self) -> Any:
        """The float32 model, dense with zero blocks."""
        model, _ = self.load(self.pruned_folder)
        return unpack_(model)

    def encode(self, split: tasks.Split) -> Features:
        classes = not self.data.task.is_regression
        return encode(self.tokenizer, split, self.max_length, classes=classes)

    @cached_property
    def splits(self) -> dict[str, tasks.Split]:
        """The development set, and rows of the training set that no run saw."""
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
                for name, split in self.splits.items()
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f"{form}.part.npz")
            np.savez(beside, **found)
            beside.replace(file)
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

    def train_on(self, epochs: float, *, aware: bool) -> Any:
        """The pruned model after more training of its kept blocks, in int8 if
        ``aware``."""
        model = self.pruned()
        turn_off_dropout(model)
        recipe = self.results["recipe"]
        callback = BlockPruningCallback(
            replace(self.config, packed_retraining=not aware),
            self.teacher,
            distillation=DistillationConfig(
                logits=recipe["distill"], hidden_states=recipe["distill_hidden"]
            ),
        )
        running = self.running("aware" if aware else "longer")
        fit(
            model, self.encode(self.data.train), self.tokenizer,
            Fit(epochs, LEARNING_RATE, self.batch_size, self.cell.seed, checkpoints=1,
                title=f"{self.cell.name} {running.name}"),
            running, callbacks=[callback] + [QuantizationCallback()] * aware,
            whole=(TRAINER_STATE, STATE_NAME),
        )  # fmt: skip
        return model

    def running(self, form: str) -> Path:
        """Where training writes its checkpoints."""
        return self.folder / f"{form}-run"

    def save_form(self, model: Any, form: str, dtype: str = "float32") -> None:
        """Pack a copy of ``model``, score and save it."""
        model = copy.deepcopy(model)
        pack_(model, dtype=dtype, min_gain=0)
        save_packed(model, self.packed(form))
        self.tokenizer.save_pretrained(self.packed(form))
        self.score(form, model)
        shutil.rmtree(self.running(form), ignore_errors=True)

    def score(self, form: str, model: Any = None) -> None:
        """Keep the scores of a form; without ``model`` it is loaded."""
        logits, splits = self.logits(form, model), self.splits
        task = self.data.task
        scores = metrics.score(task.metrics, splits["dev"].labels, logits["dev"])
        if "unseen" in splits:
            labels = splits["unseen"].labels
            found = metrics.score(("accuracy",), labels, logits["unseen"])
            scores[UNSEEN_METRIC] = found["accuracy"]
        self.keep(form, scores)

    def keep(self, form: str, scores: dict[str, Any]) -> None:
        self.scores[form] = scores
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.scores)


def examples(split: tasks.Split) -> list[tuple[tasks.Text, float]]:
    return list(zip(split.texts, split.labels, strict=True))
