"""What a layer costs on this CPU, dense and block-sparse, by measuring both.

Neighbours on a shared machine slow both calls alike, so the two are timed in turn and
each is represented by its median: the ratio is steadier than either time.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import ops
from .blocks import BlockShape, grid_shape
from .matrix import BlockSparseMatrix
from .reference import ACTIVATIONS

#: Densities are rounded to this step before measuring: layers that differ less share
#: one measurement.
DENSITY_STEP = 0.025


@dataclass(frozen=True)
class Cost:
    """Median time of one call in microseconds."""

    dense_us: float
    sparse_us: float

    @property
    def gain(self) -> float:
        """How many times faster the block-sparse call is."""
        return self.dense_us / self.sparse_us


def linear_cost(
    shape: tuple[int, int],
    block_shape: BlockShape,
    density: float,
    tokens: int = 128,
    activation: str | None = None,
) -> Cost:
    """Time ``x @ W.T + bias`` for one layer, dense and packed.

    Parameters
    ----------
    shape : ``(out, in)`` of the weight.
    density : kept fraction of the blocks, 0 to 1; rounded to ``DENSITY_STEP``.
    tokens : rows of ``x`` ``(tokens, in)``, at least 1.
    activation : computed by both calls when given.

    Measured once per process for each set of arguments and each thread count
    (``torch.get_num_threads()``).
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must lie between 0 and 1; got {density}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")
    ops.check_activation(activation)
    grid = grid_shape(shape, block_shape)
    blocks = round(round(density / DENSITY_STEP) * DENSITY_STEP * grid[0] * grid[1])
    kept = max(1, blocks) if density > 0 else 0
    threads = torch.get_num_threads()
    isa = ops.active_isa()
    return _measure(shape, block_shape, kept, tokens, activation, threads, isa)


@functools.cache
def _measure(
    shape: tuple[int, int],
    block_shape: BlockShape,
    kept: int,
    tokens: int,
    activation: str | None,
    threads: int,  # noqa: ARG001 (part of the key)
    isa: str,  # noqa: ARG001 (likewise)
) -> Cost:
    generator = torch.Generator().manual_seed(0)
    grid = grid_shape(shape, block_shape)
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:kept]] = True
    apply: Callable[[torch.Tensor], torch.Tensor] = ACTIVATIONS[activation]
    with torch.inference_mode():
        weight = torch.randn(shape, generator=generator)
        bias = torch.randn(shape[0], generator=generator)
        x = torch.randn(tokens, shape[1], generator=generator)
        matrix = BlockSparseMatrix.from_mask(weight, mask.view(grid), block_shape)
        return Cost(
            *interleaved_medians(
                lambda: apply(F.linear(x, weight, bias)),
                lambda: ops.block_sparse_linear(x, matrix, bias, activation),
            )
        )


def interleaved_medians(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int = 7,
) -> tuple[float, float]:
    """Median microseconds of each call, timed in turn after one call of each."""
    calls = (first, second)
    for call in calls:
        call()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, seen in zip(calls, times, strict=True):
            start = time.perf_counter_ns()
            call()
            seen.append((time.perf_counter_ns() - start) / 1000)
    return statistics.median(times[0]), statistics.median(times[1])
