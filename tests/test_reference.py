"""The defining twins, against sums and loops written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pybsp import reference
from pybsp.blocks import block_view

SHAPES = [((4, 6), (2, 3)), ((4, 6), (1, 6)), ((4, 6), (4, 1)), ((4, 6), (1, 1))]
shapes = pytest.mark.parametrize(("shape", "block_shape"), SHAPES)


def each_block(tensor: torch.Tensor, block_shape: Any) -> list[torch.Tensor]:
    view = block_view(tensor, block_shape)
    return [view[i, j] for i in range(view.shape[0]) for j in range(view.shape[1])]


@shapes
def test_block_norms(shape: Any, block_shape: Any) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    norms = reference.block_norms(weight, block_shape).flatten()
    for norm, block in zip(norms, each_block(weight, block_shape), strict=True):
        total = sum(float(w) ** 2 for w in block.flatten())
        assert float(norm) == pytest.approx(math.sqrt(total))


@shapes
def test_group_lasso_grad_is_the_gradient_of_the_penalty(
    shape: Any, block_shape: Any
) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norms = torch.stack([b.norm() for b in each_block(weight, block_shape)])
    factors = torch.rand(norms.shape, dtype=torch.float64)
    penalty = 0.3 * (factors * norms).sum()
    (expected,) = torch.autograd.grad(penalty, weight)
    grad = torch.ones_like(weight)
    grid = reference.block_norms(weight.detach(), block_shape).shape
    value = reference.group_lasso_grad_(
        grad, weight.detach(), factors.view(grid), 0.3, block_shape
    )
    assert value == pytest.approx(float(penalty.detach()))
    torch.testing.assert_close(grad, 1 + expected)


def test_group_lasso_grad_of_a_zero_block_is_zero() -> None:
    weight = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    grad = torch.zeros(2, 2)
    value = reference.group_lasso_grad_(
        grad, weight, torch.tensor([[7.0, 2.0]]), 0.5, (2, 1)
    )
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.6], [0.0, 0.8]]))
    assert value == pytest.approx(5.0)


@shapes
def test_group_lasso_prox_minimises_its_objective(shape: Any, block_shape: Any) -> None:
    # argmin_v  ||v - w||^2 / 2 + threshold ||v||, block by block (Yuan & Lin 2006)
    weight = torch.randn(shape, dtype=torch.float64)
    norms = reference.block_norms(weight, block_shape)
    thresholds = norms * torch.rand(norms.shape) * 1.5
    result = weight.clone()
    assert reference.group_lasso_prox_(result, thresholds, block_shape) is result
    triples = zip(
        each_block(result, block_shape),
        each_block(weight, block_shape),
        thresholds.flatten(),
        strict=True,
    )
    for v, w, t in triples:

        def objective(v: torch.Tensor, w: Any = w, t: Any = t) -> float:
            return float((v - w).square().sum() / 2 + t * v.norm())

        best = objective(v)
        for scale in (0.9, 1.1):
            assert objective(v * scale) >= best - 1e-12
        for _ in range(5):
            assert objective(v + 0.05 * torch.randn_like(v)) >= best - 1e-12
        assert bool(v.any()) == bool(w.norm() > t)


def test_prox_and_mask_give_exact_positive_zeros_and_keep_nan() -> None:
    weight = torch.tensor([[-1.0, torch.nan], [-1.0, 1.0]])
    reference.group_lasso_prox_(weight, torch.tensor([[9.0, 9.0]]), (2, 1))
    assert weight[:, 0].tolist() == [0.0, 0.0]
    assert not weight[:, 0].signbit().any()
    assert weight[:, 1].isnan().all()
    mask = torch.tensor([[False, False]])
    reference.apply_block_mask_(weight, mask, (2, 1))
    assert torch.equal(weight, torch.zeros(2, 2))
    assert not weight.signbit().any()


def test_block_mask() -> None:
    scores = torch.tensor([[1.0, 3.0], [3.0, 2.0]])
    assert reference.block_mask(scores, 1).tolist() == [[False, True], [False, False]]
    assert reference.block_mask(scores, 3).tolist() == [[False, True], [True, True]]
    assert not reference.block_mask(scores, 0).any()
    assert reference.block_mask(scores, 4).all()


def test_reweight() -> None:
    norms = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(
        reference.reweight(norms, 1e-3), torch.tensor([1000.0, 1 / 1.001])
    )


def test_fields_and_dense() -> None:
    crow = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    col = torch.tensor([0, 2, 1], dtype=torch.int32)
    values = torch.arange(1.0, 13.0).view(3, 2, 2).requires_grad_()
    dense = reference.block_sparse_to_dense(crow, col, values, (6, 6))
    assert reference.block_row_indices(crow, col).tolist() == [0, 0, 2]
    expected = torch.zeros(6, 6)
    expected[:2, :2], expected[:2, 4:], expected[4:, 2:4] = values.detach()
    assert torch.equal(dense, expected)
    assert torch.equal(reference.gather_blocks(dense, crow, col, (2, 2)), values)
    dense.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    x = torch.randn(3, 6)
    y = reference.block_sparse_linear(
        x, crow, col, values, (6, 6), torch.ones(6), "relu"
    )
    torch.testing.assert_close(y, torch.relu(x @ expected.t() + 1))
