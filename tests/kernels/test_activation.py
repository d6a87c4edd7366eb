"""Activations over the whole line, against their float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import EPS, SMALLEST, assert_within, same_bits

from pybsp import BlockSparseMatrix, ops, reference

NAMES = ["relu", "gelu", "gelu_tanh", "silu"]
#: The stated accuracy, in half units in the last place of the exact value.
UNITS = {"relu": 0, "gelu": 16, "gelu_tanh": 16, "silu": 6}


def activate(name: str, x: torch.Tensor, tokens: int) -> torch.Tensor:
    """The kernel's activation of each element of ``x``, as a bias of an empty layer."""
    W = BlockSparseMatrix.from_dense(torch.zeros(x.numel(), 1), (1, 1))
    y: torch.Tensor = ops.block_sparse_linear(torch.zeros(tokens, 1), W, x, name)
    assert all(same_bits(y[0], row) for row in y)
    return y[0]


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if name == "relu":
        return x.clamp_min(0)
    if name == "gelu":
        # erfc keeps the digits of the negative tail.
        return x * torch.special.erfc(-x / math.sqrt(2)) / 2
    argument = x
    if name == "gelu_tanh":
        argument = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * torch.sigmoid(argument)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_dense_sweep(isa: str, name: str, tokens: int) -> None:
    near = torch.linspace(-12, 12, 30_001)
    powers = torch.logspace(-37, 4, 4_001)
    x = torch.cat([near, powers, -powers, torch.linspace(-110, 110, 10_001)])
    expected = exact(name, x)
    # e^z inherits the rounding errors of z, relative to e^z as large as z itself.
    z = torch.zeros(x.shape, dtype=torch.float64)
    if name == "gelu":
        z = x.double().square() / 2
    if name == "gelu_tanh":
        z = 3 * 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3).double().abs()
    units = UNITS[name] + z.clamp_max(270) * (x < 0)
    bound = units * EPS / 2 * expected.abs() + SMALLEST * (name != "relu")
    assert_within(activate(name, x, tokens), expected, bound, f"{isa} {name}")


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_values(isa: str, name: str, tokens: int) -> None:
    huge = torch.tensor([1e5, 1e10, 1e20, 1e30, 1e38, 3.4028235e38])
    assert same_bits(activate(name, huge, tokens), huge), isa
    y = activate(name, -huge, tokens)
    assert not y.any(), y
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38])
    assert_within(
        activate(name, tiny, tokens), exact(name, tiny), torch.full((6,), SMALLEST)
    )


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_are_those_of_torch(isa: str, name: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0])
    # In float64: torch's float32 gelu of infinity is NaN on some CPUs.
    expected = reference.ACTIVATIONS[name](x.double()).float()
    for tokens in (1, 20):
        y = activate(name, x, tokens)
        torch.testing.assert_close(y, expected, equal_nan=True, msg=f"{isa} {tokens}")


def test_names_are_those_of_the_reference() -> None:
    for name in reference.ACTIVATIONS:
        ops.check_activation(name)
    for name in ("none", "tanh", "GELU", ""):
        with pytest.raises(ValueError, match="activation must be one of"):
            ops.check_activation(name)
