"""Block shapes: parsing, fractions, division, views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pybsp import blocks


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("8,1", (8, 1)),
        (" 8 , 1 ", (8, 1)),
        ("32x32", (32, 32)),
        ("1,in/8", (1, "in/8")),
        ("out/4,1", ("out/4", 1)),
        ("out,in", ("out", "in")),
    ],
)
def test_parse(text: str, spec: Any) -> None:
    assert blocks.parse_block_shape(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "8", "8,1,1", "8;1", "0,1", "-8,1", "8,1.5", "a,b", "in/0,1", "in/-2,1",
     "in/,1", "width/2,1", "1,in/8/2", "²,1", "8,"],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"block.?shape"):
        blocks.parse_block_shape(text)


@pytest.mark.parametrize("extent", [0, -1, 1.5, True, None, "8", "in/2/2"])
def test_extents_are_positive_integers_or_fractions(extent: object) -> None:
    with pytest.raises(ValueError, match="positive integers or fractions"):
        blocks.check_block_shape_spec((extent, 1))
    with pytest.raises(ValueError, match="positive integers or fractions"):
        blocks.check_block_shape_spec([1, extent])


@pytest.mark.parametrize("spec", [None, 8, (8,), (8, 1, 1), "8,1", {8: 1, 1: 8}])
def test_a_spec_is_a_pair(spec: object) -> None:
    with pytest.raises(ValueError, match="must be a pair"):
        blocks.check_block_shape_spec(spec)


@pytest.mark.parametrize(
    ("spec", "weight", "shape"),
    [
        ((8, 1), (16, 5), (8, 1)),
        ((1, "in/8"), (3, 768), (1, 96)),
        (("out/2", "in"), (6, 4), (3, 4)),
        (("in/2", "out"), (2, 4), (2, 2)),
    ],
)
def test_resolve(spec: Any, weight: Any, shape: Any) -> None:
    assert blocks.resolve_block_shape(spec, weight) == shape


@pytest.mark.parametrize(
    ("spec", "weight", "message"),
    [
        ((1, "in/8"), (4, 12), "'in/8' does not divide: in = 12"),
        ((3, 1), (8, 8), "out = 8 is not a multiple of 3"),
        ((1, 16), (8, 8), "in = 8 is not a multiple of 16"),
        (("in", 1), (3, 8), "out = 3 is not a multiple of 8"),
        ((1, 1), (8,), "two dimensions"),
        ((1, 1), (8, 8, 8), "two dimensions"),
    ],
)
def test_resolve_refuses(spec: Any, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks.resolve_block_shape(spec, weight)


def test_fractions_must_be_resolved_before_use() -> None:
    with pytest.raises(ValueError, match="resolve fractions with"):
        blocks.grid_shape((8, 8), (1, "in/2"))  # type: ignore[arg-type]
    assert blocks.grid_shape((8, 6), (4, 3)) == (2, 2)
    assert blocks.grid_shape(torch.Size((0, 6)), (4, 3)) == (0, 2)


def test_block_view_shares_memory_and_places_blocks() -> None:
    weight = torch.arange(24.0).view(4, 6)
    view = blocks.block_view(weight, (2, 3))
    assert view.shape == (2, 2, 2, 3)
    assert torch.equal(view[1, 0], weight[2:, :3])
    view[0, 1] = -1
    assert (weight[:2, 3:] == -1).all()
    assert blocks.block_view(weight.t(), (3, 2)).shape == (2, 2, 3, 2)


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_expand_is_the_view_filled_block_by_block(grid: Any, block: Any) -> None:
    per_block = torch.rand(grid)
    dense = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    blocks.block_view(dense, block).copy_(per_block[:, :, None, None])
    assert torch.equal(blocks.expand_blocks(per_block, block), dense)
