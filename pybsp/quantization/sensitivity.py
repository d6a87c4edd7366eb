"""How much each layer's int8 form changes what the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..pruning.forwards import main_outputs
from .activations import DYNAMIC
from .calibration import run
from .linear import fake_quantize_, restore_


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    modules: Iterable[str],
    input_scales: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Relative error of the model's output with one layer in int8, by its name.

    ``||y_int8 - y|| / ||y||`` over all ``batches``, where ``y`` are the logits, or else
    the first tensor of the output that is no loss; largest first. One pass over the
    batches for every layer. A batch is what ``calibrate`` takes; ``input_scales`` are
    what it returns, else dynamic.

    Raises:
        ValueError: for a name that is not that of an ``nn.Linear`` with float32
            weights, no batch at all, or an output that is zero or nothing but a loss.
    """
    batches = list(batches)
    linears = {name: _linear(model, name) for name in modules}
    exact = _outputs(model, batches)
    norm = float(exact.norm())
    if norm == 0.0:
        raise ValueError(
            "the model's output is zero throughout, so errors relative to it mean "
            "nothing; give other batches"
        )
    errors = {}
    for name, linear in linears.items():
        scale = (input_scales or {}).get(name, DYNAMIC)
        fake_quantize_(linear, input_scale=scale)
        try:
            errors[name] = float((_outputs(model, batches) - exact).norm()) / norm
        finally:
            restore_(linear)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if type(module) is not nn.Linear:
        found = "no module" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"sensitivity compares an nn.Linear with its int8 form; '{name}' is {found}"
        )
    return module


def _outputs(model: nn.Module, batches: list[Any]) -> torch.Tensor:
    found = [main_outputs(result) for result in run(model, batches)]
    if not all(found):
        raise ValueError(
            "the model returns no tensor of floating point to compare (a loss does not "
            "count); give it a forward that returns its outputs"
        )
    return torch.cat([y.double().flatten() for outputs in found for y in outputs])
