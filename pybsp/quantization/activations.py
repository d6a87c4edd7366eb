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
#: Below it ``127 / a`` would overflow: such a token counts as zero.
_SMALLEST = LEVELS / torch.finfo(torch.float32).max


def quantize_tokens(
    x: torch.Tensor, input_scale: float = DYNAMIC
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q, scales)`` of tokens ``(..., in)``: int8 like ``x`` and float32 ``(...)``.

    ``input_scale`` is the static scale; 0 gives every token its own. The scale of a
    token that has NaN (or, with a dynamic scale, infinity) anywhere is NaN.
    """
    x = x.detach().float()
    largest = x.abs().amax(-1)
    if input_scale == DYNAMIC:
        used = largest > _SMALLEST
        inverse = torch.where(used, LEVELS / largest, 0.0)[..., None]
        scales = torch.where(used, largest / LEVELS, 0.0)
        scales = scales.masked_fill(~largest.isfinite(), torch.nan)
    else:
        inverse = 1.0 / x.new_tensor(input_scale)
        scales = x.new_full(largest.shape, input_scale)
        scales = scales.masked_fill(largest.isnan(), torch.nan)
    levels = (x * inverse).round_().clamp_(-LEVELS, LEVELS)
    return levels.nan_to_num_(0.0).to(torch.int8), scales


def clipped(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """Where a static scale is too small for ``x``."""
    return (x.detach().float() * (1.0 / x.new_tensor(input_scale).float())).abs() > (
        LEVELS + 0.5
    )
