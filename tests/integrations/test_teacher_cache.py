"""What the cache of a teacher's outputs keeps, and what it leaves out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from integrations.test_distillation import batch, moved
from integrations.test_trainer import tiny_bert
from torch import nn

from pybsp import DistillationConfig, Distiller
from pybsp.integrations.teacher_cache import TeacherCache, TeacherOutputs


class Counting(nn.Module):
    """A teacher that counts its calls."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.calls = teacher, 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.teacher(**inputs)


def test_the_cache_gives_what_the_teacher_gave() -> None:
    """Rows in another order and with other padding; only rounded to float16."""
    student = tiny_bert().train()
    teacher = Counting(moved(student))
    cfg = DistillationConfig(cache_bytes=1 << 20)
    inputs = batch(labels=False)
    longer = {k: F.pad(v.flip(0), (0, 2)) for k, v in inputs.items()}
    with Distiller(student, teacher, cfg) as distiller:
        first = student(**inputs).loss
        again = student(**longer).loss
        torch.testing.assert_close(again, first, rtol=1e-3, atol=1e-5)
        assert (teacher.calls, len(distiller.cache)) == (1, 4)
        changed = {
            **inputs,
            "input_ids": inputs["input_ids"] * inputs["attention_mask"],
        }
        changed["input_ids"][0, 0] += 1
        student(**changed)
        assert (teacher.calls, len(distiller.cache)) == (2, 5)


def test_the_cache_keeps_its_limit_and_leaves_out_what_it_cannot_know() -> None:
    inputs = batch(labels=False)
    outputs = TeacherOutputs(
        {"logits": torch.zeros(4, 2)}, (torch.zeros(4, 8, 32),) * 3
    )
    largest = 2 * 4 + 3 * 8 * 32 * 2
    cache = TeacherCache(largest + 10)
    keys = cache.keys(inputs)
    cache.keep(keys, inputs, outputs)
    assert (len(cache), cache.used) == (1, largest)
    assert cache.find(keys, inputs) is None
    assert cache.find(keys[:1], {k: v[:1] for k, v in inputs.items()}) is not None
    assert TeacherCache(0).keys(inputs) == []
    assert cache.keys({**inputs, "inputs_embeds": torch.zeros(4, 8, 32)}) == []
    assert cache.keys({"input_ids": inputs["input_ids"]}) == []
    per_token = TeacherOutputs({"logits": torch.zeros(4, 8, 2)}, ())
    fresh = TeacherCache(1 << 20)
    fresh.keep(fresh.keys(inputs), inputs, per_token)
    assert len(fresh) == 0


def test_the_same_tokens_at_other_positions_are_another_example() -> None:
    """Padding in front moves the positions of BERT's tokens, and so its outputs."""
    student = tiny_bert().train()
    teacher = Counting(moved(student))
    cfg = DistillationConfig(cache_bytes=1 << 20)
    right = batch(labels=False)
    left = {k: F.pad(v, (3, 0)) for k, v in right.items()}
    with Distiller(student, teacher):
        expected = student(**left).loss
    with Distiller(student, teacher, cfg) as distiller:
        student(**right)
        calls = teacher.calls
        torch.testing.assert_close(student(**left).loss, expected)
        assert (teacher.calls, len(distiller.cache)) == (calls + 1, 8)
        again = student(**{k: F.pad(v, (0, 2)) for k, v in left.items()}).loss
        torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-5)
        assert teacher.calls == calls + 1
