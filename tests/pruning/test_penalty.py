"""The penalty's three forms against autograd of the explicit formula."""

from __future__ import annotations

import math

import pytest
import torch

from pybsp import BlockPruningConfig, ops
from pybsp.pruning import penalty
from pybsp.pruning.targets import Target

SHAPES = [(1, 1), (8, 1), (1, 12), (1, 48), (32, 1), (4, 3), (16, 4), (32, 48)]
EPS32 = torch.finfo(torch.float32).eps


def weight_and_factors(
    block_shape: tuple[int, int], layout: str = "rows"
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(32, 48, generator=generator) * 0.05
    if layout == "columns":
        weight = weight.t().contiguous().t()
    factors = ops.reweight(penalty.block_norms(weight, block_shape), 1e-3)
    return weight, factors


def explicit_gradient(
    weight: torch.Tensor,
    factors: torch.Tensor,
    lam: float,
    block_shape: tuple[int, int],
) -> tuple[torch.Tensor, float]:
    """Autograd of ``lam * sum_b R_b ||W_b||``, block by block, in float64."""
    leaf = weight.double().contiguous().requires_grad_()
    rows, cols = block_shape
    total = leaf.new_zeros(())
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            block = leaf[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
            total = total + factors[i, j].double() * block.norm()
    (lam * total).backward()
    assert leaf.grad is not None
    return leaf.grad, float(lam * total.detach())


def tolerance(reference: torch.Tensor, block_shape: tuple[int, int]) -> float:
    size = block_shape[0] * block_shape[1]
    return 4 * EPS32 * math.sqrt(size) * float(reference.abs().max())


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("block_shape", SHAPES)
def test_gradient_form(block_shape: tuple[int, int], layout: str) -> None:
    weight, factors = weight_and_factors(block_shape, layout)
    start = torch.randn_like(weight)
    grad = start.clone()
    value = penalty.add_gradient_(grad, weight, factors, 0.3, block_shape)
    expected, expected_value = explicit_gradient(weight, factors, 0.3, block_shape)
    bound = tolerance(expected.abs() + start.abs(), block_shape)
    torch.testing.assert_close(grad.double(), start + expected, rtol=0, atol=bound)
    assert value == pytest.approx(expected_value, rel=1e-5)
    assert expected.norm() > 0.1


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("block_shape", SHAPES)
def test_decoupled_form(block_shape: tuple[int, int], layout: str) -> None:
    weight, factors = weight_and_factors(block_shape, layout)
    expected, _ = explicit_gradient(weight, factors, 1e-3, block_shape)
    before = weight.clone()
    penalty.gradient_step_(weight, factors, 1e-3, block_shape)
    bound = tolerance(before.abs() + expected.abs(), block_shape)
    torch.testing.assert_close(weight.double(), before - expected, rtol=0, atol=bound)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("block_shape", SHAPES)
def test_proximal_form_is_the_gradient_step_or_zero(
    block_shape: tuple[int, int], layout: str
) -> None:
    weight, factors = weight_and_factors(block_shape, layout)
    norms = penalty.block_norms(weight, block_shape)
    step = float((norms / factors).flatten().median())  # about half the blocks vanish
    expected, _ = explicit_gradient(weight, factors, step, block_shape)
    gone = norms <= step * factors
    expected = weight - expected
    rows, cols = block_shape
    expected[gone.repeat_interleave(rows, 0).repeat_interleave(cols, 1)] = 0.0
    bound = tolerance(weight.abs() * 2, block_shape)
    penalty.proximal_step_(weight, factors, step, block_shape)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=bound)
    assert torch.equal(penalty.block_norms(weight, block_shape) == 0, gone)


def test_zero_blocks_have_zero_gradient() -> None:
    weight = torch.zeros(4, 4)
    factors = ops.reweight(penalty.block_norms(weight, (2, 2)), 1e-3)
    grad = torch.ones(4, 4)
    assert penalty.add_gradient_(grad, weight, factors, 1.0, (2, 2)) == 0.0
    penalty.gradient_step_(weight, factors, 1.0, (2, 2))
    penalty.proximal_step_(weight, factors, 1.0, (2, 2))
    assert (grad == 1).all()
    assert (weight == 0).all()


def test_penalty_of_fresh_factors_is_lambda_times_blocks() -> None:
    weight, factors = weight_and_factors((8, 1))
    norms = penalty.block_norms(weight, (8, 1))
    value = penalty.penalty_value(norms, factors, 1e-4)
    assert value == pytest.approx(1e-4 * norms.numel(), rel=0.02)


def test_lambda_scales_with_the_block_size_on_request() -> None:
    target = Target("a", (32, 48), (8, 2))
    plain = BlockPruningConfig(reg_lambda=0.5)
    scaled = BlockPruningConfig(reg_lambda=0.5, lambda_scaling="sqrt_block_size")
    assert penalty.penalty_lambda(plain, target) == 0.5
    assert penalty.penalty_lambda(scaled, target) == 2.0


def test_automatic_strength_empties_a_block_in_time() -> None:
    norm, steps = 0.2, 500
    strength = penalty.automatic_strength(norm, steps)
    weight = torch.full((1, 4), norm / 2)
    for _ in range(steps):
        factors = ops.reweight(penalty.block_norms(weight, (1, 4)), 1e-3)
        assert weight.any()
        penalty.proximal_step_(weight, factors, strength * 1.05, (1, 4))
        if not weight.any():
            return
    raise AssertionError(f"norm {float(weight.norm())} left after {steps} steps")


def test_mask_blocks_in_any_layout() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    for tensor in (torch.ones(4, 6), torch.ones(6, 4).t()):
        penalty.mask_blocks_(tensor, mask, (2, 3))
        assert tensor.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
