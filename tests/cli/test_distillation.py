import pytest
import torch
import torch.nn.functional as F

from pybsp.cli.distillation import (
    TEACHER_LOGITS,
    TEMPERATURE,
    DistillingTrainer,
    add_teacher_logits,
    distillation_loss,
)
from pybsp.cli.glue import load
from pybsp.cli.models import load_classifier
from pybsp.cli.training import encode


def test_loss_is_the_scaled_divergence():
    student = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    teacher = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    p = (teacher / TEMPERATURE).softmax(1)
    q = (student / TEMPERATURE).softmax(1)
    expected = TEMPERATURE**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher), expected)
    assert distillation_loss(teacher, teacher).abs() < 1e-6


def test_a_regression_uses_the_squared_error():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert distillation_loss(student, teacher) == pytest.approx(2.5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_trainer_mixes_both_losses(model, data, weight):
    student, tokenizer = load_classifier(str(model), 2)
    student.eval()
    features = encode(tokenizer, load("sst2", data).train, 16, classes=True)[:1]
    taught = add_teacher_logits(features, student, tokenizer)
    assert TEACHER_LOGITS not in features[0]
    teacher = torch.tensor([[2.0, -3.0]])
    batch = {name: torch.tensor([value]) for name, value in taught[0].items()}
    batch[TEACHER_LOGITS] = teacher
    trainer = object.__new__(DistillingTrainer)
    trainer.weight = weight
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    task = F.cross_entropy(outputs.logits, batch["labels"])
    extra = distillation_loss(outputs.logits, teacher)
    torch.testing.assert_close(loss, (1 - weight) * task + weight * extra)
    del batch[TEACHER_LOGITS]
    torch.testing.assert_close(trainer.compute_loss(student, batch), task)
