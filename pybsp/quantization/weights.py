"""Weights as signed bytes with one scale for each output.

``w[o, k] ~ q[o, k] * scale[o]`` with ``q`` in ``[-127, 127]``: symmetric, so that zero
is zero and removed blocks stay removed. ``scale[o] = clip[o] / 127``; what exceeds
``clip[o]`` becomes 127, in exchange for finer steps for all others.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Clip = Literal["mse", "max", "percentile"]

LEVELS = 127
#: Of the nonzero magnitudes of a row, the share that ``"percentile"`` does not clip.
PERCENTILE = 0.999
#: Clips that ``"mse"`` tries, in units of the largest magnitude of the row.
RATIOS = tuple(1 - step / 40 for step in range(21))
_CHUNK = 1 << 16  # weights that the search looks at together: they stay in cache


def quantize_rows(
    weight: torch.Tensor, clip: Clip = "mse"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q, scales)`` of a weight: int8 ``(out, in)`` and float32 ``(out,)``.

    ``clip`` is ``"max"`` (the largest magnitude of a row: nothing is clipped),
    ``"mse"`` (the fraction of it, of those in ``RATIOS``, with the smallest squared
    error of the row) or ``"percentile"`` (that of its nonzero magnitudes). A row of
    zeros gets the scale 0. With ``"mse"`` and ``"max"`` a weight that is already
    ``q * scales`` gives that ``q`` again.

    Raises:
        ValueError: for an unknown ``clip``, a weight that is not a matrix, or NaN and
            infinite weights.
    """
    _check(weight, clip)
    scales = row_scales(weight, clip)
    return round_rows(weight, scales), scales


def row_scales(weight: torch.Tensor, clip: Clip = "mse") -> torch.Tensor:
    """The scales of ``quantize_rows``, which checks what this does not: a row with
    NaN or infinite weights gets such a scale."""
    weight = weight.detach().float()
    largest = weight.abs().amax(1)
    if clip == "mse":
        largest = largest * _best_ratios(weight, largest)
    elif clip == "percentile":
        largest = _percentiles(weight)
    # Of two tensors: on some devices a number divides by its reciprocal.
    return largest / torch.full_like(largest, LEVELS)


def round_rows(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``clamp(rint(weight / scales), -127, 127)`` as int8, 0 where the scale is 0."""
    # dividing by infinity gives the zeros of a row without a scale
    steps = torch.where(scales > 0, scales, torch.inf)[:, None]
    levels = (weight.detach().float() / steps).round_().clamp_(-LEVELS, LEVELS)
    return levels.to(torch.int8)


def _best_ratios(weight: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    best = []
    chunk = max(1, _CHUNK // weight.shape[1])
    chunks = zip(torch.split(weight, chunk), torch.split(largest, chunk), strict=True)
    for rows, most in chunks:
        # in units of the largest one, where squares neither overflow nor vanish
        unit = rows / torch.where(most > 0, most, 1.0)[:, None]
        errors = torch.stack([_squared_error(unit, ratio) for ratio in RATIOS])
        best.append(errors.argmin(0))  # of equal ones the first, which clips least
    return torch.tensor(RATIOS, device=weight.device)[torch.cat(best)]


def _squared_error(unit: torch.Tensor, ratio: float) -> torch.Tensor:
    scale = ratio / LEVELS
    rounded = (unit / scale).round_().clamp_(-LEVELS, LEVELS).mul_(scale)
    return rounded.sub_(unit).square_().sum(1)


def _percentiles(weight: torch.Tensor) -> torch.Tensor:
    """The smallest magnitude that at least ``PERCENTILE`` of a row's nonzero ones do
    not exceed."""
    ascending = weight.abs().sort(1).values
    nonzero = (ascending != 0).sum(1)
    above = (nonzero * (1 - PERCENTILE)).floor().long()
    return ascending.gather(1, (weight.shape[1] - 1 - above)[:, None])[:, 0]


def _check(weight: torch.Tensor, clip: str) -> None:
    if clip not in get_args(Clip):
        raise ValueError(
            f"clip must be one of {', '.join(map(repr, get_args(Clip)))}; got {clip!r}"
        )
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a floating point matrix (out, in) that is not empty; got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    finite = weight.detach().float().isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"row {int((~finite).nonzero()[0])} of the weight has NaN or infinite "
            "values, which have no int8 form; quantize a sound checkpoint"
        )
