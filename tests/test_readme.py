"""The README's example is a program that works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_example_prunes_saves_and_loads_a_packed_model(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(README), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "torch.Size([4, 2]) BlockSparseLinear(" in printed
    assert "block_shape=(8, 1), density=0." in printed
    names = {file.name for file in (tmp_path / "pruned").iterdir()}
    assert {"model.safetensors", "model.pybsp.safetensors", "config.json"} <= names
