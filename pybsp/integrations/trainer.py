"""``BlockPruningCallback``: block pruning inside the Hugging Face ``Trainer``.

The penalty and the masks act through hooks on the optimizer, so gradient accumulation,
mixed precision and clipping stay the Trainer's. What remains here is the Trainer's
book-keeping: run length, logs, checkpoints and which of them may become the best.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import Trainer
from transformers.training_args import TrainingArguments

from ..pruning import BlockPruner, BlockPruningConfig
from ..pruning.schedule import PruningSchedule
from ..pruning.state import load_state, save_state
from .distillation import DistillationConfig, Distiller

logger = logging.getLogger(__name__)

STATE_NAME = "pybsp_state.safetensors"


class BlockPruningCallback(TrainerCallback):
    """``Trainer(..., callbacks=[BlockPruningCallback(cfg)])`` prunes while it trains.

    The run's length is the Trainer's ``max_steps``. ``pybsp/...`` numbers join the
    training logs; the pruner's state joins every checkpoint and is read back on resume;
    a checkpoint from before the cut never becomes the best one; at the end the model
    carries its block shapes and saves with them.

    Args:
        cfg: what to prune.
        teacher: the dense fine-tuned model; its outputs join the loss of every training
            step, see ``distillation``. It is never trained.
        distillation: how much the model learns from the teacher; the defaults of
            ``DistillationConfig`` when it is None.
        restart_learning_rate: play the learning-rate schedule once up to the cut and
            once more for the masked retrain, as separate runs would (Li et al. 2020).
            By default it spans the run, so the retrain phase has its low end. Needs a
            schedule that is a function of the step (any of the Trainer's own but
            ``reduce_lr_on_plateau`` and ``greedy``).
        resume_from: checkpoint folder with the pruner's state, when the Trainer
            resumes from a place that it does not tell.

    Raises:
        TypeError: for a ``cfg`` that is not a ``BlockPruningConfig``.
        ValueError: for ``distillation`` without a teacher; and when training begins,
            for what ``BlockPruner`` and ``Distiller`` refuse, a teacher beside a loss
            of the Trainer's own, ``packed_retraining`` beside ``torch_compile``,
            DeepSpeed, FSDP, a second callback, a learning-rate schedule that cannot
            restart, or a resume without the pruner's state. The model is as it was
            then.
    """

    def __init__(
        self,
        cfg: BlockPruningConfig,
        teacher: nn.Module | None = None,
        *,
        distillation: DistillationConfig | None = None,
        restart_learning_rate: bool = False,
        resume_from: str | Path | None = None,
    ) -> None:
        if distillation is not None and teacher is None:
            raise ValueError(
                "distillation needs a teacher; pass the dense fine-tuned model as "
                "teacher="
            )
        if not isinstance(cfg, BlockPruningConfig):
            raise TypeError(
                f"cfg must be a BlockPruningConfig; got {type(cfg).__name__}"
            )
        self.cfg = cfg
        self.teacher = teacher
        self.distillation = distillation
        self.restart_learning_rate = restart_learning_rate
        self.resume_from = resume_from
        self.pruner: BlockPruner | None = None
        self._distiller: Distiller | None = None
        self._restore_schedule: Callable[[], None] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Build the pruner for this run and hook the optimizer."""
        if args.deepspeed or args.fsdp:
            raise ValueError(
                "block pruning needs whole weight matrices on every process; turn off "
                f"{'DeepSpeed' if args.deepspeed else 'FSDP'}, or use "
                "DistributedDataParallel"
            )
        if self.cfg.packed_retraining and args.torch_compile:
            raise ValueError(
                "packed_retraining exchanges layers while the model trains, which "
                "torch_compile does not expect; turn one of them off"
            )
        trainer = calling_trainer()
        self._check_loss(args, trainer)
        self.detach()  # from an earlier train() that did not come to its end
        pruner = BlockPruner(kwargs["model"], self.cfg, total_steps=state.max_steps)
        if state.global_step > 0:
            path = self._state_path(args, state, trainer)
            pruner.load_state_dict(load_state(path))
        self.pruner = pruner
        try:
            if self.teacher is not None:
                teacher = self.teacher.to(args.device)
                self._distiller = Distiller(kwargs["model"], teacher, self.distillation)
            if self.restart_learning_rate:
                scheduler = kwargs["lr_scheduler"]
                self._restore_schedule = _play_twice(scheduler, pruner.schedule)
            pruner.attach(kwargs["optimizer"])  # last: it may cut
        except BaseException:
            self.detach()
            raise
        if trainer is not None:
            # Reporters come before user callbacks, so keys added in on_log would not
            # reach them from there.
            callbacks = trainer.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Forget a best checkpoint from before the cut."""
        self._gate_best(state)

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Add the pruner's numbers to the training logs."""
        if self.pruner is None or logs is None or "loss" not in logs:
            return
        metrics = self.pruner.metrics()
        logs.update(metrics)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(metrics)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Put the pruner's state into the checkpoint that was just written."""
        self._gate_best(state)
        if self.pruner is None or not args.should_save:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            save_state(self.pruner.state_dict(), folder / STATE_NAME)
        else:  # a hyper-parameter search saves elsewhere
            logger.warning("no %s: pruning cannot resume from this checkpoint", folder)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Check the target and record the block shapes on the model."""
        pruner, self.pruner = self.pruner, None
        self.detach()
        if pruner is None:
            return
        if not pruner.at_target:
            if state.global_step < state.max_steps:
                pruner.detach()
                logger.warning(
                    "training stopped at step %d, before the cut at step %d: the model "
                    "is not pruned",
                    state.global_step,
                    pruner.schedule.cut_step,
                )
                return
            # steps that a gradient scaler skipped left the cut ahead of the last one
            pruner.cut()
        pruner.finalize()

    def detach(self) -> None:
        """End what a ``train()`` that was interrupted left; a second call does nothing.

        The model returns its own loss and packed layers are dense. What was cut is zero
        and is not kept so: ``preserve_sparsity`` does that.
        """
        if self._restore_schedule is not None:
            self._restore_schedule()
            self._restore_schedule = None
        if self._distiller is not None:
            self._distiller.remove()
            self._distiller = None
        if self.pruner is not None:
            self.pruner.detach()
            self.pruner = None

    def _check_loss(self, args: TrainingArguments, trainer: Trainer | None) -> None:
        """``ValueError`` when the Trainer would not use the loss the model returns."""
        if self.teacher is None:
            return
        custom = getattr(trainer, "compute_loss_func", None) is not None
        if args.label_smoothing_factor or custom or args.torch_compile:
            name = "torch_compile" if args.torch_compile else "label_smoothing_factor"
            raise ValueError(
                "a teacher acts through the loss that the model returns; turn off "
                f"{'compute_loss_func' if custom else name}, or distil without it"
            )

    def _gate_best(self, state: TrainerState) -> None:
        if self.pruner is not None and not self.pruner.at_target:
            forget_best(state)

    def _state_path(
        self, args: TrainingArguments, state: TrainerState, trainer: Trainer | None
    ) -> Path:
        resumed = _resumed_folder() if trainer is not None else None
        folders = [self.resume_from, resumed, args.resume_from_checkpoint]
        folders.append(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")
        for folder in folders:
            if isinstance(folder, (str, Path)) and (Path(folder) / STATE_NAME).exists():
                return Path(folder) / STATE_NAME
        tried = next(str(f) for f in folders if isinstance(f, (str, Path)))
        raise ValueError(
            f"cannot resume pruning at step {state.global_step}: no {STATE_NAME} in "
            f"'{tried}'; resume from a checkpoint that was written with this callback "
            "(resume_from= names its folder), or start from its weights with a new run"
        )


def forget_best(state: TrainerState) -> None:
    """The best checkpoint so far was of a model that is not what is trained for."""
    state.best_metric = None
    state.best_global_step = None
    state.best_model_checkpoint = None


def calling_trainer() -> Trainer | None:
    """The Trainer that is calling this callback, if it can be found.

    Callback events carry neither the Trainer nor the folder it resumes from, so both
    are looked up in the calling frames. Without them logs miss the reporters and
    ``resume_from`` is needed for folders outside ``output_dir``.
    """
    return next((owner for owner, _ in _trainer_frames()), None)


def _resumed_folder() -> str | None:
    for _, variables in _trainer_frames():
        folder = variables.get("resume_from_checkpoint")
        if isinstance(folder, str):
            return folder
    return None


def _trainer_frames() -> Iterator[tuple[Trainer, dict[str, Any]]]:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            yield owner, dict(frame.f_locals)


def _play_twice(scheduler: Any, schedule: PruningSchedule) -> Callable[[], None]:
    """Let the schedule run up to the cut and again after it; returns the undo."""
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            "restart_learning_rate needs a schedule that is a function of the step; "
            f"got {type(scheduler).__name__}: choose another lr_scheduler_type"
        )
    original = list(scheduler.lr_lambdas)

    def staged(factor: Callable[[Any], float]) -> Callable[[int], float]:
        return lambda step: factor(schedule.stage_step(step))

    scheduler.lr_lambdas = [staged(factor) for factor in original]

    def undo() -> None:
        scheduler.lr_lambdas = original

    return undo
