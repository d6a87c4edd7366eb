"""Times of linear layers on this CPU, and the calls that a fit measures.

A time is that of the best of a few calls in a row: inputs and weights are as warm as a
call leaves them for the next. On a shared machine the best is the time without
neighbours, the more so as the calls come in several sweeps over all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from .. import ops
from ..blocks import BlockShape, grid_shape
from ..matrix import BlockSparseMatrix
from ..reference import ACTIVATIONS
from .terms import DENSE_TOKENS, Call, Machine

#: Sizes of the layers measured for a fit; every block of BLOCKS divides them.
SIZES = (256, 320, 328, 512, 640, 896, 1160, 1280, 2048, 2048, 2560, 3584, 5120)
#: Blocks, of each kind that has a term of its own; -8 stands for in/8.
KINDS = (
    (1, 1), (2, 1), (4, 1), (4, 1), (8, 1), (8, 1), (16, 1), (16, 1), (32, 1),
    (1, 4), (2, 2), (4, 4), (4, 4), (4, 16), (8, 4), (16, 4), (16, 4), (16, 16),
    (32, 32),
    (1, 8), (1, 20), (1, 32), (1, 64), (1, 64), (1, -8), (1, -8), (1, -4),
)  # fmt: skip
LEAST_DENSITY = 0.015
#: Most multiply-adds of a measured call, and most weights of a measured layer.
MOST_WORK = 150_000_000
MOST_WEIGHTS = 4_800_000
DENSE_SHAPES = (
    (256, 256), (256, 640), (640, 256), (320, 1280), (1280, 320), (512, 512),
    (1160, 512), (512, 2048), (896, 896), (1280, 1280), (896, 3584), (3584, 896),
    (2560, 640), (2048, 2048),
)  # fmt: skip
MOST_DENSE_WORK = 600_000_000
#: A row of calls ends after so many nanoseconds, and two calls.
LONG_ROW_NS = 1_800_000


def this_machine() -> Machine:
    """The tile of the active instruction set, and L2."""
    return Machine(*ops.token_tile(), ops.l2_cache_bytes())


def best_times(
    calls: Sequence[Callable[[], object]],
    sweeps: int,
    seconds: float = float("inf"),
    repeats: int = 4,
) -> list[float]:
    """Best microseconds of each call in ``sweeps`` over all, ``repeats`` in a row each.

    After other calls it takes about three until the caches hold what they will hold;
    of calls that take long two are enough. No further sweep begins after ``seconds``.
    """
    best = [float("inf")] * len(calls)
    # In no order, so that a busy moment does not spoil all calls of a kind.
    order = random.Random(0).sample(range(len(calls)), len(calls))
    started = time.perf_counter()
    for _ in range(sweeps):
        for index in order:
            call = calls[index]
            row_started = start = time.perf_counter_ns()
            for repeat in range(repeats):
                call()
                end = time.perf_counter_ns()
                best[index] = min(best[index], (end - start) / 1000)
                if repeat and end - row_started > LONG_ROW_NS:
                    break
                start = end
        if time.perf_counter() - started > seconds:
            break
    return best


class Layers:
    """Runnable calls. All inputs lie in one piece of memory, all weights in another."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._numbers: dict[str, torch.Tensor] = {}
        self._matrices: dict[Call, BlockSparseMatrix] = {}

    def runnable(
        self, call: Call, activation: str | None = None, dtype: str = "float32"
    ) -> Callable[[], object]:
        """The call as a function without arguments; with a bias. ``dtype``: of a
        block-sparse weight."""
        out_features, in_features = call.shape
        x = self._random("input", call.tokens, in_features)
        bias = self._random("bias", out_features)
        if call.blocks is None:
            weight = self._random("weight", out_features, in_features)
            if activation is None:
                return lambda: F.linear(x, weight, bias)
            apply: Callable[[torch.Tensor], torch.Tensor] = ACTIVATIONS[activation]
            return lambda: apply(F.linear(x, weight, bias))
        layer = replace(call, tokens=1)
        if layer not in self._matrices:
            self._matrices[layer] = self._matrix(layer)
        matrix = self._matrices[layer]
        if dtype != "float32":
            matrix = matrix.quantize(dtype, clip="max")
        return lambda: ops.block_sparse_linear(x, matrix, bias, activation)

    def _random(self, what: str, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        numbers = self._numbers.get(what)
        if numbers is None or size > numbers.numel():
            numbers = self._numbers[what] = self._normal(size)
        return numbers[:size].view(shape)

    # Device and type are said: the caller's defaults may be others.
    def _normal(self, size: int) -> torch.Tensor:
        numbers = torch.empty(size, dtype=torch.float32, device="cpu")
        return numbers.normal_(generator=self._generator)

    def _scores(self, rows: int, cols: int) -> torch.Tensor:
        numbers = torch.empty(rows, cols, dtype=torch.float32, device="cpu")
        return numbers.uniform_(generator=self._generator)

    def _matrix(self, call: Call) -> BlockSparseMatrix:
        """Exactly ``call.blocks`` blocks in random places."""
        assert call.blocks is not None
        grid = grid_shape(call.shape, call.block_shape)
        draw = self._few_blocks if grid[0] * grid[1] <= 32768 else self._many_blocks
        counts, cols = draw(grid, call.blocks)
        crow_indices = F.pad(counts.cumsum(0), (1, 0))
        height, width = call.block_shape
        values = self._random("weight", call.blocks, width, height).transpose(1, 2)
        return BlockSparseMatrix(crow_indices, cols, values, call.shape)

    def _few_blocks(self, grid: tuple[int, int], kept: int) -> tuple[torch.Tensor, ...]:
        """Blocks in each block row, and the block column of each block."""
        scores = self._scores(*grid)
        rows, cols = ops.block_mask(scores, kept).nonzero(as_tuple=True)
        return torch.bincount(rows, minlength=grid[0]), cols

    def _many_blocks(
        self, grid: tuple[int, int], kept: int
    ) -> tuple[torch.Tensor, ...]:
        """The same with 32 different rows: a fit draws hundreds of large patterns."""
        each, more = divmod(kept, grid[0])
        # numpy sorts several times faster.
        order = np.argsort(self._scores(32, grid[1]).numpy(), axis=1).astype(np.int32)
        cols = [
            np.tile(np.sort(order[:, :count], axis=1), (-(-rows // 32), 1))[:rows]
            for count, rows in ((each + 1, more), (each, grid[0] - more))
        ]
        counts = torch.full((grid[0],), each, device="cpu")
        counts[:more] += 1
        together = np.concatenate([part.ravel() for part in cols])
        return counts, torch.from_numpy(together)


def dense_calls() -> list[Call]:
    """Dense calls for a fit: every number of tokens with layers of many sizes."""
    calls = []
    for tokens in DENSE_TOKENS:
        for shape in DENSE_SHAPES:
            if tokens * shape[0] * shape[1] <= MOST_DENSE_WORK:
                calls.append(Call(tokens, shape))
    return calls


def sparse_calls(machine: Machine) -> list[Call]:
    """Block-sparse calls for a fit: few tokens and every width of tile, all kinds."""
    draw = random.Random(0)
    lanes, max_vectors = machine.lanes, machine.max_vectors
    limit = min(4, lanes // 2)
    # The same layers for all few tokens: they are built once. Half of them are larger
    # than L2, which is where reading them takes the time.
    layers = [_draw(draw, limit, kind, 2.5) for kind in KINDS * 6]
    few = [tokens for tokens in (1, 2, 4) if tokens <= limit]
    calls = [replace(layer, tokens=tokens) for tokens in few for layer in layers]
    # Narrow tiles are slowed down by more things.
    vectors = [1] * 8 + [v for v in range(2, max_vectors + 1) for _ in range(5)]
    vectors += [max_vectors + 1, 2 * max_vectors - 1]
    vectors += [max_vectors * n for n in (2, 4, 6, 10)]
    for number in vectors:
        # Whole vectors, and ragged ones.
        sizes = (lanes * number, max(lanes * number - lanes // 2 + 1, 1))
        calls += [_draw(draw, sizes[i % 2], kind) for i, kind in enumerate(KINDS)]
    return calls


def _draw(
    draw: random.Random, tokens: int, kind: BlockShape, skew: float = 1.5
) -> Call:
    """A layer of any size and density that is small enough; ``skew`` raises both."""
    while True:
        shape = (draw.choice(SIZES), draw.choice(SIZES))
        block_shape = (kind[0], kind[1] if kind[1] > 0 else shape[1] // -kind[1])
        density = LEAST_DENSITY ** (draw.random() ** skew)
        size = shape[0] * shape[1]
        divides = shape[0] % block_shape[0] == shape[1] % block_shape[1] == 0
        work = density * size * tokens
        if divides and size <= MOST_WEIGHTS and work <= MOST_WORK:
            return Call.sparse(tokens, shape, block_shape, density)


def measure(
    calls: Sequence[Call], sweeps: int, seconds: float, repeats: int = 4
) -> list[float]:
    """Best microseconds of each call, made of random numbers; see ``best_times``."""
    layers = Layers()
    with torch.inference_mode():
        runnable = [layers.runnable(call) for call in calls]
        return best_times(runnable, sweeps, seconds, repeats)
