"""One pruning experiment from a pretrained model to a packed, measured checkpoint.

Stages, each recorded in the workspace when it is done: fine-tune dense; cut to a first
sparsity and train there, where there is to be more than one cut; prune and retrain in
one Trainer run, evaluating right after the cut; pack, reload, compare and time; write
the folder.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from ..integrations.distillation import DistillationConfig
from ..integrations.trainer import STATE_NAME, BlockPruningCallback
from ..nn import unpack_
from ..pruning import (
    BlockPruner,
    BlockPruningConfig,
    model_sparsity,
    prune_one_shot,
)
from . import environment, measurement, metrics, reporting
from .after_cut import AFTER_CUT, NORMS, WatchCut, record_norms
from .errors import WorkError
from .model_card import model_card
from .models import load_classifier, name_labels
from .recipe import Recipe, Subject
from .tasks import TaskData
from .training import (
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
from .workspace import RESULTS, Workspace, copy_folder, write_json

PICTURE = "kept_blocks.png"
HISTOGRAM = "block_norms.png"
#: Dev examples on which the packed model is compared with the dense one.
COMPARED = 256
#: Bytes for the teacher's outputs.
TEACHER_CACHE = 2 << 30


def first_cut_stage(sparsity: float) -> str:
    """The stage of a cut before the last one."""
    return f"first_cut_{100 * sparsity:g}"


class Experiment:
    """Runs the stages; ``run()`` returns what ``results.json`` holds."""

    def __init__(
        self,
        subject: Subject,
        data: TaskData,
        config: BlockPruningConfig,
        recipe: Recipe,
        workspace: Workspace,
        command: str,
    ) -> None:
        self.subject = subject
        self.data = data
        self.config = config
        self.recipe = recipe
        self.workspace = workspace
        self.command = command

    def run(self, save_dense: Path | None = None) -> dict[str, Any]:
        """All stages that are not done yet, then the finished folder."""
        dense = self.dense()
        if save_dense is not None:
            copy_folder(dense, save_dense)
        pruned = self.pruned(dense)
        measured = self.workspace.once("measure", lambda: self.measure(pruned, dense))
        results = self.results(measured)
        self.write(pruned, results)
        self.workspace.publish(pruned)
        return results

    # Stages

    def dense(self) -> Path:
        """Fine-tune, or take the given checkpoint; evaluates it either way."""
        folder = self.subject.dense or self.workspace.folder / "dense"

        def work() -> dict[str, Any]:
            started = time.perf_counter()
            torch.manual_seed(self.recipe.seed)
            model, tokenizer = self.subject.load()
            if self.subject.dense is None:
                self.check_config(model)
                fit(
                    model, self.encode(tokenizer, train=True), tokenizer,
                    self.fit_settings("dense"), self.workspace.folder / "dense_run",
                )  # fmt: skip
                name_labels(model, self.data.task.labels)
                self.save(model, tokenizer, "dense")
            return {
                "scores": self.score(model, tokenizer),
                "seconds": round(time.perf_counter() - started, 1),
            }

        self.workspace.once("dense", work)
        return folder

    def pruned(self, dense: Path) -> Path:
        """Prune and retrain; the folder holds the checkpoint, packed and dense."""
        folder = self.workspace.folder / "pruned"

        def work() -> dict[str, Any]:
            from ..integrations.save import save_packed

            started = time.perf_counter()
            model, tokenizer = load_classifier(str(dense), self.data.task.outputs)
            self.workspace.once(
                "magnitude_cut", lambda: self.magnitude_cut(model, tokenizer)
            )
            features = self.encode(tokenizer, train=True)
            for sparsity in self.recipe.first_cuts:
                model = self.first_cut(sparsity, model, tokenizer, features, dense)
            if self.recipe.reconstruct:
                model = self.reconstructed(
                    model, tokenizer, features, self.config, "reconstructed", AFTER_CUT
                )
            self.train(
                model, tokenizer, features, dense, self.config,
                self.fit_settings("pruning"), "pruning_run", watch=True,
            )  # fmt: skip
            model.add_model_tags(["pybsp", "block-sparse"])
            self.workspace.write_folder(
                "pruned",
                lambda part: (
                    save_packed(model, part),
                    tokenizer.save_pretrained(part),
                ),
            )
            return {
                "scores": self.score(model, tokenizer),
                "seconds": round(time.perf_counter() - started, 1),
                **reporting.counts(model_sparsity(model), self.config.target_sparsity),
            }

        self.workspace.once("pruned", work)
        return folder

    def magnitude_cut(self, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
        """Scores of the dense model cut by block norms alone, with no training."""
        cut = copy.deepcopy(model)
        by_norm = replace(self.config, saliency="magnitude")
        BlockPruner(cut, by_norm, total_steps=1000).cut()
        return {"scores": self.score(cut, tokenizer)}

    def measure(self, folder: Path, fine_tuned: Path) -> dict[str, Any]:
        """Reload packed, compare with the dense form and with the model before pruning,
        weigh and time."""
        outputs = self.data.task.outputs
        packed, tokenizer = load_classifier(str(folder), outputs)
        teacher, _ = load_classifier(str(fine_tuned), outputs)
        dense = copy.deepcopy(packed).dequantize()
        layers = self.workspace.stages["pruned"]["layers"]
        features = self.encode(tokenizer, train=False)
        compared = features[:COMPARED]
        agreement = measurement.agreement(
            predict(dense, compared, tokenizer),
            predict(packed, compared, tokenizer),
            [row["shape"][1] for row in layers],
        )
        if not agreement["agree"]:
            raise WorkError(
                "the packed model differs from the dense one by "
                f"{agreement['max_difference']:.3g}, more than "
                f"{agreement['tolerance']:.3g}"
            )
        return {
            "agreement": agreement,
            "scores": self.score(packed, tokenizer),
            "fidelity": measurement.fidelity(
                teacher, dense,
                batches([features[row] for row in by_length(features)], tokenizer),
            ),
            "files": measurement.file_sizes(folder, [row["name"] for row in layers]),
            "latency": measurement.latency(
                dense, packed, batch=1, sequence=self.recipe.sequence, threads=1,
                seconds=self.recipe.seconds, onnx=self.recipe.onnx,
            ),
            "architecture": type(packed).__name__,
        }  # fmt: skip

    # Parts

    def check_config(self, model: PreTrainedModel) -> None:
        """Refuse what cannot be pruned before hours of fine-tuning, not after."""
        BlockPruner(model, self.config, total_steps=1000)

    def encode(self, tokenizer: Any, *, train: bool) -> Features:
        split = self.data.train if train else self.data.dev
        classes = not self.data.task.is_regression
        return encode(tokenizer, split, self.recipe.max_length, classes=classes)

    def score(self, model: Any, tokenizer: Any) -> dict[str, float]:
        logits = predict(model, self.encode(tokenizer, train=False), tokenizer)
        return metrics.score(self.data.task.metrics, self.data.dev.labels, logits)

    def distillation(self, dense: Path) -> dict[str, Any]:
        """What the callback is told of the teacher."""
        recipe = self.recipe
        if not (recipe.distill or recipe.distill_hidden):
            return {}
        teacher, _ = load_classifier(str(dense), self.data.task.outputs)
        return {
            "teacher": teacher,
            "distillation": DistillationConfig(
                logits=recipe.distill,
                hidden_states=recipe.distill_hidden,
                cache_bytes=TEACHER_CACHE,
            ),
        }

    def first_cut(
        self,
        sparsity: float,
        model: PreTrainedModel,
        tokenizer: Any,
        features: Features,
        dense: Path,
    ) -> PreTrainedModel:
        """The model cut to ``sparsity``, which is not the last, and trained there."""
        percent, stage = f"{100 * sparsity:g}", first_cut_stage(sparsity)
        config = replace(self.config, target_sparsity=sparsity)

        def work() -> dict[str, Any]:
            cut = self.reconstructed(
                model, tokenizer, features, config, f"reconstructed_{percent}",
                f"{AFTER_CUT}_{percent}",
            )  # fmt: skip
            rate = self.recipe.learning_rate_after(sparsity)
            settings = replace(
                self.fit_settings("pruning"),
                epochs=self.recipe.epochs_after(sparsity),
                learning_rate=rate,
                title=f"training at {percent} %",
            )
            self.train(
                cut, tokenizer, features, dense, config, settings, f"{stage}_run"
            )
            self.save(cut, tokenizer, stage)
            return {
                "scores": self.score(cut, tokenizer),
                "sparsity": sparsity,
                "epochs": settings.epochs,
                "learning_rate": rate,
            }

        self.workspace.once(stage, work)
        return self.load(stage)

    def reconstructed(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        features: Features,
        config: BlockPruningConfig,
        name: str,
        stage: str,
    ) -> PreTrainedModel:
        """The model cut by reconstruction, and what it is worth before any training."""

        def work() -> dict[str, Any]:
            if "fine_tuned" not in self.workspace.stages.get(NORMS, {}):
                pruner = BlockPruner(model, config, total_steps=1000)
                record_norms(self.workspace, pruner, "fine_tuned")
            texts = self.calibration(features)
            prune_one_shot(
                model,
                config,
                batches(texts, tokenizer),
                error=self.recipe.error,
            )
            self.save(model, tokenizer, name)
            return {"scores": self.score(model, tokenizer), "step": 0}

        self.workspace.once(stage, work)
        return self.load(name)

    def train(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        features: Features,
        dense: Path,
        config: BlockPruningConfig,
        settings: Fit,
        folder: str,
        *,
        watch: bool = False,
    ) -> None:
        """A Trainer run that prunes to ``config``, or keeps what is pruned so."""
        pruning = BlockPruningCallback(
            config,
            **self.distillation(dense),
            restart_learning_rate=self.recipe.schedule == "restart",
        )
        callbacks: list[TrainerCallback] = [pruning]
        if watch:
            callbacks.append(
                WatchCut(pruning, self.workspace, lambda m: self.score(m, tokenizer))
            )
        if not self.recipe.dropout:
            turn_off_dropout(model)
        torch.manual_seed(self.recipe.seed)
        fit(
            model, features, tokenizer, settings, self.workspace.folder / folder,
            callbacks, whole=(TRAINER_STATE, STATE_NAME),
        )  # fmt: skip

    def save(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        """Keep a model that is between two stages."""
        self.workspace.write_folder(
            name,
            lambda part: (model.save_pretrained(part), tokenizer.save_pretrained(part)),
        )

    def load(self, name: str) -> PreTrainedModel:
        """What ``save`` kept, dense with zero blocks."""
        folder = self.workspace.folder / name
        model, _ = load_classifier(str(folder), self.data.task.outputs)
        unpack_(model)
        return model  # type: ignore[no-any-return]

    def calibration(self, features: Features) -> Features:
        """Training examples drawn at random, as many as have the tokens wanted."""
        texts: Features = []
        tokens = 0
        for example in random.Random(self.recipe.seed).sample(features, len(features)):
            if tokens >= self.recipe.calibration:
                break
            texts.append(example)
            tokens += len(example["input_ids"])
        return [texts[row] for row in by_length(texts)]

    def fit_settings(self, run: str) -> Fit:
        recipe = self.recipe
        is_dense = run == "dense"
        return Fit(
            epochs=(
                recipe.epochs_dense
                if is_dense
                else recipe.epochs_after(self.config.target_sparsity)
            ),
            learning_rate=(
                recipe.dense_learning_rate if is_dense else recipe.learning_rate
            ),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            stable=0.0 if is_dense else self.held(),
            checkpoints=recipe.checkpoints,
            bfloat16=is_dense and recipe.bfloat16,
            title="fine-tuning the dense model"
            if is_dense
            else "pruning and retraining",
        )

    def held(self) -> float:
        """The part of the pruning run that keeps its full learning rate."""
        warmup, regularise, retrain = self.config.phases
        if self.recipe.schedule == "restart":
            return 0.0
        return (warmup + regularise) / (warmup + regularise + retrain)

    def results(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Everything for ``results.json``, from the recorded stages."""
        stages, task = self.workspace.stages, self.data.task
        scores = {
            name: stages[stage]["scores"]
            for name, stage in (
                ("dense", "dense"),
                ("magnitude_cut", "magnitude_cut"),
                ("after_cut", AFTER_CUT),
                ("final", "pruned"),
                ("packed", "measure"),
            )
        }
        name = self.subject.name
        return {
            "format": 1,
            "title": f"{name}, {task.name}, {100 * self.config.target_sparsity:g} % "
            f"block-sparse ({' x '.join(map(str, self.config.block_shape))})",
            "command": self.command,
            "options": self.workspace.options,
            "config": self.config.to_dict(),
            "recipe": asdict(self.recipe),
            "environment": environment.describe(),
            "model": {"name": name, "architecture": measured["architecture"]},
            "task": {
                "name": task.name,
                "source": self.data.source,
                "metrics": list(task.metrics),
                "train_examples": len(self.data.train),
                "dev_examples": len(self.data.dev),
            },
            "metric": task.metrics[0],
            "scores": scores,
            "first_cuts": [
                stages[first_cut_stage(sparsity)] for sparsity in self.recipe.first_cuts
            ],
            "block_norms": stages[NORMS],
            "seconds": {
                "dense": stages["dense"]["seconds"],
                "pruning": stages["pruned"]["seconds"],
            },
            "sparsity": stages["pruned"]["sparsity"],
            **{
                key: measured[key]
                for key in ("files", "latency", "agreement", "fidelity")
                if key in measured  # older runs have no fidelity
            },
            "layers": stages["pruned"]["layers"],
        }

    def write(self, folder: Path, results: dict[str, Any]) -> None:
        """Pictures, card and numbers into the checkpoint's folder; results last."""
        model, _ = load_classifier(str(folder), self.data.task.outputs)
        shapes = {
            row["name"]: (row["block_shape"][0], row["block_shape"][1])
            for row in results["layers"]
        }
        kept = reporting.kept_blocks(model.dequantize(), shapes)
        reporting.save_kept_blocks(kept, folder / PICTURE, results["title"])
        reporting.save_norm_histograms(results["block_norms"], folder / HISTOGRAM)
        (folder / "README.md").write_text(model_card(results), encoding="utf-8")
        write_json(folder / RESULTS, results)
