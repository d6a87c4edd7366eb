"""Distillation: the pruned model also learns what the dense one computes.

With the outputs ``s`` of the student and ``t`` of the teacher, weights ``w`` and ``h``
and a temperature ``T``, the loss of a batch becomes::

    L = (1 - w) L_task + w L_logits + h L_hidden

    L_logits = T^2 KL(softmax(t / T) || softmax(s / T))          Hinton et al. 2015
    L_hidden = mean over layers of  |H_s - H_t|^2 / |H_t|^2      FitNets, TinyBERT

``L_logits`` is a mean over the outputs whose names end in ``logits``. Of a classifier
with ``config.problem_type`` "regression", or one output, it is ``(s - t)^2``; with
"multi_label_classification" each label is a choice of its own, between ``s`` and 0.
Logits and hidden states ``H`` of padding do not count. The model itself returns this
loss, by hooks on its forward, so that whatever loop trains it distils.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..pruning.forwards import named_logits
from ..pruning.targets import unwrap_model
from .teacher_cache import OVER_TOKENS, TeacherCache, TeacherOutputs

#: Inputs that are for the loss; a teacher gets all others.
_FOR_THE_LOSS = ("labels", "num_items_in_batch")

#: Far below any logit, and finite at any temperature of use: no token has a share.
_NO_TOKEN = -1e30

#: The Distiller of each student.
_active: weakref.WeakKeyDictionary[nn.Module, Distiller] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How much a student learns from its teacher.

    Args:
        logits: weight ``w`` of the teacher's logits, from 0 to 1; the labels have the
            rest. 1 needs no labels, 0 no logits.
        hidden_states: weight ``h`` of the outputs of all layers; 0 leaves them out,
            for a teacher of another depth or width.
        temperature: ``T``.
        cache_bytes: memory for the teacher's outputs (float16), so that it sees an
            example once and not in every epoch. Examples beyond it are computed again.

    Raises:
        ValueError: for a value outside its rule, naming the field.
    """

    logits: float = 0.5
    hidden_states: float = 1.0
    temperature: float = 2.0
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("logits", "hidden_states", "temperature", "cache_bytes"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value < 0
            ):
                raise ValueError(f"{name} must be a number >= 0; got {value!r}")
        if self.logits > 1:
            raise ValueError(
                f"logits must lie between 0 and 1, the labels have the rest; got "
                f"{self.logits!r}"
            )
        if self.temperature == 0:
            raise ValueError("temperature must be a number > 0; got 0")
        if self.logits == 0 and self.hidden_states == 0:
            raise ValueError(
                "logits and hidden_states are both 0: nothing would be distilled; "
                "give one a weight, or no teacher"
            )


class Distiller:
    """Adds the teacher to the loss that ``student`` returns in training mode.

    ``remove()``, leaving ``with`` or another teacher for the same student ends it. The
    teacher is put into evaluation mode and never trained. Batches without labels learn
    from it alone. A deep copy of the student returns its own loss.

    The teacher's share is a mean over the batch. Under gradient accumulation it is
    scaled by whatever scales the loss: transformers 5.23 sums the parts of a classifier
    with labels and does not divide them, unless ``trainer.loss_is_scaled_for_ga`` is
    False.

    Raises:
        ValueError: for a teacher that is the student, and at the first batch when the
            outputs of the two do not fit together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        cfg: DistillationConfig | None = None,
    ) -> None:
        student, teacher = unwrap_model(student), unwrap_model(teacher)
        shared = {id(p) for p in student.parameters()} & {
            id(p) for p in teacher.parameters()
        }
        if shared:
            raise ValueError(
                "the teacher shares parameters with the model that is trained; give a "
                "copy: copy.deepcopy(model)"
            )
        self.cfg = cfg or DistillationConfig()
        self.teacher = teacher.eval()
        self.cache = TeacherCache(int(self.cfg.cache_bytes))
        if student in _active:  # left by a training that was interrupted
            _active[student].remove()
        _active[student] = self
        self._handles = [
            student.register_forward_pre_hook(self._before, with_kwargs=True),
            student.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Give the student its own loss back; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for student, distiller in list(_active.items()):
            if distiller is self:
                del _active[student]

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        """One that adds nothing: the hooks in a copy of the student lead to it."""
        ended = object.__new__(type(self))
        ended.cfg, ended.teacher = self.cfg, nn.Module()
        ended.cache, ended._handles = TeacherCache(0), []
        return ended

    def __enter__(self) -> Distiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(
        self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (self._handles and student.training and self.cfg.hidden_states):
            return None
        return args, {**kwargs, "output_hidden_states": True}

    def _after(
        self,
        student: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if not (self._handles and student.training):
            return None
        if not isinstance(output, MutableMapping):
            raise ValueError(
                "distillation reads logits and hidden states by name; got "
                f"{type(output).__name__}: leave return_dict on"
            )
        wanted = self._teacher_outputs(args, kwargs)
        if args:  # names as those of the keywords
            named = inspect.signature(student.forward).bind_partial(*args).arguments
            kwargs = {**named, **kwargs}
        mask = kwargs.get("attention_mask")
        output["loss"] = self._loss(output, wanted, mask, student)
        return output

    def _teacher_outputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TeacherOutputs:
        inputs = {k: v for k, v in kwargs.items() if k not in _FOR_THE_LOSS}
        keys = [] if args else self.cache.keys(inputs)
        found = self.cache.find(keys, inputs)
        if found is None:
            with torch.no_grad():
                output = self.teacher(*args, **inputs)
            hidden = output.get("hidden_states") or ()
            found = TeacherOutputs(named_logits(output), hidden)
            self.cache.keep(keys, inputs, found)
        return found

    def _loss(
        self,
        output: Mapping[str, Any],
        wanted: TeacherOutputs,
        mask: Any,
        student: nn.Module,
    ) -> torch.Tensor:
        loss: Any = output.get("loss")
        ours = named_logits(output)
        names = [name for name in ours if name in wanted.logits]
        if self.cfg.logits and not names:
            raise ValueError(
                f"no logits to distil: the student returns {', '.join(output)}, and of "
                f"logits the teacher {', '.join(wanted.logits) or 'none'}; set "
                "logits=0 to distil the hidden states alone"
            )
        weight = self.cfg.logits if loss is not None else 1.0
        if not names:
            weight = 0.0
        total: Any = 0.0 if loss is None else (1.0 - weight) * loss
        if weight:
            parts = [
                self._logits(name, ours[name], wanted.logits[name], mask, student)
                for name in names
            ]
            total = total + weight * torch.stack(parts).mean()
        if self.cfg.hidden_states:
            states = output.get("hidden_states") or ()
            hidden = hidden_states_loss(states, wanted.hidden_states, mask)
            total = total + self.cfg.hidden_states * hidden
        return total  # type: ignore[no-any-return]

    def _logits(
        self,
        name: str,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        mask: Any,
        student: nn.Module,
    ) -> torch.Tensor:
        config, problem = getattr(student, "config", None), None
        of_tokens = mask is not None and mask.shape == ours.shape == theirs.shape
        if name == "logits" and ours.dim() == 2:
            # saved with a classifier, and not read by other heads
            problem = getattr(config, "problem_type", None)
            if of_tokens and ours.shape[1] != getattr(config, "num_labels", None):
                # a choice for each token, as of ELECTRA's discriminator
                problem, kept = "multi_label_classification", mask.bool()
                ours, theirs = (z[kept.to(z.device)][None] for z in (ours, theirs))
        elif name in OVER_TOKENS and of_tokens:
            padding = ~mask.bool()
            ours, theirs = (
                z.float().masked_fill(padding.to(z.device), _NO_TOKEN)
                for z in (ours, theirs)
            )
        pair = _tokens(ours, theirs, mask)
        return logits_loss(*pair, self.cfg.temperature, problem)


def logits_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    problem: str | None = None,
) -> torch.Tensor:
    """``L_logits`` of logits ``(n, outputs)``: the mean over ``n``, and over labels and
    numbers where ``problem``, as in ``config.problem_type``, says that they are such.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher.shape)}, the student's "
            f"{tuple(student.shape)}; give a teacher of the same task"
        )
    student, teacher = student.float(), teacher.float()
    if problem == "multi_label_classification":
        student, teacher = (
            torch.stack([z.flatten(), torch.zeros_like(z.flatten())], dim=1)
            for z in (student, teacher)
        )
    elif problem == "regression" or student.shape[1] == 1:
        return F.mse_loss(student, teacher)
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )


def hidden_states_loss(
    student: tuple[torch.Tensor, ...],
    teacher: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """``L_hidden`` of the outputs ``(sequences, tokens, features)`` of the embeddings
    (left out) and of each layer; ``mask`` is nonzero where tokens count."""
    if not student or [h.shape for h in student] != [h.shape for h in teacher]:
        raise ValueError(
            f"the student has {max(len(student) - 1, 0)} layers of "
            f"{student[0].shape[-1] if student else 0} features, the teacher "
            f"{max(len(teacher) - 1, 0)} of {teacher[0].shape[-1] if teacher else 0}; "
            "set hidden_states=0 to distil the logits alone"
        )
    errors = []
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        ours, theirs = _tokens(ours, theirs, mask)
        ours, theirs = ours.float(), theirs.float()
        scale = theirs.square().sum().clamp_min(1e-12)
        errors.append((ours - theirs).square().sum() / scale)
    return torch.stack(errors).mean()


def _tokens(
    ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as ``(n, features)``, without padding where they have a token axis."""
    theirs = theirs.to(ours.device)
    if ours.dim() == 1:  # a number for each example
        return ours[:, None], theirs.flatten()[:, None]
    if mask is not None and ours.dim() == 3 and mask.shape == ours.shape[:2]:
        kept = mask.bool()
        if ours.shape == theirs.shape:
            return ours[kept], theirs[kept]
    return ours.flatten(0, -2), theirs.flatten(0, -2)
