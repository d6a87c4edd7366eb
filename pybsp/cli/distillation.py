"""Distillation: the pruned model also learns the outputs of the dense one.

Hinton et al. 2015 (arXiv 1503.02531): with temperature ``T`` and weight ``w`` ::

    L = (1 - w) L_task + w T^2 KL(softmax(t / T) || softmax(s / T))

for classes, and ``w (s - t)^2`` in place of the second term for a regression. The
teacher sees every example once, before training; its logits travel with the examples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from .training import Features, predict

TEACHER_LOGITS = "teacher_logits"
TEMPERATURE = 2.0


def add_teacher_logits(
    features: Features, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Features:
    """``features`` with the teacher's logits of each example beside its label."""
    logits = predict(teacher, features, tokenizer)
    return [
        {**example, TEACHER_LOGITS: row.tolist()}
        for example, row in zip(features, logits, strict=True)
    ]


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the second term above; logits ``(examples, outputs)``."""
    if student.shape[1] == 1:
        return F.mse_loss(student, teacher)
    return TEMPERATURE**2 * F.kl_div(
        F.log_softmax(student / TEMPERATURE, dim=1),
        F.log_softmax(teacher / TEMPERATURE, dim=1),
        log_target=True,
        reduction="batchmean",
    )


class DistillingTrainer(Trainer):
    """A Trainer whose examples carry ``teacher_logits``."""

    def __init__(self, *arguments: Any, weight: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weight = weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 (the Trainer passes it)
    ) -> Any:
        """The loss above; batches without teacher logits get the task's loss."""
        teacher = inputs.pop(TEACHER_LOGITS, None)
        outputs = model(**inputs)
        loss = outputs.loss
        if teacher is not None:
            extra = distillation_loss(outputs.logits, teacher.to(outputs.logits))
            loss = (1 - self.weight) * loss + self.weight * extra
        return (loss, outputs) if return_outputs else loss
