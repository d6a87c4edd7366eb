"""The teacher's part of the loss, in a loop and in the Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.test_trainer import CFG, make_trainer, tiny_bert
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    TrainerCallback,
)

from pybsp import (
    BlockPruningCallback,
    BlockPruningConfig,
    DistillationConfig,
    Distiller,
)
from pybsp.pruning.pruner import pruner_of

#: Cuts and packs when training begins.
AT_ONCE = BlockPruningConfig(
    target_sparsity=0.75, method="magnitude", phases=(0, 0, 1), packed_retraining=True
)


def batch(labels: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (4, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, 5:] = 0
    found = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    return {**found, "labels": torch.tensor([0, 1, 1, 0])} if labels else found


def moved(model: nn.Module) -> nn.Module:
    """A copy of other weights."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def expected_loss(
    student: nn.Module, teacher: nn.Module, inputs: dict[str, Any], **weights: float
) -> torch.Tensor:
    """The formula, layer by layer and token by token."""
    ours = student(**inputs, output_hidden_states=True)
    theirs = teacher.eval()(**inputs, output_hidden_states=True)
    temperature = weights.get("temperature", 2.0)
    p = (theirs.logits / temperature).softmax(1)
    q = (ours.logits / temperature).softmax(1)
    logits = temperature**2 * (p * (p / q).log()).sum(1).mean()
    layers = []
    for s, t in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        pairs = [
            (s[i, j], t[i, j]) for i, j in inputs["attention_mask"].nonzero().tolist()
        ]
        difference = sum((a - b).square().sum() for a, b in pairs)
        layers.append(difference / sum(b.square().sum() for _, b in pairs))
    w, h = weights.get("logits", 0.5), weights.get("hidden_states", 1.0)
    hidden = sum(layers) / len(layers)
    if "labels" not in inputs:
        return logits + h * hidden
    return (1 - w) * ours.loss + w * logits + h * hidden


@pytest.mark.parametrize(
    "weights",
    [{}, {"logits": 0.9, "hidden_states": 3.0, "temperature": 1.5},
     {"hidden_states": 0.0}, {"logits": 0.0}],
)  # fmt: skip
@pytest.mark.parametrize("labels", [True, False])
def test_the_loss_is_the_formula(weights: dict[str, float], labels: bool) -> None:
    student = tiny_bert().train()
    teacher, inputs = moved(student), batch(labels)
    expected = expected_loss(student, teacher, inputs, **weights)
    with Distiller(student, teacher, DistillationConfig(**weights)):
        loss = student(**inputs).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_evaluation_and_what_follows_are_left_alone() -> None:
    student = tiny_bert().train()
    plain = student(**batch()).loss
    with Distiller(student, moved(student)):
        assert student(**batch()).loss != plain
        output = student.eval()(**batch())
        assert output.loss == plain
        assert output.hidden_states is None
    assert student.train()(**batch()).loss == plain


def test_a_regression_learns_the_teachers_number() -> None:
    torch.manual_seed(0)
    student = tiny_bert()
    student.classifier = nn.Linear(32, 1)
    student.num_labels = student.config.num_labels = 1
    teacher, inputs = moved(student), batch(labels=False)
    wanted = F.mse_loss(student.train()(**inputs).logits, teacher(**inputs).logits)
    with Distiller(student, teacher, DistillationConfig(hidden_states=0.0)):
        torch.testing.assert_close(student(**inputs).loss, wanted)


def test_models_without_logits_and_with_logits_for_each_token() -> None:
    config = tiny_bert().config
    encoder = BertModel(config).train()
    inputs = batch(labels=False)
    with Distiller(encoder, moved(encoder), DistillationConfig(logits=0.0)):
        assert encoder(**inputs).loss > 0
    tagger = BertForTokenClassification(config).train()
    teacher = moved(tagger)
    tokens = inputs["attention_mask"].bool()
    q = (tagger(**inputs).logits[tokens] / 2).log_softmax(1)
    p = (teacher.eval()(**inputs).logits[tokens] / 2).log_softmax(1)
    expected = 4 * F.kl_div(q, p, log_target=True, reduction="batchmean")
    with Distiller(tagger, teacher, DistillationConfig(hidden_states=0.0)):
        torch.testing.assert_close(tagger(**inputs).loss, expected)


def test_the_callback_distils_and_prunes(tmp_path: Path) -> None:
    model = tiny_bert()
    teacher = moved(model)
    before = copy.deepcopy(teacher.state_dict())
    callback = BlockPruningCallback(
        CFG, teacher, distillation=DistillationConfig(logits=1.0, hidden_states=10.0)
    )
    trainer = make_trainer(tmp_path, callback, model=model, max_steps=40)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[15] < 0.5 * losses[0]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    evaluated = trainer.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(
        float(F.cross_entropy(*predicted(trainer))), rel=1e-4
    )


def predicted(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = trainer.predict(trainer.eval_dataset)
    return torch.tensor(found.predictions), torch.tensor(found.label_ids)


@pytest.mark.parametrize(
    ("option", "value"), [("label_smoothing_factor", 0.1), ("torch_compile", True)]
)
def test_losses_of_the_trainers_own_are_refused(
    tmp_path: Path, option: str, value: Any
) -> None:
    callback = BlockPruningCallback(CFG, moved(tiny_bert()))
    trainer = make_trainer(tmp_path, callback)
    setattr(trainer.args, option, value)
    with pytest.raises(ValueError, match=option):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_bad_teachers_are_refused() -> None:
    student = tiny_bert().train()
    with pytest.raises(ValueError, match=r"shares parameters.*deepcopy"):
        Distiller(student, student)
    config = BertConfig(**{**student.config.to_dict(), "num_hidden_layers": 3})
    with (
        Distiller(student, type(student)(config)),
        pytest.raises(ValueError, match="2 layers of 32 features, the teacher 3"),
    ):
        student(**batch())
    other = moved(student)
    other.classifier = nn.Linear(32, 5)
    with (
        Distiller(student, other),
        pytest.raises(ValueError, match=r"logits have shape \(4, 5\)"),
    ):
        student(**batch(labels=False))
    with (
        Distiller(student, moved(student)),
        pytest.raises(ValueError, match="leave return_dict on"),
    ):
        student(**batch(), return_dict=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": 1.5}, "between 0 and 1"),
        ({"logits": -1}, "logits must be a number >= 0"),
        ({"hidden_states": float("nan")}, "hidden_states must be a number"),
        ({"temperature": 0}, "temperature must be a number > 0"),
        ({"logits": 0, "hidden_states": 0}, "nothing would be distilled"),
    ],
)
def test_bad_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**settings)


def test_settings_need_a_teacher() -> None:
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        BlockPruningCallback(CFG, distillation=DistillationConfig())


def test_a_copy_of_the_student_returns_its_own_loss() -> None:
    student, inputs = tiny_bert().train(), batch()
    teacher = moved(student)
    own = student(**inputs).loss
    with Distiller(student, teacher):
        distilled = student(**inputs).loss
        copied = copy.deepcopy(student)
        found = copied(**inputs)
        torch.testing.assert_close(student(**inputs).loss, distilled, rtol=0, atol=0)
    assert not torch.equal(own, distilled)
    torch.testing.assert_close(found.loss, own, rtol=0, atol=0)
    assert found.hidden_states is None
    for hook in [*copied._forward_hooks.values(), *copied._forward_pre_hooks.values()]:
        held = hook.__self__.teacher  # type: ignore[attr-defined]
        assert not list(held.parameters())


def test_a_new_teacher_takes_the_place_of_the_old_one() -> None:
    student, inputs = tiny_bert().train(), batch()
    own = student(**inputs).loss
    first, second = moved(student), moved(moved(student))
    with Distiller(student, second):
        expected = student(**inputs).loss
    old = Distiller(student, first)
    with Distiller(student, second):
        torch.testing.assert_close(student(**inputs).loss, expected)
        old.remove()
        torch.testing.assert_close(student(**inputs).loss, expected)
    torch.testing.assert_close(student(**inputs).loss, own, rtol=0, atol=0)


@pytest.mark.parametrize("mistake", ["teacher", "schedule", "optimizer"])
def test_what_is_refused_leaves_the_model_as_it_was(
    tmp_path: Path, mistake: str
) -> None:
    model = tiny_bert()
    query = model.bert.encoder.layer[0].attention.self.query
    teacher, changes = moved(model), {}
    if mistake == "teacher":
        teacher, message = model, "shares parameters"
    elif mistake == "schedule":
        message = "function of the step"
        changes = {"lr_scheduler_type": "reduce_lr_on_plateau"}
        changes.update({"eval_strategy": "steps", "eval_steps": 10})
    else:
        message, changes = "Adafactor", {"optim": "adafactor"}
    before = copy.deepcopy(model.state_dict())
    callback = BlockPruningCallback(AT_ONCE, teacher, restart_learning_rate=True)
    trainer = make_trainer(tmp_path, callback, model=model, **changes)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.bert.encoder.layer[0].attention.self.query is query
    assert not model._forward_hooks
    assert not plays_twice(trainer.lr_scheduler)
    assert pruner_of(trainer.optimizer) is None
    assert callback.pruner is None


def plays_twice(scheduler: Any) -> bool:
    factors = getattr(scheduler, "lr_lambdas", [])
    return any("_play_twice" in getattr(f, "__qualname__", "") for f in factors)


class Interrupt(TrainerCallback):
    """Stands for Ctrl-C."""

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step == 3:
            raise KeyboardInterrupt


def interrupted(
    folder: Path, model: nn.Module, cfg: BlockPruningConfig = AT_ONCE
) -> tuple[Any, BlockPruningCallback]:
    callback = BlockPruningCallback(cfg, moved(model), restart_learning_rate=True)
    trainer = make_trainer(folder, callback, Interrupt(), model=model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer, callback


def test_detach_ends_what_an_interrupted_training_left(tmp_path: Path) -> None:
    model = tiny_bert()
    trainer, callback = interrupted(tmp_path, model)
    assert plays_twice(trainer.lr_scheduler)
    callback.detach()
    assert not plays_twice(trainer.lr_scheduler)
    assert not model._forward_hooks
    assert type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear
    assert pruner_of(trainer.optimizer) is None
    torch.testing.assert_close(
        model.train()(**batch()).loss,
        F.cross_entropy(model(**batch()).logits, batch()["labels"]),
    )
    callback.detach()


def test_training_goes_on_with_another_callback_and_one_teacher(tmp_path: Path) -> None:
    model = tiny_bert()
    interrupted(tmp_path, model, CFG)
    make_trainer(tmp_path, BlockPruningCallback(CFG, moved(model)), model=model).train()
    assert not model._forward_hooks
