"""Layer-wise reconstruction: which blocks to remove, and what the others become.

A layer ``y = W x + b`` gets a sparse ``W'`` that gives nearly the same outputs on inputs
that were seen. With the covariance ``H`` of these inputs the error is::

    E(W') = trace((W' - W) H (W' - W)^T)

The rows of ``W`` within a row of blocks share their zeros, and different rows of blocks
do not interact, so each is solved by itself. Removing the columns ``J`` of a block, and
moving all other columns to make up for it, costs (Hassibi & Stork 1992; Frantar &
Alistarh 2022, arXiv 2208.11580)::

    trace(W_J (H^-1_JJ)^-1 W_J^T)
"""

from __future__ import annotations

import math

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
        dense, pruned = dense.double(), pruned.double()
        sums = [dense.sum(0), pruned.sum(0), pruned.T @ pruned, dense.T @ pruned]
        self.count += dense.shape[0]
        self._sums = [
            old + new for old, new in zip(self._sums or [0.0] * 4, sums, strict=True)
        ]

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of the inputs, dense and pruned."""
        return self._sums[0] / self.count, self._sums[1] / self.count

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


def damped(covariance: torch.Tensor) -> torch.Tensor:
    """``covariance`` with its diagonal raised, so that it can be inverted."""
    mean = float(covariance.diagonal().mean())
    return covariance + (DAMPING * mean + 1e-12) * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def output_energy(weight: torch.Tensor, covariance: torch.Tensor) -> float:
    """``trace(W H W^T)``: what removing every block costs."""
    weight = weight.detach().to(covariance.dtype)
    return float((weight @ covariance * weight).sum())


def removal_costs(
    weight: torch.Tensor, covariance: torch.Tensor, block_shape: BlockShape
) -> torch.Tensor:
    """What removing each block costs at the point where it is its turn: ``(out/r,
    in/c)``, float32.

    In each row of blocks the cheapest go first and the others are adjusted. Costs never
    fall along the way, so that cutting at any threshold removes blocks in this order.
    """
    grid = grid_shape(weight.shape, block_shape)
    rows = weight.detach().float().reshape(grid[0], block_shape[0], weight.shape[1])
    inverse = torch.linalg.inv(damped(covariance)).float()
    at_once = max(1, _WORKING_SET // inverse.numel())
    parts = [
        _costs_of_rows(part, inverse, block_shape[1]) for part in rows.split(at_once)
    ]
    return torch.cat(parts)


def _costs_of_rows(
    rows: torch.Tensor, inverse: torch.Tensor, cols: int
) -> torch.Tensor:
    """Costs ``(g, in/c)`` of ``g`` rows of blocks ``(g, r, in)``."""
    groups, _, width = rows.shape
    rows, inverse = rows.clone(), inverse.expand(groups, width, width).clone()
    blocks = width // cols
    costs = rows.new_zeros(groups, blocks)
    alive = torch.ones(groups, blocks, dtype=torch.bool, device=rows.device)
    floor = rows.new_zeros(groups, 1)
    left = blocks
    while left:
        now = min(left, math.ceil(ROUND * left))
        current = _costs_now(rows, inverse, alive, cols)
        found, chosen = current.topk(now, largest=False)
        found = torch.maximum(found, floor)
        floor = found.amax(1, keepdim=True)
        costs.scatter_(1, chosen, found)
        alive.scatter_(1, chosen, False)
        left -= now
        if left:
            offsets = torch.arange(cols, device=rows.device)
            columns = (chosen.unsqueeze(2) * cols + offsets).flatten(1)
            _remove_(rows, inverse, columns)
    return costs


def _costs_now(
    rows: torch.Tensor, inverse: torch.Tensor, alive: torch.Tensor, cols: int
) -> torch.Tensor:
    groups, height, width = rows.shape
    if cols == 1:
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        costs = rows.square().sum(1) / diagonal.clamp_min(1e-30)
    else:
        blocks = width // cols
        grid = inverse.view(groups, blocks, cols, blocks, cols)
        squares = grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()
        eye = torch.eye(cols, dtype=rows.dtype, device=rows.device)
        squares[~alive] = eye
        parts = rows.view(groups, height, blocks, cols).permute(0, 2, 3, 1)
        solved = torch.linalg.solve(squares, parts)
        costs = (parts * solved).sum((2, 3))
    return costs.masked_fill(~alive, math.inf)


def _remove_(rows: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> None:
    """Set ``columns`` ``(g, k)`` to zero, with the other columns making up for it."""
    _, height, width = rows.shape
    taken = inverse.gather(1, columns.unsqueeze(2).expand(-1, -1, width))
    square = taken.gather(2, columns.unsqueeze(1).expand(-1, columns.shape[1], -1))
    share = torch.linalg.solve(square, taken)
    picked = columns.unsqueeze(1).expand(-1, height, -1)
    rows.baddbmm_(rows.gather(2, picked), share, alpha=-1)
    rows.scatter_(2, picked, 0.0)
    inverse.baddbmm_(taken.transpose(1, 2), share, alpha=-1)


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
    covariance = damped(moments.covariance(centred))
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
