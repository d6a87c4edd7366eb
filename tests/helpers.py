"""Random block-sparse weights, expected results in float64, and error bounds."""

from __future__ import annotations

import math

import torch

from pybsp import reference
from pybsp.blocks import BlockShape, expand_blocks, grid_shape

EPS = torch.finfo(torch.float32).eps
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
#: (shape, block shape): tiles of every height and family, odd sizes, single rows,
#: columns and blocks, more outputs than one part holds.
GRIDS = [
    ((48, 40), (8, 1)),
    ((64, 37), (16, 1)),
    ((64, 48), (16, 4)),
    ((36, 33), (4, 1)),
    ((36, 44), (4, 4)),
    ((96, 96), (32, 32)),
    ((60, 25), (12, 1)),
    ((35, 27), (5, 3)),
    ((33, 29), (1, 1)),
    ((19, 24), (1, 3)),
    ((23, 48), (1, 8)),
    ((17, 31), (1, 31)),
    ((31, 17), (31, 1)),
    ((13, 7), (13, 7)),
    ((1, 1), (1, 1)),
    ((312, 312), (24, 2)),
    ((1200, 32), (1, 16)),
]
#: Under this magnitude an activation may be any number as small.
SMALLEST = 2e-36


def block_sparse_weight(
    shape: tuple[int, int],
    block_shape: BlockShape,
    density: float,
    seed: int = 0,
) -> torch.Tensor:
    """A dense weight with about ``density`` of its blocks kept.

    The first block row and the first block column are empty where there are others and
    the density leaves room; one block at least is kept unless the density is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid_shape(shape, block_shape), generator=generator) < density
    if 0 < density < 1:
        mask[0, :] &= mask.shape[0] == 1
        mask[:, 0] &= mask.shape[1] == 1
        mask[-1, -1] = True
    weight = torch.randn(shape, generator=generator)
    # No element of a kept block is zero, so the pattern is the mask.
    weight += torch.sign(weight) * 1e-3
    return weight.masked_fill(~expand_blocks(mask, block_shape), 0.0)


def assert_within(
    actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, what: str = ""
) -> None:
    """``|actual - expected| <= bound`` for each element; NaN equals NaN.

    The message names the element that exceeds its bound by the largest factor.
    """
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    actual, bound = actual.detach().double(), bound.double().expand(expected.shape)
    expected = expected.detach().double()
    excess = (actual - expected).abs() / bound.clamp_min(1e-300)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    excess = torch.where(same, 0.0, excess.nan_to_num(math.inf, math.inf))
    if excess.numel() == 0 or bool(excess.max() <= 1):
        return
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{what}: {int((excess > 1).sum())} of {excess.numel()} elements exceed their "
        f"bound; the worst is {worst}: expected {float(expected[worst])!r}, got "
        f"{float(actual[worst])!r}, bound {float(bound[worst]):.3g}"
    )


def linear_bound(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``c eps (|x| |W|^T + |bias|)`` with ``c = 4 + 2 sqrt(n)``.

    ``n`` is the number of nonzero weights of the output: rounding errors of a sum of
    ``n`` products are independent enough to grow with its root.
    """
    total = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        total = total + bias.double().abs()
    constant = 4 + 2 * (weight != 0).sum(1).double().sqrt()
    return EPS * constant * total + 1e-44


def assert_linear(
    actual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    what: str = "",
) -> None:
    """``actual`` is ``activation(x @ weight.T + bias)`` but for rounding."""
    exact = x.double() @ weight.double().t()
    if bias is not None:
        exact = exact + bias.double()
    bound = linear_bound(x, weight, bias)
    if activation is not None:
        exact = reference.ACTIVATIONS[activation](exact)
        # No activation is steeper than 1.13; its own error is relative to its value.
        bound = 1.13 * bound + 16 * EPS * exact.abs() + SMALLEST
    assert actual.dtype == torch.float32, actual.dtype
    assert_within(actual, exact, bound, what)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit: NaN equals itself and -0 differs from +0."""
    bits = torch.int32 if a.element_size() == 4 else torch.int16
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        a.contiguous().view(bits), b.contiguous().view(bits)
    )
