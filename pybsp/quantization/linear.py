"""``FakeQuantizedLinear``: a linear layer that computes what its int8 form will.

The forward is that of the int8 product, ``(float(q_x q_w) * scale_w) * scale_x + bias``
in float32. The backward passes through the rounding as if it were not there (the
straight-through estimator), with two exceptions: what a static scale clips has no
gradient, and a weight that is exactly zero has none: removed blocks stay removed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .activations import DYNAMIC, clipped, quantize_tokens
from .weights import Clip, round_rows, row_scales


class _Int8Product(torch.autograd.Function):
    """Saves bytes where a linear layer saves floats."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor,
        input_scale: float,
    ) -> torch.Tensor:
        q_x, tokens = quantize_tokens(x, input_scale)
        q_w = round_rows(weight, scales)
        outside = None if input_scale == DYNAMIC else clipped(x, input_scale)
        ctx.save_for_backward(q_x, tokens, q_w, scales, weight, outside)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        # float32 sums of whole numbers: exact below 2^24
        y = F.linear(q_x.float(), q_w.float()) * scales * tokens[..., None]
        return y if bias is None else y + bias.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_x, tokens, q_w, scales, weight, outside = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.float()
            grad_x = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad * scales) @ q_w.float()
                if outside is not None:
                    grad_x = grad_x.masked_fill_(outside, 0.0)
                grad_x = grad_x.to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                scaled = (grad * tokens[..., None]).reshape(-1, grad.shape[-1])
                grad_weight = scaled.t() @ q_x.float().reshape(-1, q_x.shape[-1])
                grad_weight = grad_weight.masked_fill_(weight == 0, 0.0)
                grad_weight = grad_weight.to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[1])
        return grad_x, grad_weight, grad_bias, None, None


class FakeQuantizedLinear(nn.Linear):
    """What an ``nn.Linear`` is for the time between ``fake_quantize_`` and
    ``restore_``: the same object with the same parameters and hooks.

    ``clip`` is that of the weight's rows, ``input_scale`` the static scale of the
    input, 0 for a scale of its own for every token.
    """

    clip: Clip
    input_scale: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The int8 product in float32; in the type of autocast where that is on."""
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            scales = row_scales(self.weight, self.clip)
            y: torch.Tensor = _Int8Product.apply(
                x, self.weight, self.bias, scales, self.input_scale
            )  # type: ignore[no-untyped-call]
        return y.to(dtype)

    def extra_repr(self) -> str:
        """Adds the scale of the input."""
        scale = "dynamic" if self.input_scale == DYNAMIC else f"{self.input_scale:g}"
        return f"{super().extra_repr()}, int8, input_scale={scale}"


def fake_quantize_(
    linear: nn.Linear, *, clip: Clip = "max", input_scale: float = DYNAMIC
) -> None:
    """Let ``linear`` compute as its int8 form.

    Raises:
        ValueError: for a layer of a class of its own, whose forward is not known, or a
            weight that is not float32.
    """
    if type(linear) not in (nn.Linear, FakeQuantizedLinear):
        raise ValueError(
            f"int8 training replaces the forward of nn.Linear; got a "
            f"{type(linear).__name__}: leave this module out"
        )
    if linear.weight.dtype != torch.float32:
        raise ValueError(
            f"int8 training needs float32 weights (mixed precision may stay on); got "
            f"{linear.weight.dtype}: load the model with dtype=torch.float32"
        )
    # Neither a wrapper nor a parametrization: names of parameters, hooks, copies and
    # pickles stay those of the layer.
    linear.__class__ = FakeQuantizedLinear
    linear.clip = clip  # type: ignore[assignment]
    linear.input_scale = float(input_scale)  # type: ignore[assignment]


def restore_(linear: nn.Linear) -> None:
    """Undo ``fake_quantize_``; the weight is as training left it."""
    if isinstance(linear, FakeQuantizedLinear):
        del linear.clip, linear.input_scale
        linear.__class__ = nn.Linear  # type: ignore[assignment]
