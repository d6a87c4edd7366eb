"""Exact counts, ties, caps, pools."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from pybsp import BlockPruningConfig
from pybsp.pruning.masks import (
    block_scores,
    check_feasible,
    norm_scores,
    pools,
    select_masks,
)
from pybsp.pruning.targets import Target


def targets(*grids: tuple[int, int], shape: tuple[int, int] = (2, 1)) -> list[Target]:
    return [
        Target(f"l{i}", (rows * shape[0], cols * shape[1]), shape)
        for i, (rows, cols) in enumerate(grids)
    ]


def masks_of(
    norms: list[torch.Tensor], layers: list[Target], **settings: Any
) -> dict[str, torch.Tensor]:
    cfg = BlockPruningConfig(**settings)
    by_name = norm_scores(
        {t.name: n for t, n in zip(layers, norms, strict=True)},
        {t.name: t for t in layers},
        cfg.ranking,
    )
    found: dict[str, torch.Tensor] = {}
    for pool in pools(layers, cfg):
        check_feasible(pool, cfg.max_layer_sparsity)
        found.update(select_masks(by_name, pool, cfg.max_layer_sparsity))
    return found


def removed(masks: dict[str, torch.Tensor]) -> int:
    return sum(m.numel() - int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer", "balanced"])
def test_counts_are_exact(sparsity: float, scope: str) -> None:
    layers = targets((8, 10), (7, 9), (32, 5))
    torch.manual_seed(0)
    norms = [torch.rand(t.grid) for t in layers]
    masks = masks_of(norms, layers, target_sparsity=sparsity, scope=scope)
    if scope == "global":
        total = sum(n.numel() for n in norms)
        assert removed(masks) == int(sparsity * total + 0.5)
        return
    for layer, norm in zip(layers, norms, strict=True):
        mask = masks[layer.name]
        assert removed({"": mask}) == int(sparsity * mask.numel() + 0.5)
        if scope == "layer":
            assert norm[mask].min() >= norm[~mask].max()


@pytest.mark.parametrize("grid", [(8, 10), (10, 8), (1, 12), (12, 1), (5, 5), (64, 3)])
@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.8])
def test_balanced_lines_keep_alike(grid: tuple[int, int], sparsity: float) -> None:
    layer = targets(grid)[0]
    torch.manual_seed(grid[0])
    norms = torch.rand(grid).round(decimals=1)  # with ties
    settings = {"target_sparsity": sparsity, "max_layer_sparsity": 1.0}
    mask = masks_of([norms], [layer], scope="balanced", **settings)[layer.name]
    lines, scores = (mask, norms) if grid[1] >= grid[0] else (mask.T, norms.T)
    kept = lines.sum(1)
    assert kept.max() - kept.min() <= 1
    for line, score in zip(lines, scores, strict=True):
        if line.any() and not line.all():
            assert score[line].min() >= score[~line].max()
    more, fewer = kept == kept.max(), kept == kept.min()
    if more.any() and (~more).any():
        share = int(kept.min())
        following = scores.sort(1, descending=True).values[:, share]
        assert following[more].min() >= following[fewer].max()


def test_global_ranking_removes_the_weakest_anywhere() -> None:
    layers = targets((4, 4), (4, 4))
    norms = [torch.arange(16.0).view(4, 4) + 100, torch.arange(16.0).view(4, 4) + 1]
    masks = masks_of(norms, layers, target_sparsity=0.25)
    assert masks["l0"].all()
    assert masks["l1"].flatten().tolist() == [False] * 8 + [True] * 8


def test_cap_protects_the_strongest_of_a_weak_layer() -> None:
    layers = targets((4, 5), (4, 5))
    norms = [torch.full((4, 5), 10.0), torch.arange(20.0).view(4, 5) / 100]
    masks = masks_of(
        norms, layers, target_sparsity=0.5, max_layer_sparsity=0.9, ranking="norm"
    )
    assert masks["l1"].flatten().tolist() == [False] * 18 + [True] * 2
    assert removed(masks) == 20


def test_ties_keep_the_first_and_the_exact_count() -> None:
    layers = targets((4, 5), (4, 5))
    norms = [torch.ones(4, 5), torch.ones(4, 5)]
    masks = masks_of(norms, layers, target_sparsity=0.5, max_layer_sparsity=0.95)
    assert removed(masks) == 20
    assert masks["l0"].sum() == 19
    assert masks["l1"].flatten().tolist() == [True] + [False] * 19
    again = masks_of(norms, layers, target_sparsity=0.5, max_layer_sparsity=0.95)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_mixed_block_sizes_meet_the_target_in_weights() -> None:
    small, large = targets((16, 16))[0], Target("big", (32, 32), (4, 4))
    torch.manual_seed(0)
    norms = [torch.rand(small.grid), 3 * torch.rand(large.grid)]
    masks = masks_of(norms, [small, large], target_sparsity=0.6)
    gone = removed({"": masks["l0"]}) * 2 + removed({"": masks["big"]}) * 16
    assert abs(gone - 0.6 * (512 + 1024)) <= 8


def test_rankings() -> None:
    norms = torch.tensor([[2.0, 4.0]])
    assert block_scores(norms, 4, "norm").tolist() == [[2.0, 4.0]]
    assert block_scores(norms, 4, "rms").tolist() == [[1.0, 2.0]]
    relative = block_scores(norms, 4, "relative")
    torch.testing.assert_close(relative, block_scores(norms * 7, 4, "relative"))
    assert relative.mean() == pytest.approx(1.0)
    assert block_scores(norms * 0, 4, "relative").tolist() == [[0.0, 0.0]]


def test_a_layer_with_its_own_target_leaves_the_pool() -> None:
    own = Target("own", (8, 10), (2, 1), own_sparsity=0.5)
    layers = [*targets((4, 10)), own]
    norms = [torch.rand(4, 10), torch.rand(4, 10) + 100]
    masks = masks_of(norms, layers, target_sparsity=0.8)
    assert removed({"": masks["own"]}) == 20
    assert removed({"": masks["l0"]}) == 32


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_threshold_removes_what_scores_no_more(scope: str) -> None:
    score = torch.arange(1.0, 11.0).view(2, 5)
    norms = [score * math.sqrt(2), score * math.sqrt(2)]  # blocks of two weights
    layers = [replace(t, threshold=4.0) for t in targets((2, 5), (2, 5))]
    layers[1] = replace(layers[1], threshold=9.5)
    masks = masks_of(norms, layers, scope=scope, max_layer_sparsity=0.8)
    assert torch.equal(masks["l0"], score > 4)
    # two of ten are protected
    assert torch.equal(masks["l1"], score > 8)


def test_level_scales_the_target() -> None:
    layers = targets((10, 10))
    (pool,) = pools(layers, BlockPruningConfig(target_sparsity=0.8))
    scores = {"l0": torch.rand(10, 10)}
    assert removed(select_masks(scores, pool, 0.95, 0.0)) == 0
    assert removed(select_masks(scores, pool, 0.95, 0.5)) == 40


def test_a_whole_matrix_as_one_block_needs_a_cap_of_one() -> None:
    layers = targets((1, 1), (1, 1), (1, 1), (1, 1), shape=(4, 4))
    norms = [torch.full((1, 1), float(i)) for i in range(4)]
    with pytest.raises(ValueError, match="at most 0 can go"):
        masks_of(norms, layers, target_sparsity=0.5)
    masks = masks_of(norms, layers, target_sparsity=0.5, max_layer_sparsity=1.0)
    assert [bool(m) for m in masks.values()] == [False, False, True, True]


def test_an_unreachable_layer_target_is_refused() -> None:
    layers = targets((1, 2), shape=(4, 4))
    with pytest.raises(ValueError, match=r"0\.8 cannot be reached in 'l0'"):
        masks_of([torch.rand(1, 2)], layers, scope="layer")
