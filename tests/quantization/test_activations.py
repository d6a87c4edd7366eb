"""Int8 tokens against the definition, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pybsp.quantization import quantize_tokens
from pybsp.quantization.activations import clipped
from pybsp.reference import LEAST_INPUT


def by_definition(token: np.ndarray, input_scale: float) -> tuple[list[int], float]:
    """One token in NumPy, whose float32 operations round one by one."""
    one, most = np.float32(1), np.float32(127)
    if input_scale:
        scale = np.float32(input_scale)
        inverse = one / scale
    else:
        largest = np.abs(token).max()
        scale = largest / most
        inverse = most / largest if largest else np.float32(0)
    levels = np.rint(token * inverse)
    return [int(v) for v in np.clip(levels, -127, 127)], float(scale)


@pytest.mark.parametrize("input_scale", [0.0, 0.01, 0.03])
def test_definition(input_scale):
    x = torch.randn(3, 5, 70) * torch.logspace(-6, 1, 15).reshape(3, 5, 1)
    x[1, 2] = 0.0
    quantized, scales = quantize_tokens(x, input_scale)
    assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (quantized.shape, scales.shape) == (x.shape, (3, 5))
    for token, found, scale in zip(
        x.flatten(0, 1).numpy(), quantized.flatten(0, 1), scales.flatten(), strict=True
    ):
        assert (found.tolist(), float(scale)) == by_definition(token, input_scale)


def test_the_inverse_is_rounded_once():
    # Whole numbers of halves: the last bit of 127 / a decides where they go.
    largest = torch.arange(1.0, 4000.0)
    halves = (torch.arange(126) + 0.5) * (largest / 127)[:, None]
    x = torch.cat([largest[:, None], halves], 1)
    inverse = (np.float32(127) / largest.numpy())[:, None]
    expected = np.rint(x.numpy() * inverse)
    assert np.array_equal(quantize_tokens(x)[0].numpy(), expected)
    twice = np.rint(x.numpy() * (np.float32(127) * (1 / largest.numpy()[:, None])))
    assert not np.array_equal(twice, expected)


def test_halves_go_to_the_even_neighbour():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 3.5]])
    assert quantize_tokens(x)[0].tolist() == [[127, 0, 2, -2, 4]]
    assert quantize_tokens(x, 1.0)[0].tolist() == [[127, 0, 2, -2, 4]]


def test_static_scale_clips():
    x = torch.tensor([[-500.0, 127.4, 127.6, 3.0]])
    assert quantize_tokens(x, 1.0)[0].tolist() == [[-127, 127, 127, 3]]
    assert clipped(x, 1.0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite(value):
    x = torch.ones(3, 4)
    x[1, 2] = value
    for input_scale in (0.0, 0.5):
        quantized, scales = quantize_tokens(x, input_scale)
        assert scales.isnan().tolist() == [False, True, False]
        assert quantized.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-28, 3e38])
def test_extreme_magnitudes(size):
    x = torch.tensor([[1.0, -1.0, 0.0, 0.25]]) * size
    quantized, scales = quantize_tokens(x)
    found = quantized.double() * scales.double()[:, None]
    # half a step, or everything in a token that counts as zero
    bound = size if size < LEAST_INPUT else size * 0.51 / 127
    assert bool(((found - x.double()).abs() <= bound).all())
