"""Errors of single layers against the same computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pybsp.quantization import sensitivity
from pybsp.quantization.linear import FakeQuantizedLinear, fake_quantize_


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3))
    layers[0].weight.data[:, 0] *= 400  # one hot input: coarse steps for the others
    return layers


@torch.no_grad()
def test_one_layer_at_a_time():
    net, batches = model(), [torch.randn(5, 12), torch.randn(2, 12)]
    errors = sensitivity(net, batches, ["2", "0"])
    assert list(errors) == ["0", "2"]
    assert all(type(net[i]) is nn.Linear for i in (0, 2))
    exact = torch.cat([net(x) for x in batches])
    for name, error in errors.items():
        other = model()
        fake_quantize_(other.get_submodule(name))
        found = torch.cat([other(x) for x in batches])
        expected = float((found - exact).norm() / exact.norm())
        assert math.isclose(error, expected, rel_tol=1e-3)
    static = sensitivity(net, batches, ["0"], {"0": 1.0})
    assert static["0"] > errors["0"]


def test_errors_restore_the_layer():
    net = model()

    def fail(module: nn.Module, _: object) -> None:
        if isinstance(module, FakeQuantizedLinear):
            raise RuntimeError("in int8")

    handle = net[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in int8"):
        sensitivity(net, [torch.randn(2, 12)], ["0"])
    assert type(net[0]) is nn.Linear
    handle.remove()
    for names, found in ((["1"], "a GELU"), (["7"], "no module")):
        with pytest.raises(ValueError, match=f"'{names[0]}' is {found}"):
            sensitivity(net, [torch.randn(2, 12)], names)
    with pytest.raises(ValueError, match="no batches"):
        sensitivity(net, [], ["0"])
    net[2].weight.data.zero_()
    net[2].bias.data.zero_()
    with pytest.raises(ValueError, match="zero throughout"):
        sensitivity(net, [torch.randn(2, 12)], ["0"])
