"""Ranking block shapes with costs that are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import pybsp
from pybsp import BlockPruningConfig, suggest_block_shape
from pybsp.costs import CostModel, Fit, Machine
from pybsp.nn import suggest


class FakeCosts(CostModel):
    """A weight costs 1 us a token dense; packed 0.5 us and 3 us for each block."""

    def predict_dense(self, tokens: int, shape: tuple[int, int]) -> float:
        return float(tokens * shape[0] * shape[1])

    def predict_sparse(
        self, tokens: int, shape: Any, block_shape: Any, density: float
    ) -> float:
        kept = density * shape[0] * shape[1]
        return tokens * kept * (0.5 + 3 / (block_shape[0] * block_shape[1]))


@pytest.fixture(autouse=True)
def _known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCosts(Fit({}, 0.03), Fit({}, 0.04), Machine(8, 3))
    monkeypatch.setattr(suggest.CostModel, "load_or_fit", lambda: fake)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 24))


def test_ranks_by_time_and_reports_bytes_and_refusals() -> None:
    shapes = [(2, 1), (8, 1), (16, 1), (8, 4)]
    report = suggest_block_shape(model(), 10, 0.75, shapes)
    assert [c.block_shape for c in report.candidates] == [
        (8, 4),
        (8, 1),
        (2, 1),
        (16, 1),
    ]
    assert report.best == (8, 4)
    weights = 16 * 64 + 64 * 24
    assert report.layers == 2
    assert report.dense_us == 10 * weights
    assert report.dense_bytes == 4 * weights
    best, second, _, refused = report.candidates
    assert best.sparse_us == pytest.approx(10 * weights * 0.25 * (0.5 + 3 / 32))
    assert report.speedup(best) == pytest.approx(4 / (0.5 + 3 / 32))
    assert "'2'" in refused.refused
    assert "24 is not a multiple of 16" in refused.refused
    assert refused.sparse_us is refused.packed_bytes is report.speedup(refused) is None
    # values, a column index for each block, a row pointer for each block row and one.
    kept = weights // 4
    assert second.packed_bytes == 4 * (kept + kept // 8 + (64 + 24) // 8 + 2)
    assert report.error == pytest.approx(0.05)


def test_bytes_are_those_of_a_packed_model() -> None:
    network = model()
    report = suggest_block_shape(network, sparsity=0.75, block_shapes=[(8, 1)])
    for linear in (network[0], network[2]):
        blocks = torch.ones(linear.out_features // 8 * linear.in_features)
        blocks[: int(0.75 * blocks.numel())] = 0
        mask = blocks.view(-1, linear.in_features).repeat_interleave(8, 0)
        with torch.no_grad():
            linear.weight.mul_(mask)
    packed = pybsp.pack_(network, (8, 1), min_gain=0)
    assert report.candidates[0].packed_bytes == packed.packed_bytes


def test_prints_as_a_table_and_goes_into_json() -> None:
    report = suggest_block_shape(model(), block_shapes=[(8, 1), (1, "in/8"), (5, 1)])
    text = str(report)
    for part in ("8x1", "1xin/8", "5x1", "does not divide", "2 linear layers at 80%"):
        assert part in text
    record = json.loads(json.dumps(report.to_dict()))
    assert record["best"] == [8, 1]
    assert record["candidates"][1]["block_shape"] == [1, "in/8"]
    assert record["candidates"][0]["speedup"] > record["candidates"][1]["speedup"]


def test_the_best_shape_can_be_pruned_with() -> None:
    report = suggest_block_shape(model())
    assert BlockPruningConfig(block_shape=report.best).block_shape == report.best


def test_takes_the_layers_that_the_pruner_would() -> None:
    network = nn.ModuleDict({"a": nn.Linear(8, 8), "classifier": nn.Linear(8, 8)})
    assert suggest_block_shape(network, block_shapes=[(8, 1)]).layers == 1
    everything = suggest_block_shape(network, block_shapes=[(8, 1)], exclude_modules=())
    assert everything.layers == 2
    only = suggest_block_shape(network, block_shapes=[(8, 1)], target_modules=("a",))
    assert only.layers == 1


def test_a_shared_weight_is_multiplied_twice_and_stored_once() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[1].weight = network[0].weight
    report = suggest_block_shape(network, 1, block_shapes=[(8, 1)])
    assert report.layers == 2
    assert report.dense_us == 2 * 64
    assert report.dense_bytes == 4 * 64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "model"}, TypeError, "nn.Module"),
        ({"tokens": 0}, ValueError, "tokens"),
        ({"tokens": True}, ValueError, "tokens"),
        ({"sparsity": 80}, ValueError, "0.8"),
        ({"sparsity": float("nan")}, ValueError, "sparsity"),
        ({"block_shapes": []}, ValueError, "empty"),
        ({"block_shapes": [(0, 1)]}, ValueError, "positive"),
        ({"block_shapes": [(5, 1), (7, 1)]}, ValueError, "none of the 2 block shapes"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "no nn.Linear"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        suggest_block_shape(**{"model": model(), **arguments})
    assert "\n" not in str(caught.value)
