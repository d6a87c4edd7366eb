"""What the time of a linear layer is made of: terms whose coefficients are measured.

A term is a name and an amount: how much of that work a call does. Its coefficient, the
time of one unit on this CPU, comes from a fit (``model.py``); nothing here knows how
fast anything is. Coefficients are not negative and no amount falls when blocks are
added, so that more blocks never take less time.

Regimes of tokens: one, two and four of a few tokens, and tiles by their width. A call
is a sum of these: 35 tokens on 16 lanes are a tile of two vectors, two tokens and one.
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
RUNS = (8, 128)
#: Most rows of a part by column, and kept blocks of its columns that share inputs.
PART_ROWS = 1024
SHARING = (1, 4, 16)
#: Bytes around the sizes of the caches of all CPUs.
WEIGHT_BYTES = (2**15, 2**18, 2**20, 2**22, 2**24)
#: Within L2; past it there are other terms.
FEW_BYTES = (2**15, 2**18)
TILE_BYTES = (2**16, 2**18, 2**20, 2**21, 2**22)

Terms = dict[str, float]


@dataclass(frozen=True)
class Machine:
    """What the terms depend on: the tile of tokens in use, and the size of L2."""

    lanes: int
    max_vectors: int
    l2_bytes: int = 2**20


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


def few_tokens(tokens: int, lanes: int, block_shape: BlockShape = (8, 1)) -> int:
    """Of ``tokens``, those that are multiplied one, two or four at a time."""
    rest = tokens % lanes
    return rest if rest <= min(2 if _by_column(block_shape) else 4, lanes // 2) else 0


def tile_widths(vectors: int, max_vectors: int) -> dict[int, int]:
    """Tiles by their number of vectors: as few as possible, of similar width."""
    tiles = -(-vectors // max_vectors)
    width, wider = divmod(vectors, tiles)
    return {w: n for w, n in ((width + 1, wider), (width, tiles - wider)) if n}


def sparse_terms(call: Call, machine: Machine) -> Terms:
    """The terms of ``block_sparse_linear``."""
    few = few_tokens(call.tokens, machine.lanes, call.block_shape)
    tokens = call.tokens - few
    terms = _tile_terms(call, tokens, machine) if tokens else {"few.call": 1.0}
    for size in (4, 2, 1):
        if few & size:
            terms |= _few_terms(call, size, machine)
    return terms


def _few_terms(call: Call, tokens: int, machine: Machine) -> Terms:
    """One pass over the weights for ``tokens`` tokens: 1, 2 or 4."""
    rows, cols = call.block_shape
    regime = f"few{tokens}."
    by_column = _by_column(call.block_shape)
    kind = "column" if by_column else "row"
    terms: Terms = {
        f"{regime}out": call.shape[0],
        f"{regime}{kind}.block_rows": call.shape[0] // rows,
    }
    if by_column:
        runs = call.weights // cols
        terms[f"{regime}runs"] = runs
        terms[f"{regime}tails"] = runs * (cols % machine.lanes)
        products = spread(f"{regime}run", call.weights, cols, RUNS)
    else:
        products = _by_row(regime, call.weights, call.block_shape)
    # Past L2 reading the weights takes the time, unless multiplying takes longer.
    read = past_l2(call, machine) * call.weights
    if by_column:
        terms |= spread(f"{regime}runs.past", read, cols, RUNS)
    else:
        terms |= spread(f"{regime}past", read, rows, ROWS)
    return terms | products | portions(f"{regime}bytes", 4, 4 * call.weights, FEW_BYTES)


def past_l2(call: Call, machine: Machine) -> float:
    """The part of the weights that L2 no longer keeps for the next call, 0 to 1."""
    return min(max((4 * call.weights / machine.l2_bytes - 0.7) / 0.55, 0.0), 1.0)


def _tile_terms(call: Call, tokens: int, machine: Machine) -> Terms:
    lanes = machine.lanes
    out_features, in_features = call.shape
    vectors = -(-tokens // lanes)
    x_floats, y_floats = vectors * in_features, tokens * out_features
    terms: Terms = {"call": 1}
    terms |= portions("in", 4 * lanes, 4 * lanes * x_floats, TILE_BYTES)
    terms |= portions("out", 4, 4 * y_floats, TILE_BYTES)
    terms["in_aliasing"] = x_floats * aliasing(in_features)
    terms["in_tail"] = vectors * (in_features % lanes)
    terms["out_tail"] = tokens * (out_features % lanes)
    terms["out_aliasing"] = y_floats * aliasing(out_features)
    by_column = _by_column(call.block_shape)
    kind = "column" if by_column else "row"
    terms |= portions(f"{kind}.bytes", 4, 4 * call.weights, WEIGHT_BYTES)
    block_rows = out_features // call.block_shape[0]
    past = past_l2(call, machine)
    # So many tiles of inputs share L2 with the part of the weights that they meet.
    widest = 4 * lanes * machine.max_vectors * in_features
    held = max(1.0, machine.l2_bytes / 3 / widest)
    for width, tiles in tile_widths(vectors, machine.max_vectors).items():
        regime = f"tile{width}."
        tile_bytes = 4 * lanes * width * in_features
        terms[f"{regime}{kind}.block_rows"] = tiles * block_rows
        terms |= steps(f"{regime}loads", tiles * _loads(call), tile_bytes, TILE_BYTES)
        read = past * call.weights * max(1.0, tiles / held)
        terms[f"{regime}{kind}.past"] = read
        if by_column:
            terms |= _by_columns(regime, tiles, call)
            terms[f"{regime}runs.past"] = read / call.block_shape[1]
        else:
            terms |= _by_row(regime, tiles * call.weights, call.block_shape)
    return terms


def _by_column(block_shape: BlockShape) -> bool:
    return block_shape[0] == 1 and block_shape[1] >= COLUMN_RUN


def _loads(call: Call) -> float:
    """Loads of one input feature that need not be in L1."""
    return call.weights / (8 if _by_column(call.block_shape) else call.block_shape[0])


def _by_row(regime: str, amount: float, block_shape: BlockShape) -> Terms:
    """The products of blocks, by how many outputs share an input."""
    rows, cols = block_shape
    kind = "strip" if cols == 1 else "block"
    terms = spread(f"{regime}{kind}", amount, rows, ROWS)
    if cols > 1:
        terms[f"{regime}visits"] = amount / (cols * min(rows, TILE_ROWS))
    return terms


def _by_columns(regime: str, tiles: float, call: Call) -> Terms:
    """The products of runs, by their length and how many of a part share inputs."""
    parts = max(1.0, call.shape[0] / PART_ROWS)
    sharing = call.weights / call.shape[1] / parts
    terms = spread(f"{regime}run", tiles * call.weights, call.block_shape[1], RUNS)
    terms[f"{regime}runs"] = tiles * call.weights / call.block_shape[1]
    unit = 1 / (tiles * parts * call.shape[1])
    return terms | portions(f"{regime}sharing", unit, sharing, SHARING)


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
