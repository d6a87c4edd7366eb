"""Activations as signed bytes: one scale for each token, or one for a layer's input.

Dynamic: ``a = max_k |x[t, k]|``, ``q = rint(x * (127 / a))``, the scale is ``a / 127``.
Static: a scale ``s`` known beforehand, ``q = clamp(rint(x * (1 / s)), -127, 127)``.
Every operation is rounded to float32, ``rint`` takes halves to the even neighbour.
"""

from __future__ import annotations

import torch

from .weights import LEVELS

#: ``input_scale`` of a layer whose tokens get a scale of their own.
DYNAMIC = 0.0
#: A token of which no element reaches this counts as zero: ``127 / a`` may overflow.
LEAST_INPUT = 2.0**-100


def quantize_tokens(
    x: torch.Tensor, input_scale: float = DYNAMIC
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q, scales)`` of tokens ``(..., in)``: int8 like ``x`` and float32 ``(...)``.

    ``input_scale`` is the static scale; 0 gives every token its own. The scale of a
    token that has NaN or infinity anywhere is NaN.
    """
    x = x.detach().float()
    largest = x.abs().amax(-1)
    if input_scale == DYNAMIC:
        used = largest >= LEAST_INPUT
        # Of two tensors: a number divided by a tensor is rounded twice.
        most = torch.full_like(largest, LEVELS)
        inverse = torch.where(used, most / largest, 0.0)
        scales = torch.where(used, largest / most, 0.0)
    else:
        scales = torch.full_like(largest, input_scale)
        inverse = scales.reciprocal()
    bad = ~largest.isfinite()
    levels = (x * inverse[..., None]).round_().clamp_(-LEVELS, LEVELS)
    levels = levels.masked_fill_(bad[..., None], 0.0)
    return levels.to(torch.int8), scales.masked_fill(bad, torch.nan)


def clipped(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """Where a static scale is too small for ``x``."""
    return x.detach().abs() > (LEVELS + 0.5) * input_scale
