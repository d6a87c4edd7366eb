"""Block shapes, the grid of a matrix, and views of its blocks.

A matrix ``W`` of shape ``(out, in)`` with block shape ``(r, c)`` is a grid of
``(out/r, in/c)`` blocks; block ``(i, j)`` is ``W[i*r:(i+1)*r, j*c:(j+1)*c]``.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

BlockShape: TypeAlias = tuple[int, int]
#: A block shape whose extents may also be ``"in/8"``, ``"out/4"``, ``"in"`` or
#: ``"out"``: a fraction of the matrix it is applied to.
BlockShapeSpec: TypeAlias = tuple[int | str, int | str]


def parse_block_shape(text: str) -> BlockShapeSpec:
    """``"8,1"`` -> ``(8, 1)``; ``"1,in/8"`` -> ``(1, "in/8")``."""
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    if len(parts) != 2:
        raise ValueError(
            f"a block shape is two extents 'out,in' such as '8,1'; got {text!r}"
        )
    rows, cols = (int(part) if part.isdecimal() else part for part in parts)
    return check_block_shape_spec((rows, cols))


def check_block_shape_spec(spec: object) -> BlockShapeSpec:
    """Return ``spec`` as a pair of positive integers or fraction texts."""
    if not isinstance(spec, (tuple, list)) or len(spec) != 2:
        raise ValueError(
            f"block_shape must be a pair (out, in) such as (8, 1); got {spec!r}"
        )
    for extent in spec:
        if isinstance(extent, str):
            side, _, divisor = extent.partition("/")
            if side in ("in", "out") and (
                (divisor.isdecimal() and int(divisor) > 0) or "/" not in extent
            ):
                continue
        # torch.SymInt: the extents of a tensor inside torch.compile.
        elif (
            isinstance(extent, (int, torch.SymInt))
            and not isinstance(extent, bool)
            and extent > 0
        ):
            continue
        raise ValueError(
            "block_shape extents must be positive integers or fractions such as "
            f"'in/8'; got {extent!r} in {tuple(spec)!r}"
        )
    return (spec[0], spec[1])


def resolve_block_shape(
    spec: BlockShapeSpec, weight_shape: tuple[int, int] | torch.Size
) -> BlockShape:
    """The block shape in numbers for a weight of shape ``(out, in)``.

    Raises ``ValueError`` when the result does not divide the weight: shapes that do
    not divide are refused, never padded.
    """
    if len(weight_shape) != 2:
        raise ValueError(
            f"a block-sparse weight has two dimensions; got shape {tuple(weight_shape)}"
        )
    size = {"out": int(weight_shape[0]), "in": int(weight_shape[1])}
    resolved = []
    for extent in check_block_shape_spec(spec):
        if isinstance(extent, str):
            side, _, divisor = extent.partition("/")
            parts = int(divisor or 1)
            if size[side] % parts:
                raise ValueError(
                    f"block extent '{extent}' does not divide: {side} = {size[side]} "
                    f"is not a multiple of {parts}; choose a divisor of {size[side]}"
                )
            resolved.append(size[side] // parts)
        else:
            resolved.append(extent)
    shape = (resolved[0], resolved[1])
    grid_shape(weight_shape, shape)
    return shape


def grid_shape(
    weight_shape: tuple[int, int] | torch.Size, block_shape: BlockShape
) -> tuple[int, int]:
    """``(out/r, in/c)``; ``ValueError`` when the block shape does not divide."""
    if len(weight_shape) != 2:
        raise ValueError(
            f"a block-sparse weight has two dimensions; got shape {tuple(weight_shape)}"
        )
    rows, cols = check_block_shape(block_shape)
    out_features, in_features = weight_shape
    for name, size, extent in (
        ("out", out_features, rows),
        ("in", in_features, cols),
    ):
        if size % extent:
            raise ValueError(
                f"block_shape {(rows, cols)} does not divide a weight of shape "
                f"{tuple(weight_shape)}: {name} = {size} is not a multiple of "
                f"{extent}; choose a block shape that divides it or exclude the module"
            )
    return out_features // rows, in_features // cols


def check_block_shape(block_shape: object) -> BlockShape:
    """Return ``block_shape`` as two positive integers."""
    rows, cols = check_block_shape_spec(block_shape)
    if isinstance(rows, str) or isinstance(cols, str):
        raise ValueError(
            f"block_shape must be two integers here; got {(rows, cols)!r}; "
            "resolve fractions with pybsp.blocks.resolve_block_shape"
        )
    return rows, cols


def block_view(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """View of ``weight`` as ``(out/r, in/c, r, c)``; no copy."""
    grid_rows, grid_cols = grid_shape(weight.shape, block_shape)
    rows, cols = block_shape
    grid = weight.view(grid_rows, rows, grid_cols, cols)
    return grid.transpose(1, 2)


def expand_blocks(per_block: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """Repeat a ``(out/r, in/c)`` tensor over its blocks: ``(out, in)``."""
    rows, cols = block_shape
    return per_block.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
