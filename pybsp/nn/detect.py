"""Find the block shape that explains the zeros of a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..blocks import BlockShape, block_view

#: Elements that a block shape may store although they are zero, as a fraction of the
#: zeros or of the nonzeros, whichever are fewer: a few weights inside kept blocks may
#: be zero by chance.
TOLERANCE = 0.01


def detect_block_shape(weight: torch.Tensor) -> BlockShape | None:
    """The largest block shape whose kept blocks hold hardly more than the nonzeros.

    ``weight`` is ``(out, in)``. A block is kept when it has any nonzero. A shape
    explains the zeros when the area of its kept blocks exceeds the number of nonzeros
    by at most ``TOLERANCE`` of the zeros and of the nonzeros: for zeros scattered at
    random no shape larger than ``(1, 1)`` does, at any density. Returns None when
    there are no zeros or no shape larger than ``(1, 1)`` explains them. Of explaining
    shapes with equal area the tallest is returned.
    """
    nonzero = weight.detach() != 0
    stored = int(nonzero.sum())
    zeros = nonzero.numel() - stored
    if zeros == 0:
        return None
    limit = stored + TOLERANCE * min(stored, zeros)

    def explains(block_shape: BlockShape) -> bool:
        kept = block_view(nonzero, block_shape).any(3).any(2).sum()
        return int(kept) * block_shape[0] * block_shape[1] <= limit

    # A block (r, c) that explains the zeros does so for every block that tiles it, thus
    # (r, 1) and (1, c) are tried first and a failing extent rules out its multiples.
    rows = _extents(weight.shape[0], lambda extent: explains((extent, 1)))
    cols = _extents(weight.shape[1], lambda extent: explains((1, extent)))
    shapes = [(r, c) for r in rows for c in cols if r * c > 1]
    shapes.sort(key=lambda shape: (shape[0] * shape[1], shape[0]), reverse=True)
    return next((shape for shape in shapes if explains(shape)), None)


def _extents(size: int, explains: Callable[[int], bool]) -> list[int]:
    passed: list[int] = []
    failed: list[int] = []
    for extent in (d for d in range(1, size + 1) if size % d == 0):
        if any(extent % other == 0 for other in failed):
            continue
        (passed if extent == 1 or explains(extent) else failed).append(extent)
    return passed
