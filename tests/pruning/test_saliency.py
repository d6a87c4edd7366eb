"""Scores from gradients, and the blocks that they keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pybsp import BlockPruner, BlockPruningConfig
from pybsp.pruning.saliency import RATE, GradientSaliency
from pybsp.pruning.state import load_state, save_state

STEPS = 20


def config(ramp: str = "cubic") -> BlockPruningConfig:
    return BlockPruningConfig(
        block_shape=(4, 2), saliency="taylor", method="magnitude", ramp=ramp,
        target_sparsity=0.5, phases=(0.0, 0.6, 0.4), reweight_every=6,
    )  # fmt: skip


def pruner_and_optimizer(
    cfg: BlockPruningConfig,
) -> tuple[nn.Linear, BlockPruner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    return model[0], pruner, optimizer


def train(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Only the first four inputs ever differ from zero."""
    for step in steps:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        x[:, 4:] = 0.0
        optimizer.zero_grad()
        wanted = 3.0 * x[:, :4].repeat(1, 2)
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()


def test_scores_are_the_formula() -> None:
    cfg = config()
    _, pruner, _ = pruner_and_optimizer(cfg)
    saliency = GradientSaliency(cfg, pruner.targets)
    expected = torch.zeros(2, 4)
    for step in range(3):
        weight, grad = torch.randn(8, 8), torch.randn(8, 8)
        parameter = nn.Parameter(weight)
        parameter.grad = 8.0 * grad
        saliency.add({"0": parameter}, scale=8.0)
        for row in range(2):
            for col in range(4):
                block = slice(4 * row, 4 * row + 4), slice(2 * col, 2 * col + 2)
                change = (weight[block] * grad[block]).sum()
                if step == 0:
                    expected[row, col] = change**2
                else:
                    expected[row, col] += RATE * (change**2 - expected[row, col])
    torch.testing.assert_close(saliency.scores["0"], expected)
    torch.testing.assert_close(saliency.block_scores()["0"], expected / 8)


@pytest.mark.parametrize("scope", ["global", "layer", "balanced"])
@pytest.mark.parametrize("kind", ["taylor", "magnitude"])
def test_removed_blocks_stay_removed(kind: str, scope: str) -> None:
    cfg = BlockPruningConfig(
        block_shape=(4, 1), saliency=kind, method="magnitude", ramp="cubic",
        phases=(0.0, 0.8, 0.2), reweight_every=2, scope=scope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = BlockPruner(model, cfg, total_steps=100).attach(optimizer)
    removed: dict[str, torch.Tensor] = {}
    for _ in range(100):
        optimizer.zero_grad()
        x = torch.randn(16, 32)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        for name, mask in pruner.masks.items():
            gone = removed.get(name, torch.zeros_like(mask))
            assert not bool((gone & mask).any())
            removed[name] = ~mask
    assert sum(int(gone.sum()) for gone in removed.values()) > 0
    pruner.finalize()


@pytest.mark.parametrize("ramp", ["one_shot", "cubic"])
def test_useful_blocks_stay_though_they_are_small(ramp: str) -> None:
    layer, pruner, optimizer = pruner_and_optimizer(config(ramp))
    with torch.no_grad():
        layer.weight[:, :4] *= 0.1
    train(layer, optimizer, range(STEPS))
    pruner.finalize()
    assert bool((layer.weight[:, :4] != 0).all())
    assert bool((layer.weight[:, 4:] == 0).all())


def test_a_resumed_run_keeps_the_same_blocks(tmp_path: Path) -> None:
    whole, _, optimizer = pruner_and_optimizer(config("one_shot"))
    train(whole, optimizer, range(STEPS))
    layer, pruner, optimizer = pruner_and_optimizer(config("one_shot"))
    train(layer, optimizer, range(7))
    save_state(pruner.state_dict(), tmp_path / "state")
    weights, moments = layer.state_dict(), optimizer.state_dict()
    again, pruner, optimizer = pruner_and_optimizer(config("one_shot"))
    again.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    pruner.load_state_dict(load_state(tmp_path / "state"))
    train(again, optimizer, range(7, STEPS))
    assert torch.equal(again.weight, whole.weight)
    assert not pruner.saliency.scores


def test_a_cut_without_gradients_is_refused() -> None:
    layer, pruner, optimizer = pruner_and_optimizer(config())
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="no gradients yet"):
        pruner.cut()
    assert not pruner.at_target
    assert torch.equal(layer.weight, before)
    train(layer, optimizer, range(1))
    pruner.cut()
    pruner.finalize()


def test_norms_gather_nothing() -> None:
    cfg = replace(config(), saliency="magnitude")
    layer, pruner, optimizer = pruner_and_optimizer(cfg)
    train(layer, optimizer, range(3))
    assert not pruner.saliency.scores
