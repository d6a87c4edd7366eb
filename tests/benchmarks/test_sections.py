"""Sections run on small cases; their files, targets and turns say what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pybsp
from benchmarks import layers, result, section, turns, whole_encoder
from benchmarks.section import Options, Section
from benchmarks.sections import SECTIONS

ONE_CASE = Options(
    quick=True, layers=("minilm_attention",), blocks=((8, 1),), tokens=(96,),
    sparsities=(0.5, 0.8, 0.9),
)  # fmt: skip


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions on tiles and the bandwidth, in torch, where the build has none."""

    def product(x: Any, W: Any, bias: Any = None, *, out: Any = None) -> Any:
        y = pybsp.block_sparse_linear(x, W, bias)
        return y if out is None else out.copy_(y)

    stubs = {
        "pack_tokens": lambda x: x,
        "unpack_tokens": lambda x: x,
        "block_sparse_linear_tiles": product,
        "block_sparse_linears": lambda x, matrices, biases: [
            product(x, *pair) for pair in zip(matrices, biases, strict=True)
        ],
        "read_bandwidth": lambda nbytes: 1e10 + nbytes,
    }
    for name, stub in stubs.items():
        if not hasattr(pybsp.ops, name):
            monkeypatch.setattr(pybsp.ops, name, stub, raising=False)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "name",
    [
        "kernel",
        "isa",
        "few_tokens",
        "block_sparse_linear",
        "block_sparse_linears",
        "work",
    ],
)
def test_a_section_measures_one_case_and_shows_it(name: str) -> None:
    (part,) = (part for part in SECTIONS if part.name == name)
    active = pybsp.ops.active_isa()
    data = part.run(ONE_CASE)
    assert pybsp.ops.active_isa() == active
    for row in data["rows"]:
        assert (row["M"], row["K"]) == (96, 384)
        assert row["N"] == (384 if name != "block_sparse_linears" else 3 * 384)
        assert row["block_shape"] == [8, 1]
        assert row["dtype"] == "float32"
        assert row["threads"] == 1
        assert row["peak_gflops"] > 0
        assert all(t["median_ms"] >= t["best_ms"] > 0 for t in row["times"].values())
    head, rows = part.summary(data)
    assert rows
    assert all(len(row) == len(head) for row in rows)
    json.dumps(data)


def test_a_section_says_what_this_build_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(pybsp.ops, "read_bandwidth", raising=False)
    (part,) = (part for part in SECTIONS if part.name == "few_tokens")
    assert part.run(Options())["missing"] == "pybsp.ops.read_bandwidth"


def test_narrowed_and_quick_runs_save_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(result, "save", lambda name, _: saved.append(name))
    part = Section("part", lambda _: {"rows": []}, section.every_column)
    for options in (ONE_CASE, Options(quick=True), Options(tokens=(1,))):
        part.run(options)
    assert saved == []
    part.run(Options())
    assert saved == ["part"]


def test_wrong_results_are_not_timed() -> None:
    layer = layers.random_layer("minilm_attention", (384, 384), (8, 1), 0.8)
    x = layers.random_tokens(3, 384)
    y = pybsp.block_sparse_linear(x, layer.matrix, layer.bias)
    layers.check("right", y, x, layer)
    y[1, 7] += 1e-3
    with pytest.raises(AssertionError, match="wrong"):
        layers.check("one element off by a thousandth", y, x, layer)
    layers.check_int8("rounded", y, x, layer)
    with pytest.raises(AssertionError, match="wrong"):
        layers.check_int8("scaled by a tenth", y * 1.1, x, layer)


def test_targets_judge_the_median_and_every_case() -> None:
    (one,) = section.reach("speed", [0.9, 0.8, 0.5], median=0.8, every=0.6)
    assert one["target"] == ">= 0.80 (median), >= 0.60 (every case)"
    assert one["measured"] == "0.80 (least 0.50)"
    assert not one["reached"]
    (one,) = section.reach("time", [0.1, 0.2], every=0.2, at_most=True, form="{:.0%}")
    assert (one["target"], one["reached"]) == ("<= 20% (every case)", True)
    assert section.reach("nothing measured", [], median=1.0) == []


def test_turns_compare_round_by_round() -> None:
    class Elsewhere:
        def turn(self) -> float:
            return 0.5

    calls: list[str] = []
    rounds = turns.take_turns(
        {"here": lambda: calls.append("call"), "elsewhere": Elsewhere()}, min_rounds=3
    )
    assert len(rounds.seconds["here"]) == len(rounds.seconds["elsewhere"]) >= 3
    assert rounds.median("elsewhere") == 0.5
    assert rounds.ratio("elsewhere", "here") > 1
    assert len(calls) > len(rounds.seconds["here"])


def test_the_least_number_of_rounds_is_taken_in_any_case() -> None:
    rounds = turns.take_turns(
        {"call": lambda: None}, seconds=0.0, min_rounds=7, max_rounds=5
    )
    assert len(rounds.seconds["call"]) == 7


def test_the_yardstick_is_taken_in_every_round() -> None:
    class Slowing:
        """A machine that a neighbour slows from round to round."""

        calls = 0

        def peak(self) -> float:
            self.calls += 1
            return 1e9 / self.calls

        def turn(self) -> float:
            return 6e-6 * self.calls

    machine = Slowing()
    rounds = turns.take_turns(
        {"peak": turns.OneOperation(machine.peak), "call": machine}, min_rounds=3
    )
    assert len(rounds.seconds["peak"]) >= 3
    assert rounds.over("call", {"peak": 4000}) == pytest.approx(1.5)
    assert rounds.best("call") == min(rounds.seconds["call"]) < rounds.median("call")


def test_results_are_json_with_a_row_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["/x/benchmarks/__main__.py", "--deepsparse", "/y/python"]
    )
    rows = [{"M": 1, "times": {"torch": 2}}, {"M": 2, "times": {}}]
    text = result.save("part", {"rows": rows, "targets": []}).read_text()
    found = json.loads(text)
    assert found["rows"] == rows
    assert found["targets"] == []
    assert found["command"] == "python -m benchmarks --deepsparse python"
    assert {"commit", "environment"} <= set(found)
    assert '  {"M": 2, "times": {}}\n' in text


def test_random_layers_keep_what_was_asked() -> None:
    layer = layers.random_layer("minilm_attention", (384, 384), (16, 4), 0.75)
    assert layer.matrix.density == 0.25
    assert torch.equal(layer.matrix.to_dense(), layer.weight)
    assert layer.operations(10) == 2 * 10 * 384 * 384 // 4


@pytest.mark.parametrize(
    ("narrowed", "cases"),
    [({}, len(whole_encoder.CASES)),
     ({"blocks": ((8, 1),), "sparsities": (0.8,), "tokens": (128,)}, 4),
     ({"sparsities": (0.0,)}, 1), ({"blocks": ((2, 2),)}, 0)],
)  # fmt: skip
def test_options_narrow_whole_encoders(narrowed, cases):
    found = whole_encoder.chosen(whole_encoder.CASES, Options(**narrowed))
    assert len(found) == cases
    assert set(found) <= set(whole_encoder.CASES)
