"""The callback inside the real Hugging Face Trainer, on a tiny random BERT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from encoders import ARCHITECTURES
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pybsp import BlockPruner, BlockPruningConfig, preserve_sparsity
from pybsp.integrations.trainer import STATE_NAME, BlockPruningCallback
from pybsp.nn import BlockSparseLinear
from pybsp.pruning.state import load_state

CFG = BlockPruningConfig(target_sparsity=0.75, phases=(0.2, 0.4, 0.4))


class Words(torch.utils.data.Dataset):
    """Eight tokens and whether token 3 is among them."""

    def __init__(self, length: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 20, (length, 8), generator=generator)
        self.labels = (self.ids == 3).any(1).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    settings: dict[str, object] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})  # type: ignore[arg-type]


def make_trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    model: nn.Module | None = None,
    **changes: object,
) -> Trainer:
    return Trainer(
        model=model or tiny_bert(),
        args=arguments(folder, **changes),
        train_dataset=Words(),
        eval_dataset=Words(16),
        callbacks=list(callbacks),
    )


def encoder_sparsity(state: dict[str, torch.Tensor]) -> float:
    weights = [
        value
        for name, value in state.items()
        if name.startswith("bert.encoder") and value.dim() == 2
    ]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return zeros / sum(w.numel() for w in weights)


class Reporter(TrainerCallback):
    """Stands for TensorBoard and its like: added by default, so before the user's."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        self.seen.append(dict(logs))


def test_run_reaches_target_and_marks_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG))
    trainer.train()
    state = trainer.model.state_dict()
    assert encoder_sparsity(state) == 0.75
    assert not (state["classifier.weight"] == 0).any()
    assert not (state["bert.pooler.dense.weight"] == 0).any()
    query = trainer.model.bert.encoder.layer[0].attention.self.query
    assert query.pybsp_block_shape == (8, 1)
    trainer.save_model(str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    record = config["quantization_config"]
    assert record["quant_method"] == "pybsp"
    assert record["sparsity"] == 0.75
    assert len(record["modules"]) == 12


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "mpnet"])
def test_other_architectures_are_pruned_saved_and_loaded(
    tmp_path: Path, name: str
) -> None:
    prefix, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        getattr(transformers, f"{prefix}Config")(**settings)
    )
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG), model=model)
    trainer.train()
    targets = {
        path: layer
        for path, layer in model.base_model.named_modules()
        if isinstance(layer, nn.Linear) and "layer" in path
    }
    zeros = sum(int((layer.weight == 0).sum()) for layer in targets.values())
    assert zeros == 0.75 * sum(layer.weight.numel() for layer in targets.values())
    trainer.save_model(str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["modules"]) == len(targets)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = Words().ids
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_logs_reach_history_and_reporters(tmp_path: Path) -> None:
    reporter = Reporter()
    trainer = make_trainer(tmp_path, reporter, BlockPruningCallback(CFG))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = [entry for entry in reporter.seen if "loss" in entry]
    assert len(history) == len(seen) == 20
    for entries in (history, seen):
        assert [e["pybsp/phase"] for e in entries] == [0] * 3 + [1] * 8 + [2] * 9
        assert entries[10]["pybsp/sparsity"] == 0.0
        assert entries[11]["pybsp/sparsity"] == 0.75
        assert entries[5]["pybsp/penalty"] > 0
        assert entries[5]["pybsp/lambda"] == CFG.reg_lambda
        assert entries[-1]["pybsp/masked_steps"] == 8.0
    assert all(isinstance(v, float) for k, v in seen[0].items() if "pybsp" in k)


def scripted_metrics(scores: dict[int, float], trainer: Trainer) -> None:
    """Make the evaluation at each step return a chosen score."""
    evaluate = trainer.evaluate

    def scored(*args: object, **kwargs: object) -> dict[str, float]:
        step = trainer.state.global_step
        trainer.compute_metrics = lambda _: {"score": scores[step]}
        return evaluate(*args, **kwargs)

    trainer.evaluate = scored  # type: ignore[method-assign]


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def test_only_pruned_checkpoints_may_become_the_best(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG), **BEST)
    scores = {4: 0.99, 8: 0.98, 12: 0.5, 16: 0.7, 20: 0.6}
    scripted_metrics(scores, trainer)
    trainer.train()
    assert trainer.state.best_global_step == 16
    assert trainer.state.best_metric == 0.7
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-16")
    assert encoder_sparsity(trainer.model.state_dict()) == 0.75


def test_without_the_callback_the_dense_checkpoint_wins(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **BEST)
    scripted_metrics({4: 0.99, 8: 0.98, 12: 0.5, 16: 0.7, 20: 0.6}, trainer)
    trainer.train()
    assert trainer.state.best_global_step == 4


def test_dense_scores_do_not_stop_training_early(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG), stopping, **BEST)
    scripted_metrics({4: 0.99, 8: 0.98, 12: 0.5, 16: 0.7, 20: 0.8}, trainer)
    trainer.train()
    assert trainer.state.global_step == 20


def test_stop_before_the_cut_leaves_the_model_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            control.should_training_stop = state.global_step == 5

    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG), Stop())
    trainer.train()
    assert "before the cut" in caplog.text
    assert encoder_sparsity(trainer.model.state_dict()) == 0.0
    assert getattr(trainer.model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("penalty", "ramp"), [("gradient", "one_shot"), ("proximal", "cubic")]
)
def test_resume_in_any_phase_repeats_the_run(
    tmp_path: Path, penalty: str, ramp: str
) -> None:
    cfg = BlockPruningConfig.from_dict(
        {**CFG.to_dict(), "penalty": penalty, "ramp": ramp}
    )
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 16}
    whole = make_trainer(tmp_path, BlockPruningCallback(cfg), **saving)
    whole.train()
    expected = whole.model.state_dict()
    for step in (2, 6, 8, 12, 16):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        again = make_trainer(
            tmp_path / "again",
            BlockPruningCallback(cfg),
            max_steps=16,
        )
        again.train(resume_from_checkpoint=checkpoint)
        for name, value in again.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_packed_retraining_gives_the_same_model(tmp_path: Path) -> None:
    """Without clipping: masked, its norm counts the gradients of removed blocks too."""

    class Kinds(TrainerCallback):
        def __init__(self) -> None:
            self.packed: list[bool] = []

        def on_step_begin(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
            query = model.bert.encoder.layer[0].attention.self.query
            self.packed.append(isinstance(query, BlockSparseLinear))

    states, losses = [], []
    for packed in (False, True):
        cfg = replace(CFG, packed_retraining=packed)
        kinds = Kinds()
        folder = tmp_path / str(packed)
        trainer = make_trainer(
            folder, BlockPruningCallback(cfg), kinds, max_grad_norm=0.0,
            save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4,
            load_best_model_at_end=True,
        )  # fmt: skip
        trainer.train()
        assert kinds.packed == [packed and step >= 12 for step in range(20)]
        query = trainer.model.bert.encoder.layer[0].attention.self.query
        assert type(query) is nn.Linear
        assert query.pybsp_block_shape == (8, 1)
        saved = load_file(folder / "checkpoint-16" / "model.safetensors")
        assert encoder_sparsity(saved) == 0.75
        trainer.save_model(str(folder / "out"))
        out = BertForSequenceClassification.from_pretrained(folder / "out")
        assert encoder_sparsity(out.state_dict()) == 0.75
        states.append({**trainer.model.state_dict(), **saved})
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(states[1][name] == 0, value == 0), name
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [10, 12, 14, 16])
def test_packed_retraining_resumes(tmp_path: Path, step: int) -> None:
    cfg = replace(CFG, packed_retraining=True)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 16}
    whole = make_trainer(tmp_path, BlockPruningCallback(cfg), **saving)
    whole.train()
    again = make_trainer(tmp_path / "again", BlockPruningCallback(cfg), max_steps=16)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_retraining_refuses_a_compiled_model(tmp_path: Path) -> None:
    cfg = replace(CFG, packed_retraining=True)
    trainer = make_trainer(tmp_path, BlockPruningCallback(cfg), torch_compile=True)
    with pytest.raises(ValueError, match="torch_compile"):
        trainer.train()


def test_resume_refuses_missing_or_damaged_state(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    make_trainer(tmp_path, BlockPruningCallback(CFG), **saving).train()
    file = tmp_path / "checkpoint-10" / STATE_NAME
    whole = file.read_bytes()
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-10")}

    file.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="truncated"):
        make_trainer(tmp_path, BlockPruningCallback(CFG)).train(**resume)
    file.unlink()
    with pytest.raises(ValueError, match=r"no pybsp_state\.safetensors in"):
        make_trainer(tmp_path, BlockPruningCallback(CFG)).train(**resume)
    file.write_bytes(whole)
    other = BlockPruningConfig.from_dict({**CFG.to_dict(), "target_sparsity": 0.5})
    with pytest.raises(ValueError, match=r"target_sparsity = 0\.75, this run has 0\.5"):
        make_trainer(tmp_path, BlockPruningCallback(other)).train(**resume)


def test_state_of_a_checkpoint_is_complete(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 8}
    make_trainer(tmp_path, BlockPruningCallback(CFG), **saving).train()
    middle = load_state(tmp_path / "checkpoint-8" / STATE_NAME)
    assert middle["step"] == 8
    assert len(middle["factors"]) == 12
    assert not middle["masks"]
    late = load_state(tmp_path / "checkpoint-16" / STATE_NAME)
    assert late["at_target"]
    assert len(late["masks"]) == 12
    assert not list(tmp_path.glob("*/*.tmp"))


def test_the_first_checkpoint_after_the_cut_is_pruned(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, BlockPruningCallback(CFG), max_steps=10, **saving).train()
    sparsities = [
        encoder_sparsity(load_file(tmp_path / f"checkpoint-{step}/model.safetensors"))
        for step in range(1, 11)
    ]
    assert sparsities == [0.0] * 5 + [0.75] * 5


def test_accelerate_saves_and_restores_the_pruner(tmp_path: Path) -> None:
    def prepared() -> tuple[Accelerator, nn.Module, Any, BlockPruner]:
        accelerator = Accelerator(cpu=True)
        model = tiny_bert()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        pruner = BlockPruner(model, CFG, total_steps=10).attach(optimizer)
        accelerator.register_for_checkpointing(pruner)
        return accelerator, model, optimizer, pruner

    def train(
        parts: tuple[Accelerator, nn.Module, Any, BlockPruner], steps: int
    ) -> None:
        accelerator, model, optimizer, _ = parts
        words = Words(8)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=words.ids, labels=words.labels).loss
            accelerator.backward(loss)
            optimizer.step()

    first = prepared()
    train(first, 4)
    first[0].save_state(str(tmp_path))
    train(first, 6)
    second = prepared()
    second[0].load_state(str(tmp_path))
    assert second[3].step == 4
    train(second, 6)
    assert second[3].finalize() == first[3].finalize()
    for name, value in first[1].state_dict().items():
        assert torch.equal(value, second[1].state_dict()[name]), name


def test_fine_tuning_a_pruned_model_keeps_its_zeros(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG))
    trainer.train()
    again = make_trainer(tmp_path, model=trainer.model)
    again.create_optimizer()
    preserve_sparsity(again.model, again.optimizer)
    before = again.model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    again.train()
    after = again.model.bert.encoder.layer[0].output.dense.weight
    assert encoder_sparsity(again.model.state_dict()) == 0.75
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    def trained(**changes: int) -> dict[str, torch.Tensor]:
        trainer = make_trainer(tmp_path, BlockPruningCallback(CFG), **changes)
        # the model's loss is a mean over each batch; by default the Trainer takes it
        # for one that is already scaled
        trainer.loss_is_scaled_for_ga = False
        trainer.train()
        return trainer.model.state_dict()

    one = trained()
    four = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, value in four.items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4)


def test_learning_rate_can_restart_for_the_retrain_phase(tmp_path: Path) -> None:
    def rates(**options: bool) -> list[float]:
        trainer = make_trainer(tmp_path, BlockPruningCallback(CFG, **options))
        trainer.train()
        return [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]

    once, twice = rates(), rates(restart_learning_rate=True)
    assert once == sorted(once, reverse=True)
    assert twice[:12] == sorted(twice[:12], reverse=True)
    assert twice[12] == pytest.approx(1e-3)
    assert twice[11] < 1e-4
    assert twice[-1] < 2e-4


def test_restart_refuses_a_schedule_without_steps(tmp_path: Path) -> None:
    callback = BlockPruningCallback(CFG, restart_learning_rate=True)
    trainer = make_trainer(
        tmp_path,
        callback,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=10,
    )
    with pytest.raises(ValueError, match="function of the step"):
        trainer.train()


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    pair = (BlockPruningCallback(CFG), BlockPruningCallback(CFG))
    with pytest.raises(ValueError, match="another BlockPruner is attached"):
        make_trainer(tmp_path, *pair).train()


def test_train_twice_with_one_callback(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG))
    trainer.train()
    trainer.train()
    assert encoder_sparsity(trainer.model.state_dict()) == 0.75


def test_the_wrong_kind_of_config_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a BlockPruningConfig; got dict"):
        BlockPruningCallback({})  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_sharding_engines_are_refused(tmp_path: Path, engine: str) -> None:
    args = arguments(tmp_path)
    setattr(args, engine, {"stage": 2} if engine == "deepspeed" else True)
    with pytest.raises(ValueError, match="whole weight matrices"):
        BlockPruningCallback(CFG).on_train_begin(args, None, None)  # type: ignore[arg-type]


def test_logs_survive_without_the_trainer_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pybsp.integrations.trainer.calling_trainer", lambda: None)
    trainer = make_trainer(tmp_path, BlockPruningCallback(CFG))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["pybsp/sparsity"] == 0.75
