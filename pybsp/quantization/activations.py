"""Activations as signed bytes: one scale for each token, or one for a layer's input.

Dynamic: ``a = max_k |x[t, k]|``, ``q = rint(x * (127 / a))``, the scale is ``a / 127``.
Static: a scale ``s`` known beforehand, ``q = clamp(rint(x * (1 / s)), -127, 127)``.
Every operation is rounded to float32, ``rint`` takes halves to the even neighbour.
"""

from __future__ import annotations

import torch

from .. import reference
from .weights import LEVELS

#: ``input_scale`` of a layer whose tokens get a scale of their own.
DYNAMIC = 0.0


def quantize_tokens(
    x: torch.Tensor, input_scale: float = DYNAMIC
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q, scales)`` of tokens ``(..., in)``: int8 like ``x`` and float32 ``(...)``.

    ``input_scale`` is the static scale; 0 gives every token its own. The scale of a
    token that has NaN or infinity anywhere is NaN.
    """
    levels, scales = reference.quantize_tokens(x.detach().float(), input_scale)
    return levels.to(torch.int8), scales[..., 0]


def clipped(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """Where a static scale is too small for ``x``."""
    return x.detach().abs() > (LEVELS + 0.5) * input_scale
