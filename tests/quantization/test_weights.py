"""Int8 weights against the definition in float64, and what must be exact."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import block_sparse_weight

from pybsp.quantization.weights import RATIOS, quantize_rows

CLIPS = ("mse", "max", "percentile")


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.randn(rows, columns, generator=generator).exp()


def dequantized(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return quantized.double() * scales.double()[:, None]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 96), (24, 5), (130, 1030)])
def test_error_within_half_a_step_unless_clipped(clip, shape):
    weight = heavy_tailed(*shape)
    quantized, scales = quantize_rows(weight, clip)
    assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (quantized.shape, scales.shape) == (weight.shape, weight.shape[:1])
    assert int(quantized.abs().max()) <= 127  # never -128
    step = scales.double()[:, None]
    error = (dequantized(quantized, scales) - weight.double()).abs()
    clipped = weight.double().abs() > 127 * step
    # the quotient is rounded to float32 before it is rounded to an integer
    assert bool((error <= step * (0.5 + 127 * 2**-23)).logical_or(clipped).all())
    assert bool((quantized.abs() == 127)[clipped].all())
    if clip == "max":
        assert not bool((weight.abs() > 127 * scales[:, None] * (1 + 2**-22)).any())
        assert bool((quantized.abs().amax(1) == 127).all())


@pytest.mark.parametrize("clip", CLIPS)
def test_zeros_stay_zero(clip):
    weight = block_sparse_weight((64, 96), (8, 1), 0.3)
    quantized, scales = quantize_rows(weight, clip)
    assert bool((quantized[weight == 0] == 0).all())
    empty = (weight == 0).all(1)
    assert bool(empty.any())
    assert torch.equal(scales == 0, empty)


def test_mse_takes_the_best_ratio():
    # At 8 bits only a row this long gains more than its largest weight loses.
    weight = torch.rand(3, 40000) - 0.5
    weight[:2, 17] = torch.tensor([0.53, -0.56])
    quantized, scales = quantize_rows(weight, "mse")
    error = (dequantized(quantized, scales) - weight.double()).square().sum(1)
    largest = weight.double().abs().amax(1)
    tried = []
    for ratio in RATIOS:
        step = (largest * ratio / 127)[:, None]
        levels = (weight.double() / step).round().clamp(-127, 127)
        tried.append((levels * step - weight.double()).square().sum(1))
    assert bool((error <= torch.stack(tried).amin(0) * (1 + 1e-4)).all())
    _, unclipped = quantize_rows(weight, "max")
    assert (scales < 0.99 * unclipped).tolist() == [True, True, False]


def test_percentile_is_that_of_the_nonzero_weights():
    weight = torch.zeros(1, 4000)
    weight[0, 100:1100] = torch.arange(1, 1001)
    _, scales = quantize_rows(weight, "percentile")
    assert math.isclose(float(scales[0]) * 127, 999, rel_tol=1e-6)


@pytest.mark.parametrize("clip", ["mse", "max"])
def test_what_was_quantized_is_found_again(clip):
    weight = heavy_tailed(50, 90)
    first, scales = quantize_rows(weight, "mse")
    again, scales_again = quantize_rows(first * scales[:, None], clip)
    assert torch.equal(first, again)
    torch.testing.assert_close(scales, scales_again, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes(clip, size):
    weight = torch.tensor([[1.0, -0.3, 0.0], [0.0, 0.0, -1.0]]) * size
    quantized, scales = quantize_rows(weight, clip)
    assert bool(scales.isfinite().all())
    if size == 1e-42:  # the scale has three bits left
        return
    assert quantized.tolist() == [[127, -38, 0], [0, 0, -127]]


def test_bfloat16_and_gradients():
    weight = torch.nn.Parameter(heavy_tailed(8, 8).bfloat16())
    quantized, scales = quantize_rows(weight)
    expected, expected_scales = quantize_rows(weight.detach().float())
    assert torch.equal(quantized, expected)
    assert torch.equal(scales, expected_scales)
    assert not scales.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", CLIPS)
def test_non_finite_weights_are_refused(clip, value):
    weight = torch.ones(4, 4)
    weight[2, 1] = value
    with pytest.raises(ValueError, match=r"row 2 .*NaN or infinite"):
        quantize_rows(weight, clip)


def test_meaning_errors():
    with pytest.raises(ValueError, match="clip must be one of 'mse', 'max'"):
        quantize_rows(torch.ones(2, 2), "kl")  # type: ignore[arg-type]
    for weight in (torch.ones(4), torch.ones(2, 0), torch.ones(2, 2).int()):
        with pytest.raises(ValueError, match="must be a floating point matrix"):
            quantize_rows(weight)
