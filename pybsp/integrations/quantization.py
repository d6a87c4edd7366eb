"""``QuantizationCallback``: int8 training inside the Hugging Face ``Trainer``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..pruning.config import BlockPruningConfig
from ..pruning.pruner import pruner_of
from ..pruning.schedule import PruningSchedule
from ..quantization import QuantizationAwareTraining
from .trainer import BlockPruningCallback, calling_trainer, forget_best

logger = logging.getLogger(__name__)


class QuantizationCallback(TrainerCallback):
    """``Trainer(..., callbacks=[QuantizationCallback()])`` trains for int8.

    Alone, or beside a ``BlockPruningCallback``: then it takes the layers that are
    pruned and begins when they have been cut. The number of steps tells when to begin,
    so a run resumes from any of its checkpoints. A checkpoint from before that never
    becomes the best one. At the end the weights hold their int8 values.

    Args:
        start: share of the training that comes before, ``0 <= start < 1``. By default
            the cut of the pruning callback, else 0.
        modules: layers, as in ``QuantizationAwareTraining``; by default those that the
            pruning callback prunes.
        input_scales: as in ``QuantizationAwareTraining``.

    Raises:
        ValueError: for a ``start`` outside its bounds; and when training begins, for
            what ``QuantizationAwareTraining`` refuses, or ``packed_retraining``.
    """

    def __init__(
        self,
        *,
        start: float | None = None,
        modules: str | Sequence[str] | None = None,
        input_scales: Mapping[str, float] | None = None,
    ) -> None:
        if start is not None and not 0 <= start < 1:
            raise ValueError(
                f"0 <= start < 1 must hold; got {start!r}; the last fifth of the "
                "training is written as the fraction 0.8"
            )
        self.start = start
        self.modules = modules
        self.input_scales = input_scales
        self.training: QuantizationAwareTraining | None = None
        self._first_step = 0

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Forget an earlier ``train()`` that did not come to its end."""
        if self.training is not None:
            self.training.remove()
            self.training = None

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Begin when it is time."""
        if self.training is None:  # by now a pruning callback has done its part
            pruner = pruner_of(kwargs["optimizer"])
            cfg = None if pruner is None else pruner.cfg
            self.training = self._prepare(kwargs["model"], cfg, state)
        if state.global_step >= self._first_step:
            self.training.begin()
        self._gate_best(state)

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """A checkpoint from before the beginning is not the best one."""
        self._gate_best(state)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Move the weights to their int8 values."""
        training, self.training = self.training, None
        if training is None:  # no step ran: the checkpoint was that of the last one
            training = self._prepare(kwargs["model"], _finished_pruning(), state)
            if state.global_step >= self._first_step:
                training.begin()
        if training.active:
            training.finalize()
        else:
            logger.warning(
                "training stopped at step %d, before int8 training begins at step %d: "
                "the model is as it is in float32",
                state.global_step,
                self._first_step,
            )

    def _prepare(
        self, model: Any, pruning: BlockPruningConfig | None, state: TrainerState
    ) -> QuantizationAwareTraining:
        if pruning is not None and pruning.packed_retraining:
            raise ValueError(
                "packed_retraining exchanges the layers that int8 training changes; "
                "turn one of them off"
            )
        if self.start is not None:
            self._first_step = round(self.start * state.max_steps)
        elif pruning is not None:
            schedule = PruningSchedule.from_config(pruning, state.max_steps)
            self._first_step = schedule.cut_step
        else:
            self._first_step = 0
        cfg = pruning if self.modules is None else None
        return QuantizationAwareTraining(
            model,
            modules=cfg.target_modules if cfg else self.modules or "all-linear",
            exclude_modules=cfg.exclude_modules if cfg else None,
            input_scales=self.input_scales,
        )

    def _gate_best(self, state: TrainerState) -> None:
        if self.training is not None and not self.training.active:
            forget_best(state)


def _finished_pruning() -> BlockPruningConfig | None:
    """Of the pruning callback beside this one, whose pruner is gone at the end."""
    trainer = calling_trainer()
    beside = [] if trainer is None else trainer.callback_handler.callbacks
    found = (one.cfg for one in beside if isinstance(one, BlockPruningCallback))
    return next(found, None)
