"""Which outputs of a model are distilled, by which loss, and what counts of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.test_distillation import batch, moved
from integrations.test_teacher_cache import Counting
from integrations.test_trainer import tiny_bert
from torch import nn
from transformers import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
)

from pybsp import DistillationConfig, Distiller

LOGITS_ALONE = DistillationConfig(hidden_states=0.0)


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """At the temperature 2, a mean over the first axis."""
    p, q = (theirs / 2).softmax(1), (ours / 2).softmax(1)
    return 4 * (p * (p / q).log()).sum(1).mean()


def classifier(labels: int, problem: str | None = None) -> nn.Module:
    student = tiny_bert().train()
    student.classifier = nn.Linear(32, labels)
    student.num_labels = student.config.num_labels = labels
    student.config.problem_type = problem
    return student


def test_answers_are_distilled_over_the_tokens_that_count() -> None:
    student = BertForQuestionAnswering(tiny_bert().config).train()
    teacher, inputs = moved(student), batch(labels=False)
    ours, theirs = student(**inputs), teacher.eval()(**inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    expected = torch.stack(
        [
            divergence(ours[name][i : i + 1, :n], theirs[name][i : i + 1, :n])
            for name in ("start_logits", "end_logits")
            for i, n in enumerate(lengths)
        ]
    ).mean()
    places = {
        "start_positions": torch.ones(4).long(),
        "end_positions": torch.ones(4).long(),
    }
    loss = student(**inputs, **places).loss
    cfg = DistillationConfig(hidden_states=0.0, cache_bytes=1 << 20)
    with Distiller(student, teacher, cfg) as distiller:
        distilled = student(**inputs).loss
        torch.testing.assert_close(distilled, expected)
        distilled.backward()
        assert all(p.grad.isfinite().all() for p in student.qa_outputs.parameters())
        assert len(distiller.cache) == 0  # of another shape in every batch
        found = student(**inputs, **places).loss
    torch.testing.assert_close(found, 0.5 * loss + 0.5 * expected)


def test_all_logits_count_alike() -> None:
    student = BertForPreTraining(tiny_bert().config).train()
    teacher, inputs = moved(student), batch(labels=False)
    ours, theirs = student(**inputs), teacher.eval()(**inputs)
    kept = inputs["attention_mask"].bool()
    words = divergence(ours.prediction_logits[kept], theirs.prediction_logits[kept])
    order = divergence(ours.seq_relationship_logits, theirs.seq_relationship_logits)
    with Distiller(student, teacher, LOGITS_ALONE):
        torch.testing.assert_close(student(**inputs).loss, (words + order) / 2)


def test_logits_that_are_not_there_are_refused() -> None:
    encoder, inputs = BertModel(tiny_bert().config).train(), batch(labels=False)
    teacher = moved(encoder)
    with (
        Distiller(encoder, teacher),
        pytest.raises(ValueError, match=r"last_hidden_state.*set logits=0"),
    ):
        encoder(**inputs)
    with Distiller(encoder, teacher, DistillationConfig(logits=0.0)):
        assert encoder(**inputs).loss > 0
    student = tiny_bert().train()
    with (
        Distiller(student, teacher),
        pytest.raises(ValueError, match=r"the teacher none.*set logits=0"),
    ):
        student(**batch())


def test_a_regression_of_several_numbers_learns_the_teachers_numbers() -> None:
    student, inputs = classifier(3, "regression"), batch(labels=False)
    teacher = moved(student)
    wanted = F.mse_loss(student(**inputs).logits, teacher.eval()(**inputs).logits)
    with Distiller(student, teacher, LOGITS_ALONE):
        torch.testing.assert_close(student(**inputs).loss, wanted)


@pytest.mark.parametrize("labels", [1, 3])
def test_each_of_several_labels_is_a_choice_of_its_own(labels: int) -> None:
    student = classifier(labels, "multi_label_classification")
    teacher, inputs = moved(student), batch(labels=False)
    q = (student(**inputs).logits / 2).sigmoid()
    p = (teacher.eval()(**inputs).logits / 2).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    with Distiller(student, teacher, LOGITS_ALONE):
        torch.testing.assert_close(student(**inputs).loss, 4 * each.mean())


def test_the_problem_is_known_from_the_first_labels_on() -> None:
    student, inputs = classifier(3), batch(labels=False)
    teacher = moved(student)
    inputs["labels"] = torch.tensor([[0.0, 1.0, 1.0]] * 4)
    cfg = DistillationConfig(logits=1.0, hidden_states=0.0)
    with Distiller(student, teacher, cfg):
        found = student(**inputs).loss
        assert student.config.problem_type == "multi_label_classification"
        torch.testing.assert_close(student(**inputs).loss, found)


def test_logits_of_tokens_are_classes_whatever_a_classifier_was_trained_for() -> None:
    """``problem_type`` is saved with a classifier; heads of tokens do not read it."""
    config = tiny_bert().config
    config.problem_type = "regression"
    tagger = BertForTokenClassification(config).train()
    teacher, inputs = moved(tagger), batch(labels=False)
    kept = inputs["attention_mask"].bool()
    expected = divergence(
        tagger(**inputs).logits[kept], teacher.eval()(**inputs).logits[kept]
    )
    with Distiller(tagger, teacher, LOGITS_ALONE):
        torch.testing.assert_close(tagger(**inputs).loss, expected)


def test_one_logit_for_each_token_is_a_choice_and_is_not_kept() -> None:
    """ELECTRA's discriminator."""

    class Discriminator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tagger = BertForTokenClassification(tiny_bert().config)
            self.config = self.tagger.config

        def forward(self, **inputs: Any) -> Any:
            output = self.tagger(**inputs)
            output["logits"] = output["logits"][..., 0]
            return output

    student = Discriminator().train()
    teacher, inputs = moved(student), batch(labels=False)
    kept = inputs["attention_mask"].bool()
    ours, theirs = (
        torch.stack([z[kept], torch.zeros_like(z[kept])], 1)
        for z in (student(**inputs).logits, teacher.eval()(**inputs).logits)
    )
    cfg = DistillationConfig(hidden_states=0.0, cache_bytes=1 << 20)
    longer = {key: F.pad(value, (0, 3)) for key, value in inputs.items()}
    with Distiller(student, teacher, cfg) as distiller:
        expected = divergence(ours, theirs)
        torch.testing.assert_close(student(**inputs).loss, expected)
        assert distiller.cache.used == 0
        torch.testing.assert_close(student(**longer).loss, expected)


def test_padding_does_not_count_without_keywords_either() -> None:
    student = tiny_bert().train()
    inputs: dict[str, Any] = batch(labels=False)
    with Distiller(student, moved(student)):
        expected = student(**inputs).loss
        found = student(inputs["input_ids"], inputs["attention_mask"]).loss
    torch.testing.assert_close(found, expected)


def test_the_cache_keeps_logits_by_name() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny_bert(), moved(tiny_bert())

        def forward(self, **inputs: Any) -> Any:
            output = self.first(**inputs)
            output["other_logits"] = self.second(**inputs).logits
            return output

    student = TwoHeads().train()
    teacher, inputs = Counting(moved(student)), batch(labels=False)
    cfg = DistillationConfig(hidden_states=0.0, cache_bytes=1 << 20)
    with Distiller(student, teacher, cfg):
        first = student(**inputs).loss
        torch.testing.assert_close(student(**inputs).loss, first)
    assert teacher.calls == 1
