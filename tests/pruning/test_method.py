"""The penalty does what it says: it splits the blocks, and the cut then hurts less.

A small network learns labels that depend on eight directions of its input. Trained the
same way with and without the penalty, its blocks are cut to 20 % in one go.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pybsp import BlockPruner, BlockPruningConfig
from pybsp.pruning.penalty import block_norms

STEPS = 500


def samples(seed: int, count: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    task = torch.Generator().manual_seed(123)
    inner, outer = (
        torch.randn(64, 8, generator=task),
        torch.randn(8, 10, generator=task),
    )
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    return x, (torch.tanh(x @ inner * 0.375) @ outer).argmax(1)


def accuracy(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


def separation(values: torch.Tensor) -> float:
    """Share of the variance between the two best groups (Otsu 1979): 0.64 for a normal
    distribution, 0.75 for an even spread, 1 for two points."""
    ordered = values.flatten().double().sort().values
    count = ordered.numel()
    low = torch.arange(1, count).double()
    sums = ordered.cumsum(0)
    gap = sums[:-1] / low - (sums[-1] - sums[:-1]) / (count - low)
    between = low * (count - low) / count**2 * gap.square()
    return float(between.max() / ordered.var(unbiased=False))


def train_to_the_cut(**settings: Any) -> dict[str, float]:
    """Accuracy before and right after the cut; how the block norms lie before it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    cfg = BlockPruningConfig(
        target_modules=["0", "2"], phases=(150, 351, 0), reweight_every=25, **settings
    )
    pruner = BlockPruner(model, cfg, total_steps=STEPS + 1).attach(optimizer)
    x, labels = samples(1)
    batches = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(0, len(x), (128,), generator=batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
        scheduler.step()
    norms = torch.cat(
        [block_norms(model[i].weight.detach(), (8, 1)).flatten() for i in (0, 2)]
    )
    test = samples(2)
    before = accuracy(model, *test)
    pruner.cut()
    return {
        "before": before,
        "after": accuracy(model, *test),
        "separation": separation(norms),
        "near_zero": float((norms < 0.1 * norms.quantile(0.95)).float().mean()),
    }


@pytest.fixture(scope="module")
def magnitude() -> dict[str, float]:
    return train_to_the_cut(method="magnitude")


@pytest.mark.parametrize(
    "settings",
    [
        {"reg_lambda": 3e-4},
        {"penalty": "proximal", "reg_lambda": "auto"},
        {"penalty": "decoupled", "reg_lambda": "auto"},
    ],
    ids=["gradient", "proximal", "decoupled"],
)
def test_blocks_split_and_the_cut_hurts_less(
    magnitude: dict[str, float], settings: dict[str, Any]
) -> None:
    found = train_to_the_cut(**settings)
    assert found["near_zero"] > 0.4
    assert magnitude["near_zero"] < 0.05
    assert found["separation"] > magnitude["separation"] + 0.08
    assert found["before"] > magnitude["before"] - 0.03
    assert found["after"] > magnitude["after"] + 0.05
