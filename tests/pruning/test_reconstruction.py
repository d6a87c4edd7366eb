"""Costs and fits against least squares on the inputs themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pybsp.blocks import BlockShape, expand_blocks, grid_shape
from pybsp.pruning import reconstruction
from pybsp.pruning.penalty import block_norms
from pybsp.pruning.reconstruction import (
    DAMPING,
    InputMoments,
    output_energy,
    refit,
    removal_costs,
)

SHAPES = [(8, 1), (4, 4), (1, 3), (16, 24), (2, 12)]


def inputs(seed: int = 0, count: int = 300, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    return 1.0 + torch.randn(count, width, generator=generator) @ mixed


def layer(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 24, generator=generator)
    return weight, torch.randn(16, generator=generator)


def moments(dense: torch.Tensor, pruned: torch.Tensor | None = None) -> InputMoments:
    found = InputMoments()
    pruned = dense if pruned is None else pruned
    for part in (slice(0, 100), slice(100, None)):
        found.add(dense[part], pruned[part])
    return found


def least_squares(
    weight: torch.Tensor, mask: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor
) -> torch.Tensor:
    """The twin of ``refit``: row by row, on the inputs; damping as further inputs."""
    weight, dense, pruned = weight.double(), dense.double(), pruned.double()
    count, width = pruned.shape
    covariance = pruned.T @ pruned / count
    damping = (DAMPING * covariance.diagonal().mean() + 1e-12) * count
    x = torch.cat([pruned, damping.sqrt() * torch.eye(width)])
    y = torch.cat([dense @ weight.T, damping.sqrt() * weight.T])
    fitted = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero().squeeze(1)
        fitted[row, kept] = torch.linalg.lstsq(x[:, kept], y[:, row]).solution
    return fitted


@pytest.mark.parametrize("block_shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_refit_is_least_squares(block_shape: BlockShape, with_bias: bool) -> None:
    weight, bias = layer()
    dense, pruned = inputs(0), inputs(0) + 0.1 * inputs(5)
    mask = torch.rand(grid_shape(weight.shape, block_shape)) < 0.5
    fitted, shifted = refit(
        weight, bias if with_bias else None, mask, block_shape, moments(dense, pruned)
    )
    elements = expand_blocks(mask, block_shape)
    centre = (dense.mean(0), pruned.mean(0)) if with_bias else (0.0, 0.0)
    expected = least_squares(weight, elements, dense - centre[0], pruned - centre[1])
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-4, atol=1e-4)
    assert bool((fitted[~elements] == 0).all())
    if shifted is None:
        assert not with_bias
        return
    wanted, got = dense @ weight.T + bias, pruned @ fitted.T + shifted
    torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)


def test_nothing_removed_changes_nothing() -> None:
    weight, bias = layer()
    mask = torch.ones(2, 24, dtype=torch.bool)
    fitted, shifted = refit(weight, bias, mask, (8, 1), moments(inputs()))
    torch.testing.assert_close(fitted, weight, rtol=1e-4, atol=1e-5)
    assert shifted is not None
    torch.testing.assert_close(shifted, bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_shape", SHAPES)
def test_the_first_removal_costs_what_least_squares_says(
    block_shape: BlockShape,
) -> None:
    """Of every row of blocks the cheapest goes first; its cost is the error of the best
    fit without it, of all fits without one block the least."""
    weight, _ = layer()
    x = inputs()
    costs = removal_costs(weight, moments(x).covariance(False), block_shape)
    rows, cols = grid_shape(weight.shape, block_shape)
    height = block_shape[0]
    for row in range(rows):
        lines = slice(row * height, (row + 1) * height)
        errors = []
        for col in range(cols):
            mask = torch.ones(rows, cols, dtype=torch.bool)
            mask[row, col] = False
            elements = expand_blocks(mask, block_shape)
            fitted = least_squares(weight, elements, x, x)
            moved = (fitted - weight.double())[lines]
            covariance = x.double().T @ x.double() / len(x)
            damping = DAMPING * covariance.diagonal().mean()
            error = (x.double() @ moved.T).square().sum() / len(x)
            errors.append(float(error + damping * moved.square().sum()))
        cheapest = min(range(cols), key=errors.__getitem__)
        assert float(costs[row].min()) == pytest.approx(errors[cheapest], rel=1e-3)
        if cols > 1:
            assert int(costs[row].argmin()) == cheapest


def test_threads_take_other_rows_and_each_computes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, _ = layer()
    covariance = moments(inputs()).covariance(False)
    expected = removal_costs(weight, covariance, (2, 1))
    seen: list[tuple[int, int]] = []

    def watched(rows: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append((len(rows), torch.get_num_threads()))
        return costs_of_rows(rows, *others)

    costs_of_rows = reconstruction._costs_of_rows
    monkeypatch.setattr(reconstruction, "_costs_of_rows", watched)
    monkeypatch.setattr(reconstruction, "_WORKING_SET", 9 * 24 * 24)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = removal_costs(weight, covariance, (2, 1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == [(2, 1), (3, 1), (3, 1)]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (1, 3)])
def test_costs_choose_better_blocks_than_norms(block_shape: BlockShape) -> None:
    weight, bias = layer()
    x = inputs()
    seen = moments(x)
    energy = output_energy(weight, seen.covariance(True))
    assert energy == pytest.approx(float((x @ weight.T).var(0).sum()), rel=0.01)

    def error(scores: torch.Tensor) -> float:
        mask = scores > scores.median()
        fitted, shifted = refit(weight, bias, mask, block_shape, seen)
        difference = x @ fitted.T + shifted - x @ weight.T - bias
        return float(difference.square().sum() / len(x)) / energy

    by_cost = error(removal_costs(weight, seen.covariance(True), block_shape))
    by_norm = error(block_norms(weight, block_shape))
    assert by_cost < 0.8 * by_norm
