"""The service loop and how it and the memory benchmark read resident memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from benchmarks import service
from benchmarks.resident import MB, grown, resident

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc"
)


def test_resident_memory_by_what_it_is(tmp_path: Path) -> None:
    file, size = (tmp_path / "pages").resolve(), 64 * MB
    file.write_bytes(b"x" * size)
    with file.open("rb") as opened:
        before = resident(file)
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    assert len(pages[:: mmap.PAGESIZE]) == size // mmap.PAGESIZE  # reads every page
    after = grown(before, resident(file))
    assert after["file"] == 64
    assert abs(after["anonymous"]) < 8
    for at in range(0, size // 2, mmap.PAGESIZE):
        pages[at] = 0  # private copies of half of the pages
    after = grown(before, resident(file))
    assert after["file"] == 32
    assert 24 < after["anonymous"] < 40
    pages.close()
    assert resident(file)["file"] == 0


def test_every_request_is_answered_once_and_errors_are_kept() -> None:
    answered: list[int] = []

    def answer(number: int) -> None:
        answered.append(number)
        if number == 7:
            raise ValueError("no answer")

    _, memory, errors = service.serve(4, 100, answer, 10)
    assert sorted(answered) == list(range(100))
    assert len(memory) == 10
    assert errors == ["request 7: ValueError('no answer')"]


def test_requests_are_mixed() -> None:
    made = service.requests(300, words=50)
    shapes = {tuple(inputs["input_ids"].shape) for inputs in made}
    assert {batch for batch, _ in shapes} == {1, 2, 3, 4}
    assert len({length for _, length in shapes}) > 50
    padded = [inputs["attention_mask"] for inputs in made if "attention_mask" in inputs]
    assert len(padded) == 200
    assert all(mask.sum(1).min() > 0 for mask in padded)
    assert any(mask.sum() < mask.numel() for mask in padded)
