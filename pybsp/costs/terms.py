"""What the time of a linear layer is made of: terms whose coefficients are measured.

A term is a name and an amount: how much of that work a call does. Its coefficient, the
time of one unit on this CPU, comes from a fit (``model.py``); nothing here knows how
fast anything is. Coefficients are not negative and no amount falls when blocks are
added, so that more blocks never take less time.

Regimes of tokens, by the ``lanes`` tokens of a vector: every number below one vector is
its own; one and two vectors are; more are whole tiles of ``max_vectors`` and a rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..blocks import BlockShape, grid_shape

#: Single-row blocks of at least this many inputs are multiplied column by column.
COLUMN_RUN = 8
#: Outputs whose sums one pass over the inputs holds.
TILE_ROWS = 8
#: Bytes between addresses that share a set of the L1 cache.
PAGE = 4096

ROWS = (1, 2, 4, 8, 16, 32)
RUNS = (8, 32, 128)
#: Kept blocks of one block column that can share its inputs.
SHARING = (4, 16, 64, 256)
#: Bytes around the sizes of the caches of all CPUs.
WEIGHT_BYTES = (2**15, 2**18, 2**20, 2**22, 2**24)
TILE_BYTES = (2**16, 2**18, 2**20, 2**21, 2**22)

Terms = dict[str, float]


@dataclass(frozen=True)
class Call:
    """One call of a linear layer; ``blocks`` kept blocks, None for a dense weight."""

    tokens: int
    shape: tuple[int, int]
    block_shape: BlockShape = (1, 1)
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1; got {self.tokens}")

    @classmethod
    def sparse(
        cls,
        tokens: int,
        shape: tuple[int, int],
        block_shape: BlockShape,
        density: float,
    ) -> Call:
        """``density`` is the kept fraction of the blocks; one is kept above 0."""
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"density must lie between 0 and 1; got {density}")
        rows, cols = grid_shape(shape, block_shape)
        kept = max(1, round(density * rows * cols)) if density > 0 else 0
        return cls(tokens, shape, block_shape, kept)

    @property
    def weights(self) -> int:
        """Stored weights."""
        out_features, in_features = self.shape
        if self.blocks is None:
            return out_features * in_features
        return self.blocks * self.block_shape[0] * self.block_shape[1]


def spread(name: str, amount: float, value: float, points: Sequence[int]) -> Terms:
    """``amount`` shared between the two of ``points`` around ``value``, by logarithm.

    The coefficients are then the corners of a line that is straight between them.
    """
    value = min(max(value, points[0]), points[-1])
    for low, high in itertools.pairwise(points):
        if value <= high:
            share = math.log(value / low) / math.log(high / low)
            return {
                f"{name}{low}": amount * (1 - share),
                f"{name}{high}": amount * share,
            }
    raise AssertionError


def portions(name: str, unit: float, value: float, points: Sequence[int]) -> Terms:
    """``value`` cut at ``points``, in units of ``unit``: each stretch has its slope."""
    terms: Terms = {}
    begin = 0
    for end in (*points, None):
        upto = value if end is None else min(value, end)
        if upto > begin:
            terms[f"{name}{begin}"] = (upto - begin) / unit
        begin = end or 0
    return terms


def steps(name: str, amount: float, value: float, points: Sequence[int]) -> Terms:
    """``amount`` and, for each interval that ``value`` has passed, ``amount`` again.

    Part of the way, by logarithm, counts as that part: dearer by steps, never cheaper.
    """
    terms: Terms = {name: amount}
    for low, high in itertools.pairwise(points):
        if value > low:
            passed = math.log(value / low) / math.log(high / low)
            terms[f"{name}{high}"] = amount * min(passed, 1.0)
    return terms


def aliasing(stride: int) -> bool:
    """Whether rows ``stride`` floats apart all fall into the same sets of L1."""
    return 4 * stride % PAGE == 0


def sparse_terms(call: Call, lanes: int, max_vectors: int) -> Terms:
    """The terms of ``block_sparse_linear``."""
    out_features, in_features = call.shape
    block_rows = out_features // call.block_shape[0]
    vectors = -(-call.tokens // lanes)
    weight_bytes = 4 * call.weights
    terms: Terms = {}
    if call.tokens < lanes:
        regime = f"tokens{call.tokens}."
        terms[f"{regime}call"] = 1
        terms[f"{regime}in"] = in_features
        terms[f"{regime}out"] = out_features
        terms[f"{regime}block_rows"] = block_rows
        terms |= _multiply(regime, 1, call)
        if _by_column(call.block_shape):
            tail = call.block_shape[1] % lanes
            terms[f"{regime}tails"] = call.weights // call.block_shape[1] * tail
        terms |= portions(f"{regime}bytes", 4, weight_bytes, WEIGHT_BYTES)
        return terms
    x_floats, y_floats = vectors * in_features, call.tokens * out_features
    x_bytes = 4 * lanes * x_floats
    terms["call"] = 1
    terms |= portions("in", 4 * lanes, x_bytes, TILE_BYTES)
    terms |= portions("out", 4, 4 * y_floats, TILE_BYTES)
    terms["in_aliasing"] = x_floats * aliasing(in_features)
    terms["in_tail"] = vectors * (in_features % lanes)
    terms["out_tail"] = call.tokens * (out_features % lanes)
    terms["out_aliasing"] = y_floats * aliasing(out_features)
    terms |= portions("bytes", 4, weight_bytes, WEIGHT_BYTES)
    terms |= steps("loads", vectors * _visits(call), x_bytes, TILE_BYTES)
    whole, rest = divmod(vectors, max_vectors)
    regimes = {f"vectors{vectors}.": 1}
    if whole:
        regimes = {"tile.": whole, f"rest{rest}.": 1} if rest else {"tile.": whole}
    for regime, times in regimes.items():
        terms[f"{regime}block_rows"] = times * block_rows
        terms |= _multiply(regime, times, call)
    return terms


def _by_column(block_shape: BlockShape) -> bool:
    return block_shape[0] == 1 and block_shape[1] >= COLUMN_RUN


def _visits(call: Call) -> float:
    """Loads of one input feature."""
    if _by_column(call.block_shape):
        return call.weights / TILE_ROWS
    return call.weights / min(call.block_shape[0], TILE_ROWS)


def _multiply(regime: str, times: float, call: Call) -> Terms:
    """The products, by how many outputs share an input and inputs follow each other."""
    rows, cols = call.block_shape
    amount = times * call.weights
    if _by_column(call.block_shape):
        sharing, unit = call.weights / call.shape[1], 1 / (times * call.shape[1])
        terms = spread(f"{regime}run", amount, cols, RUNS)
        terms |= portions(f"{regime}sharing", unit, sharing, SHARING)
        return terms
    kind = "strip" if cols == 1 else "block"
    terms = spread(f"{regime}{kind}", amount, rows, ROWS)
    if cols > 1:
        terms[f"{regime}visits"] = amount / (cols * min(rows, TILE_ROWS))
    return terms


#: Numbers of tokens at which torch's dense layer is measured.
DENSE_TOKENS = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 24, 31, 32, 40, 48,
    64, 80, 96, 128, 192, 256, 384, 512,
)  # fmt: skip
DENSE_BYTES = (2**18, 2**20, 2**22, 2**24)


def dense_terms(call: Call) -> Terms:
    """The terms of ``torch.nn.functional.linear``, straight between DENSE_TOKENS."""
    out_features, in_features = call.shape
    last = DENSE_TOKENS[-1]
    if call.tokens >= last:
        shares = {last: call.tokens / last}
    else:
        high = next(at for at in DENSE_TOKENS if at >= call.tokens)
        low = max((at for at in DENSE_TOKENS if at < high), default=0)
        share = (call.tokens - low) / (high - low)
        shares = {high: share} | ({low: 1 - share} if share < 1 else {})
    terms: Terms = {}
    for at, share in shares.items():
        name = f"dense{at}."
        terms[f"{name}call"] = share
        terms[f"{name}in"] = share * in_features
        terms[f"{name}out"] = share * out_features
        weights = call.weights
        # Many tokens use a weight so often that it no longer matters where it was.
        sizes = DENSE_BYTES if at <= 64 else DENSE_BYTES[:-1]
        terms |= spread(f"{name}bytes", share * weights, 4 * weights, sizes)
    return terms
