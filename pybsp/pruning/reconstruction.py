"""Layer-wise reconstruction: which blocks to remove, and what the others become.

A layer ``y = W x + b`` gets a sparse ``W'`` that gives nearly the same outputs on
inputs that were seen. With the covariance ``H`` of these inputs the error is::

    E(W') = trace((W' - W) H (W' - W)^T)

The rows of ``W`` within a row of blocks share their zeros, and different rows of blocks
do not interact, so each is solved by itself. Removing the columns ``J`` of a block, and
moving all other columns to make up for it, costs (Hassibi & Stork 1992; Frantar &
Alistarh 2022, arXiv 2208.11580)::

    trace(W_J (H^-1_JJ)^-1 W_J^T)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..blocks import BlockShape, grid_shape

#: Added to the diagonal of a covariance, in units of its mean.
DAMPING = 1e-2
#: Share of the remaining blocks that is removed between two updates of their costs.
ROUND = 1 / 8
#: Numbers that the inverses in work at a time may hold.
_WORKING_SET = 1 << 26


class InputMoments:
    """First and second moments of a layer's inputs, in the dense model and in the
    pruned one: what a least-squares fit needs to know of them."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[torch.Tensor] = []

    def add(self, dense: torch.Tensor, pruned: torch.Tensor) -> None:
        """Add tokens ``(n, in)``; the same tokens in both models."""
        same = dense is pruned
        # In float64: means far larger than the deviations leave nothing of float32.
        pruned = pruned.double()
        dense = pruned if same else dense.double()
        square = pruned.T @ pruned
        cross = square if same else dense.T @ pruned
        sums = [dense.sum(0), pruned.sum(0), square, cross]
        self.count += dense.shape[0]
        if self._sums:
            sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
        self._sums = sums

    def reorder_(self, order: torch.Tensor) -> None:
        """Put the inputs into another order."""
        vectors, matrices = self._sums[:2], self._sums[2:]
        self._sums = [vector[order] for vector in vectors]
        self._sums += [matrix[order][:, order] for matrix in matrices]

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of the inputs, dense and pruned."""
        return self._sums[0] / self.count, self._sums[1] / self.count

    @property
    def rounding(self) -> float:
        """What rounding may leave, or take, on the diagonals of the covariances."""
        second = float(self._sums[2].diagonal().mean()) / self.count
        return second * len(self._sums[2]) * torch.finfo(torch.float64).eps

    def covariance(self, centred: bool) -> torch.Tensor:
        """Of the pruned model's inputs."""
        return self._central(self._sums[2], 1, 1, centred)

    def cross_covariance(self, centred: bool) -> torch.Tensor:
        """Of the dense model's inputs (rows) with the pruned model's (columns)."""
        return self._central(self._sums[3], 0, 1, centred)

    def _central(
        self, products: torch.Tensor, left: int, right: int, centred: bool
    ) -> torch.Tensor:
        second = products / self.count
        if not centred:
            return second
        return second - torch.outer(self.means[left], self.means[right])


def damped(covariance: torch.Tensor, rounding: float = 0.0) -> torch.Tensor:
    """``covariance`` with its diagonal raised, so that it can be inverted."""
    mean = max(float(covariance.diagonal().mean()), 0.0)
    return covariance + (max(DAMPING * mean, rounding) + 1e-12) * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def output_energy(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """``trace(W H W^T)``: what removing every block costs."""
    weight = weight.detach().to(covariance.dtype)
    return float((weight @ covariance * weight).sum())


def removal_costs(
    weight: torch.Tensor,
    covariance: torch.Tensor,
    block_shape: BlockShape,
    rounding: float = 0.0,
) -> torch.Tensor:
    """What removing each block costs at the point where it is its turn: ``(out/r,
    in/c)``, float32.

    In each row of blocks the cheapest go first and the others are adjusted. Costs never
    fall along the way, so that cutting at any threshold removes blocks in this order.
    """
    grid = grid_shape(weight.shape, block_shape)
    rows = weight.detach().float().reshape(grid[0], block_shape[0], weight.shape[1])
    inverse = torch.linalg.inv(damped(covariance, rounding)).float()
    workers = torch.get_num_threads() if rows.is_cpu else 1
    at_once = max(1, _WORKING_SET // (workers * inverse.numel()))
    parts = _side_by_side(
        lambda part: _costs_of_rows(part, inverse, block_shape[1]),
        torch.split(rows, at_once),
        workers,
    )
    return torch.cat(parts)


def _side_by_side(
    function: Callable[[torch.Tensor], torch.Tensor],
    parts: Sequence[torch.Tensor],
    workers: int,
) -> list[torch.Tensor]:
    """``function`` of each part, so many at a time, each computed by one thread.

    Threads that share one small factorisation wait for each other: two took over ten
    times as long as one for all layers of MiniLM.
    """
    team = torch.get_num_threads()

    def alone(part: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(1)
        return function(part)

    try:
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(alone, parts))
    finally:
        # what a thread sets is also what threads to come start with
        torch.set_num_threads(team)


def _costs_of_rows(
    rows: torch.Tensor, inverse: torch.Tensor, cols: int
) -> torch.Tensor:
    """Costs ``(g, in/c)`` of ``g`` rows of blocks ``(g, r, in)``."""
    groups, _, width = rows.shape
    left = torch.arange(width // cols, device=rows.device).expand(groups, -1)
    inverse = inverse.expand(groups, width, width)
    costs = rows.new_zeros(left.shape)
    floor = rows.new_zeros(groups, 1)
    while True:
        now = math.ceil(ROUND * left.shape[1])
        found, order = _costs_now(rows, inverse, cols).sort(1)
        found = torch.maximum(found[:, :now], floor)
        floor = found.amax(1, keepdim=True)
        costs.scatter_(1, left.gather(1, order[:, :now]), found)
        if now == left.shape[1]:
            return costs
        left = left.gather(1, order[:, now:])
        rows, inverse = _without(
            rows,
            inverse,
            _columns(order[:, :now], cols),
            _columns(order[:, now:], cols),
        )


def _columns(blocks: torch.Tensor, cols: int) -> torch.Tensor:
    offsets = torch.arange(cols, device=blocks.device)
    return (blocks.unsqueeze(2) * cols + offsets).flatten(1)


def _costs_now(rows: torch.Tensor, inverse: torch.Tensor, cols: int) -> torch.Tensor:
    """Costs ``(g, n)`` of removing one of ``n`` blocks."""
    groups, height, width = rows.shape
    if cols == 1:
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        return torch.sum(rows.square(), 1) / diagonal.clamp_min(1e-30)
    blocks = width // cols
    grid = inverse.reshape(groups, blocks, cols, blocks, cols)
    squares = grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    parts = rows.view(groups, height, blocks, cols).permute(0, 2, 3, 1)
    return torch.sum(parts * torch.linalg.solve(squares, parts), (2, 3))


def _without(
    rows: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns ``kept`` of the rows, having made up for the columns ``gone``, and
    the inverse covariance of the inputs that they have."""

    def take(matrix: torch.Tensor, dim: int, columns: torch.Tensor) -> torch.Tensor:
        shape = list(matrix.shape)
        shape[dim] = columns.shape[1]
        return matrix.gather(dim, columns.unsqueeze(3 - dim).expand(shape))

    upper = take(inverse, 1, gone)
    across = take(upper, 2, kept)
    share = torch.linalg.solve(take(upper, 2, gone), across)
    inverse = take(take(inverse, 1, kept), 2, kept)
    inverse.baddbmm_(across.transpose(1, 2), share, alpha=-1)
    return take(rows, 2, kept).baddbmm_(take(rows, 2, gone), share, alpha=-1), inverse


def refit(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    block_shape: BlockShape,
    moments: InputMoments,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight with the zeros of ``mask``, and the bias, whose outputs on the pruned
    model's inputs are nearest to those of the dense layer on the dense model's."""
    centred = bias is not None
    covariance = damped(moments.covariance(centred), moments.rounding)
    raised = covariance - moments.covariance(centred)
    dense = weight.detach().double()
    # The damping pulls toward the weight as it was, not toward zero.
    wanted = dense @ (moments.cross_covariance(centred) + raised)
    fitted = torch.zeros_like(dense)
    height, cols = block_shape
    columns = mask.repeat_interleave(cols, 1)
    for row, kept in enumerate(columns):
        where = kept.nonzero().squeeze(1)
        if len(where) == 0:
            continue
        lines = slice(row * height, (row + 1) * height)
        factor = torch.linalg.cholesky(covariance[where][:, where])
        solved = torch.cholesky_solve(wanted[lines, where].T, factor)
        fitted[lines, where] = solved.T
    if bias is None:
        return fitted.to(weight), None
    before, after = moments.means
    shift = dense @ before - fitted @ after
    return fitted.to(weight), (bias.detach().double() + shift).to(bias)
