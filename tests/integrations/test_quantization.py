"""Int8 training inside the real Hugging Face Trainer, on a tiny random BERT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pybsp import BlockPruningCallback, BlockPruningConfig, QuantizationCallback
from pybsp.quantization import quantize_rows
from pybsp.quantization.linear import FakeQuantizedLinear

CFG = BlockPruningConfig(target_sparsity=0.75, phases=(0.2, 0.4, 0.4))


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 20, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": (ids == 3).any().long()}


class Seen(TrainerCallback):
    """How many layers computed in int8 at every step, and the best checkpoint."""

    def __init__(self) -> None:
        self.int8: list[int] = []
        self.best: list[Any] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
        self.int8.append(int8_layers(model))

    def on_save(self, args, state, control, **kwargs):  # noqa: ARG002
        self.best.append(state.best_global_step)


def int8_layers(model: nn.Module) -> int:
    return sum(isinstance(module, FakeQuantizedLinear) for module in model.modules())


def make_trainer(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 8,
        "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=Words(),
        eval_dataset=Words(),
        callbacks=list(callbacks),
    )


def assert_on_the_grid(state: dict[str, torch.Tensor]) -> None:
    weights = {
        name: value
        for name, value in state.items()
        if name.startswith("bert.encoder") and value.dim() == 2
    }
    assert len(weights) == 12
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert zeros >= 0.75 * sum(w.numel() for w in weights.values())
    for name, weight in weights.items():
        q, scales = quantize_rows(weight)
        torch.testing.assert_close(
            q * scales[:, None], weight, rtol=5e-7, atol=0, msg=name
        )


@pytest.mark.parametrize("order", [1, -1])
def test_beside_pruning_it_begins_at_the_cut(tmp_path: Path, order: int) -> None:
    seen = Seen()
    callbacks = [BlockPruningCallback(CFG), QuantizationCallback()][::order]
    trainer = make_trainer(tmp_path, *callbacks, seen)
    trainer.train()
    assert seen.int8 == [0] * 12 + [12] * 8
    assert int8_layers(trainer.model) == 0
    assert_on_the_grid(trainer.model.state_dict())
    assert trainer.model.config.quantization_config["block_shape"] == [8, 1]


def test_by_itself_and_with_a_start(tmp_path: Path) -> None:
    for callback, before in (
        (QuantizationCallback(), 0),
        (QuantizationCallback(start=0.8), 16),
    ):
        seen = Seen()
        make_trainer(tmp_path, callback, seen).train()
        assert seen.int8 == [0] * before + [12] * (20 - before)
    seen = Seen()
    only = QuantizationCallback(modules=["query"])
    make_trainer(tmp_path, only, seen, gradient_accumulation_steps=2, bf16=True).train()
    assert seen.int8 == [2] * 20


def test_stopped_and_resumed_equals_one_run(tmp_path: Path) -> None:
    def callbacks() -> list[TrainerCallback]:
        return [BlockPruningCallback(CFG), QuantizationCallback()]

    whole = make_trainer(tmp_path / "a", *callbacks(), save_strategy="steps",
                         save_steps=8)  # fmt: skip
    whole.train()
    for step in (8, 16):  # before the beginning and after it
        resumed = make_trainer(tmp_path / "a", *callbacks())
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        expected = whole.model.state_dict()
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected[name]), (step, name)


@pytest.mark.parametrize("pruning", ["none", "before", "after"])
def test_resumed_at_the_last_checkpoint_it_ends_in_int8(
    tmp_path: Path, pruning: str
) -> None:
    def callbacks() -> list[TrainerCallback]:
        if pruning == "none":
            return [QuantizationCallback(start=0.5)]
        both = [BlockPruningCallback(CFG), QuantizationCallback()]
        return both if pruning == "before" else both[::-1]

    steps = {"max_steps": 16, "save_strategy": "steps", "save_steps": 16}
    whole = make_trainer(tmp_path, *callbacks(), **steps)
    whole.train()
    seen = Seen()
    resumed = make_trainer(tmp_path, *callbacks(), seen, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert seen.int8 == []
    assert int8_layers(resumed.model) == 0
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_are_those_of_the_stock_model(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, BlockPruningCallback(CFG), QuantizationCallback(),
        save_strategy="steps", save_steps=16,
    )  # fmt: skip
    keys = set(trainer.model.state_dict())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-16", "final"):
        state = load_file(tmp_path / folder / "model.safetensors")
        assert set(state) == keys
    assert_on_the_grid(load_file(tmp_path / "final" / "model.safetensors"))


def test_a_checkpoint_in_float32_is_never_the_best(tmp_path: Path) -> None:
    seen = Seen()
    trainer = make_trainer(
        tmp_path, QuantizationCallback(start=0.6), seen,
        save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert seen.best[:2] == [None, None]
    assert trainer.state.best_global_step >= 15
    assert int8_layers(trainer.model) == 0


def test_stopped_before_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path, QuantizationCallback(start=0.5), Stop())
    trainer.train()
    assert "before int8 training begins at step 10" in caplog.text
    assert int8_layers(trainer.model) == 0


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    class Break(TrainerCallback):
        broken = False

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            if state.global_step == 12 and not self.broken:
                self.broken = True
                raise RuntimeError("interrupted")

    seen = Seen()
    trainer = make_trainer(tmp_path, QuantizationCallback(start=0.5), seen, Break())
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.train()
    assert int8_layers(trainer.model) == 12
    seen.int8.clear()
    trainer.train()
    assert seen.int8 == [0] * 10 + [12] * 10


def test_meaning_errors(tmp_path: Path) -> None:
    for start in (-0.1, 1.0, 80):
        with pytest.raises(ValueError, match="0 <= start < 1 must hold"):
            QuantizationCallback(start=start)
    packed = replace(CFG, packed_retraining=True)
    trainer = make_trainer(
        tmp_path, BlockPruningCallback(packed), QuantizationCallback()
    )
    with pytest.raises(ValueError, match="packed_retraining exchanges the layers"):
        trainer.train()
