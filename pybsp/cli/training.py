"""Fine-tuning and prediction with the Hugging Face Trainer, quiet and resumable."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from .errors import WorkError
from .tasks import Split

Features: TypeAlias = list[dict[str, Any]]
TRAINER_STATE = "trainer_state.json"
#: Batches whose examples are sorted by length together.
BATCHES_SORTED = 50


@dataclass(frozen=True)
class Fit:
    """One Trainer run: its length, learning rate and bookkeeping.

    ``stable`` is the fraction of the run that keeps the full learning rate before it
    falls to zero; 0 is the usual linear decay. With ``bfloat16`` the products are taken
    in it and everything else stays float32 (automatic mixed precision).
    """

    epochs: float
    learning_rate: float
    batch_size: int
    seed: int
    stable: float = 0.0
    warmup: float = 0.06
    checkpoints: int = 6
    bfloat16: bool = False
    title: str = "training"


@dataclass
class ProgressBar(TrainerCallback):
    """A bar on stderr; a line every half minute when that is no terminal."""

    title: str
    bar: Any = field(default=None, init=False)

    def on_train_begin(self, *event: Any, **_details: Any) -> None:
        state = event[1]
        self.bar = progress(total=state.max_steps, title=self.title)
        self.bar.update(state.global_step)

    def on_step_end(self, *event: Any, **_details: Any) -> None:
        state = event[1]
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, *_event: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, *_event: Any, **_details: Any) -> None:
        self.bar.close()


def progress(total: int, title: str) -> Any:
    """A tqdm bar on stderr that does not flood a log file."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, desc=title, file=sys.stderr, mininterval=interval,
        maxinterval=60.0, dynamic_ncols=sys.stderr.isatty(), leave=True,
    )  # fmt: skip


def encode(
    tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int, *, classes: bool
) -> Features:
    """Token ids of every example, unpadded, with its label under ``labels``."""
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    names = list(encoded.keys())
    return [
        {name: encoded[name][row] for name in names}
        | {"labels": int(label) if classes else float(label)}
        for row, label in enumerate(split.labels)
    ]


def predict(
    model: torch.nn.Module,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Logits ``(examples, outputs)`` in the order of ``features``.

    Batches hold examples of like length. The mode of ``model`` is restored.
    """
    order = by_length(features)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for batch in batches([features[row] for row in order], tokenizer, batch_size):
            inputs = {name: value.to(device) for name, value in batch.items()}
            logits = model(**inputs).logits
            found.append(logits.float().cpu().numpy())
    model.train(was_training)
    logits = np.concatenate(found)
    in_order = np.empty_like(logits)
    in_order[order] = logits
    return in_order


def turn_off_dropout(model: torch.nn.Module) -> None:
    """For this object: what is saved of it keeps its settings."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def by_length(features: Features) -> list[int]:
    """Numbers of the examples, short ones first."""
    return sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))


def batches(
    features: Features, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> Iterator[dict[str, torch.Tensor]]:
    """Padded inputs of the model, without labels, in the order of ``features``."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(features), batch_size):
        examples = features[start : start + batch_size]
        yield dict(
            collate([{k: v for k, v in e.items() if k != "labels"} for e in examples])
        )


class LikeLengths(Sampler[int]):
    """Examples in random order, but for this: every batch holds examples of like
    length, so that little is padding.

    The order of the batches is random too. That of the Trainer's own sampler is not: it
    goes from long examples to short ones, fifty batches at a time, and where length
    tells of the label that costs accuracy.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self.seed}, epoch {self.epoch}")
        order = chance.sample(range(len(self.lengths)), len(self.lengths))
        found = []
        for group in _pieces(order, self.batch_size * BATCHES_SORTED):
            group.sort(key=self.lengths.__getitem__)
            found += _pieces(group, self.batch_size)
        # the loader cuts at multiples of the batch size: what is short comes last
        rest = [found.pop()] if len(found[-1]) < self.batch_size else []
        chance.shuffle(found)
        for batch in found + rest:
            yield from batch


def _pieces(whole: list[int], size: int) -> list[list[int]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


class LengthTrainer(Trainer):
    """A Trainer whose batches are those of ``LikeLengths``."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengths:
        features: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(example["input_ids"]) for example in features]
        return LikeLengths(lengths, self.args.train_batch_size, self.args.seed)


def fit(
    model: PreTrainedModel,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    settings: Fit,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    whole: Sequence[str] = (TRAINER_STATE,),
) -> None:
    """Train ``model`` in place, from the newest whole checkpoint in ``folder`` if any.

    A checkpoint is whole when it has every file in ``whole``.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=0.01,
        warmup_steps=settings.warmup,
        logging_steps=20,
        save_strategy="steps" if settings.checkpoints else "no",
        save_steps=1 / (settings.checkpoints + 1),
        save_total_limit=2,
        bf16=settings.bfloat16,
        use_cpu=settings.bfloat16 and not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **_schedule(settings, len(features)),
    )
    trainer = LengthTrainer(
        model=model,
        args=arguments,
        train_dataset=features,  # type: ignore[arg-type, unused-ignore]
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[*callbacks, ProgressBar(settings.title)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder, whole))
    # without what mixed precision put around its forward
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    check_finite(model.named_parameters())


def last_checkpoint(folder: Path, whole: Sequence[str]) -> str | None:
    """The newest checkpoint that has every file in ``whole``; newer ones are removed.

    These files are written last: without them the run was stopped in between.
    """
    while folder.is_dir():
        found = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
        if found is None:
            break
        if all((Path(found) / name).is_file() for name in whole):
            return str(found)
        shutil.rmtree(found)
    return None


def check_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            raise WorkError(
                f"training diverged: {name} holds NaN or infinite values; "
                "use a lower --lr"
            )


def _schedule(settings: Fit, examples: int) -> dict[str, Any]:
    if not settings.stable:
        return {"lr_scheduler_type": "linear"}
    steps_an_epoch = -(-examples // settings.batch_size)
    steps = max(1, round(steps_an_epoch * settings.epochs))
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {
            "num_decay_steps": max(1, round(steps * (1 - settings.stable))),
            "decay_type": "linear",
        },
    }
