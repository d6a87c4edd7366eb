"""Errors of single layers against the same computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


class Classifier(nn.Module):
    """Returns its loss first when it has labels, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.layers(x)
        output = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**output, "hidden": self.layers[0](x), "logits": logits}


def test_the_logits_count_and_a_loss_does_not():
    net, x = Classifier(), torch.randn(5, 12)
    labels = torch.tensor([0, 1, 2, 1, 0])
    expected = sensitivity(model(), [x], ["0", "2"])
    for batches in ([{"x": x}], [{"x": x, "labels": labels}]):
        found = sensitivity(net, batches, ["layers.0", "layers.2"])
        assert found == {f"layers.{name}": error for name, error in expected.items()}
    tuples = nn.Sequential(model())
    tuples.register_forward_hook(lambda _m, _x, y: (y.sum(), y))
    assert sensitivity(tuples, [x], ["0.0"]) == {"0.0": expected["0"]}
    tuples.register_forward_hook(lambda _m, _x, y: y[0])
    with pytest.raises(ValueError, match="a loss does not count"):
        sensitivity(tuples, [x], ["0.0"])


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
