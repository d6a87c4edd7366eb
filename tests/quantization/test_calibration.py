"""Observers against exact statistics; calibration leaves the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pybsp.ops import check_input_scale
from pybsp.quantization import calibrate
from pybsp.quantization.calibration import InputObserver


def observed(*batches: torch.Tensor) -> InputObserver:
    observer = InputObserver()
    for batch in batches:
        observer.update(batch)
    return observer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        hidden = self.drop(self.first(x))
        assert not torch.is_grad_enabled()
        return self.second(input=hidden * scale)


def test_max_is_exact():
    batches = [torch.randn(7, 9) * size for size in (1.0, 300.0, 0.1)]
    largest = max(float(batch.abs().max()) for batch in batches)
    assert observed(*batches).scale("max") == largest / 127


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_percentile_is_that_of_all_batches(order):
    torch.manual_seed(1)
    batches = [torch.randn(100000) * size for size in (0.3, 1.0, 3.0)]
    observer = observed(*(batches[i] for i in order))
    exact = torch.cat(batches).abs().sort().values[int(300000 * 0.9999)]
    # a bin is at most 1/2048 of the largest magnitude; elements there are sparse
    tolerance = 2 * observer.limit / 4096 + 0.05
    assert abs(observer.scale("percentile") * 127 - float(exact)) <= tolerance


@pytest.mark.parametrize("outlier", [2.0, 40.0])
def test_mse_is_near_the_best_clip(outlier):
    x = torch.cat([torch.rand(200000) - 0.5, torch.tensor([outlier])])

    def error(scale: float) -> float:
        wide = x.double()
        levels = (wide / scale).round().clamp(-127, 127)
        return float((levels * scale - wide).square().sum())

    clips = float(x.max()) * torch.linspace(0.01, 1, 400)
    best = min(error(float(clip) / 127) for clip in clips)
    found = error(observed(x).scale("mse"))
    assert found <= 1.05 * best
    assert found <= 1.001 * error(observed(x).scale("max"))


def test_nothing_but_zeros_is_dynamic():
    for method in ("mse", "max", "percentile"):
        assert observed(torch.zeros(4, 4)).scale(method) == 0.0
    later = observed(torch.zeros(4), torch.empty(0), torch.ones(2))
    assert later.scale("max") == 1 / 127


@pytest.mark.parametrize("method", ["mse", "max", "percentile"])
def test_what_the_product_takes_for_zeros_is_dynamic(method):
    least = 2.0**-100
    assert observed(torch.full((64,), 100 * least)).scale(method) == 0.0
    scale = observed(torch.full((64,), 1000 * least)).scale(method)
    assert scale >= least
    check_input_scale(scale)


@pytest.mark.parametrize("method", ["mse", "max", "percentile"])
def test_calibrate(method):
    model = Model().train()
    model.drop.eval()
    inputs = [torch.randn(3, 6) for _ in range(4)]
    batches = [inputs[0], (inputs[1], 1.0), [inputs[2]], {"x": inputs[3]}]
    scales = calibrate(model, batches, ["first", "second"], method)
    hidden = [model.first(x).detach() for x in inputs]
    assert scales["first"] == observed(*inputs).scale(method)
    assert math.isclose(scales["second"], observed(*hidden).scale(method), rel_tol=1e-5)
    assert (model.training, model.drop.training) == (True, False)
    assert not model.first._forward_pre_hooks
    assert not model.second._forward_pre_hooks


def test_errors_leave_no_hooks():
    model = Model()
    bad = torch.full((2, 6), math.nan)

    def failing():
        yield torch.ones(2, 6)
        raise RuntimeError("the loader broke")

    for error, message, batches, names in (
        (ValueError, "NaN or infinite", [bad], ["first"]),
        (RuntimeError, "the loader broke", failing(), ["first", "second"]),
        (ValueError, "no batches", [], ["first"]),
        (TypeError, "a batch is None; give what", [None], ["first"]),
        (ValueError, "no module 'third'", [torch.ones(2, 6)], ["first", "third"]),
        (ValueError, "no batch reached the module 'unused'",
         [torch.ones(2, 6)], ["first", "unused"]),
        (ValueError, "method must be one of", [torch.ones(2, 6)], ["first"]),
    ):  # fmt: skip
        method = "kl" if message.startswith("method") else "max"
        with pytest.raises(error, match=message):
            calibrate(model, batches, names, method)
        assert model.training
        assert not any(m._forward_pre_hooks for m in model.modules())
