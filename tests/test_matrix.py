"""``BlockSparseMatrix``: round trips, fields, what it refuses, copies, schedule."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_linear, block_sparse_weight, same_bits

from pybsp import BlockSparseMatrix, ops
from pybsp.blocks import grid_shape
from pybsp.quantization import quantize_rows

BLOCKS = [
    (8, 1), (1, 8), (4, 4), (1, 1), (24, 48), (24, 1), (1, 48), (3, 2), (2, 16),
]  # fmt: skip
blocks = pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
no_bsr_warning = pytest.mark.filterwarnings("ignore:Sparse BSR:UserWarning")


@blocks
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_dense_round_trip(block_shape: Any, density: float) -> None:
    weight = block_sparse_weight((24, 48), block_shape, density)
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    assert W.shape == (24, 48)
    assert W.block_shape == block_shape
    kept = int((ops.block_norms(weight, block_shape) > 0).sum())
    assert W.nnz == kept
    assert W.values.shape == (kept, *block_shape)
    assert W.density == pytest.approx(kept * block_shape[0] * block_shape[1] / 24 / 48)
    grid = grid_shape((24, 48), block_shape)
    assert W.nbytes == 4 * (W.values.numel() + kept + grid[0] + 1)
    assert W.crow_indices.dtype == W.col_indices.dtype == torch.int32
    assert W.crow_indices.shape == (grid[0] + 1,)
    assert same_bits(W.to_dense(), weight)
    assert f"density={W.density:.3f}" in repr(W)


@no_bsr_warning
@blocks
def test_bsr_round_trip(block_shape: Any) -> None:
    weight = block_sparse_weight((24, 48), block_shape, 0.4)
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    bsr = W.to_bsr()
    assert bsr.layout == torch.sparse_bsr
    assert torch.equal(bsr.to_dense(), weight)
    theirs = weight.to_sparse_bsr(block_shape)
    assert torch.equal(bsr.values(), theirs.values())
    assert torch.equal(bsr.crow_indices().long(), theirs.crow_indices())
    for source in (bsr, theirs):
        again = BlockSparseMatrix.from_bsr(source)
        assert torch.equal(again.values, W.values)
        assert torch.equal(again.col_indices, W.col_indices)
        assert torch.equal(again.to_dense(), weight)


def test_a_block_of_zeros_is_dropped_and_a_tiny_one_kept() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[2, 2], weight[3, 3] = 1e-45, -0.0, -1.0
    W = BlockSparseMatrix.from_dense(weight, (2, 2))
    assert W.col_indices.tolist() == [0, 1]
    weight[3, 3] = 0
    assert BlockSparseMatrix.from_dense(weight, (2, 2)).col_indices.tolist() == [0]


def test_from_mask_keeps_what_the_mask_says() -> None:
    weight = torch.randn(4, 6)
    weight[:2, :3] = 0
    mask = torch.tensor([[True, False], [False, True]])
    W = BlockSparseMatrix.from_mask(weight, mask, (2, 3))
    assert W.crow_indices.tolist() == [0, 1, 2]
    assert W.col_indices.tolist() == [0, 1]
    assert torch.equal(W.values[1], weight[2:, 3:])
    with torch.device("meta"):
        assert BlockSparseMatrix.from_mask(weight, mask, (2, 3)).nnz == 2


def test_fractions_of_the_matrix_are_block_shapes() -> None:
    weight = torch.randn(24, 48)
    assert BlockSparseMatrix.from_dense(weight, (1, "in/8")).block_shape == (1, 6)
    assert BlockSparseMatrix.from_dense(weight, ("out", "in")).block_shape == (24, 48)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_views_convert_like_their_copies(layout: str) -> None:
    weight = {
        "transposed": torch.randn(8, 12).t(),
        "strided": torch.randn(24, 16)[::2, ::2],
        "expanded": torch.randn(1, 8).expand(12, 8),
    }[layout]
    W = BlockSparseMatrix.from_dense(weight, (4, 2))
    assert torch.equal(W.to_dense(), weight)


def test_the_matrix_does_not_share_the_dense_weight() -> None:
    weight = torch.randn(8, 8)
    for block_shape in ((8, 1), (1, 8), (8, 8), (1, 1)):
        W = BlockSparseMatrix.from_dense(weight, block_shape)
        before = W.to_dense()
        weight.add_(1)
        assert torch.equal(W.to_dense(), before), block_shape


def test_from_dense_cuts_the_graph_and_to_dense_keeps_it() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    W = BlockSparseMatrix.from_dense(weight, (4, 1))
    assert not W.values.requires_grad
    W.values.requires_grad_()
    W.to_dense().sum().backward()
    assert torch.equal(W.values.grad, torch.ones_like(W.values))


@pytest.mark.parametrize("block_shape", [(4, 3), (4, 1), (1, 3), (1, 1)], ids=str)
def test_values_that_lie_right_are_not_copied(block_shape: Any) -> None:
    weight = torch.randn(8, 6)
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    assert W.values.transpose(1, 2).is_contiguous()
    again = BlockSparseMatrix(W.crow_indices, W.col_indices, W.values, W.shape)
    assert again.values is W.values
    assert again.crow_indices is W.crow_indices
    row_major = BlockSparseMatrix(
        W.crow_indices, W.col_indices, W.values.contiguous(), W.shape
    )
    assert row_major.values.transpose(1, 2).is_contiguous()
    assert torch.equal(row_major.to_dense(), weight)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(special: float) -> None:
    weight = torch.randn(8, 8)
    weight[3, 4] = special
    with pytest.raises(ValueError, match=r"NaN or infinite.*check the checkpoint"):
        BlockSparseMatrix.from_dense(weight, (4, 1))


NOT_A_WEIGHT: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "float64": (torch.zeros(8, 8).double(), (4, 1), TypeError, "must be float32"),
    "bfloat16": (torch.zeros(8, 8).bfloat16(), (4, 1), TypeError, "must be float32"),
    "int": (torch.zeros(8, 8).int(), (4, 1), TypeError, "must be float32"),
    "numpy": (np.zeros((8, 8), np.float32), (4, 1), TypeError, "torch tensor"),
    "1d": (torch.zeros(8), (4, 1), ValueError, "two dimensions"),
    "3d": (torch.zeros(1, 8, 8), (4, 1), ValueError, "two dimensions"),
    "rows": (torch.zeros(8, 8), (3, 1), ValueError, "does not divide.*out = 8"),
    "columns": (torch.zeros(8, 8), (1, 5), ValueError, "does not divide.*in = 8"),
    "zero": (torch.zeros(8, 8), (0, 1), ValueError, "positive integers"),
    "one number": (torch.zeros(8, 8), 4, ValueError, "must be a pair"),
    "empty": (torch.zeros(0, 8), (4, 1), ValueError, "does not divide"),
}


@pytest.mark.parametrize("case", NOT_A_WEIGHT)
def test_from_dense_refuses(case: str) -> None:
    weight, block_shape, error, message = NOT_A_WEIGHT[case]
    with pytest.raises(error, match=message):
        BlockSparseMatrix.from_dense(weight, block_shape)


@no_bsr_warning
def test_from_bsr_refuses_other_tensors() -> None:
    for tensor in (
        torch.eye(4),
        torch.eye(4).to_sparse_csr(),
        torch.eye(4).to_sparse_bsc((2, 2)),
        torch.stack([torch.eye(4)] * 2).to_sparse_bsr((2, 2)),
    ):
        with pytest.raises(TypeError, match=r"two-dimensional torch\.sparse_bsr"):
            BlockSparseMatrix.from_bsr(tensor)
    with pytest.raises(TypeError, match="values must be float32"):
        BlockSparseMatrix.from_bsr(torch.eye(4).double().to_sparse_bsr((2, 2)))


def ints(*entries: int) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.int64)


# A matrix (4, 6) of blocks (2, 2): a grid of 2 x 3 with three blocks.
GOOD: dict[str, Any] = {
    "crow_indices": ints(0, 2, 3),
    "col_indices": ints(0, 2, 1),
    "values": torch.ones(3, 2, 2),
    "shape": (4, 6),
}
HOSTILE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "crow starts late": ({"crow_indices": ints(1, 2, 3)}, ValueError, "from 0 to"),
    "crow ends early": ({"crow_indices": ints(0, 1, 2)}, ValueError, "from 0 to"),
    "crow ends late": ({"crow_indices": ints(0, 2, 4)}, ValueError, "from 0 to"),
    "crow decreases": (
        {"crow_indices": torch.tensor([0, 5, 3], dtype=torch.int32)},
        ValueError, "must not decrease",
    ),
    "crow turns back": (
        {
            "crow_indices": ints(0, 3, 1, 3), "col_indices": ints(0, 1, 2),
            "shape": (6, 6),
        },
        ValueError, "must not decrease",
    ),
    "crow negative": (
        {"crow_indices": torch.tensor([0, -1, 3], dtype=torch.int32)},
        ValueError, "must not decrease",
    ),
    "crow negative int64": ({"crow_indices": ints(0, -1, 3)}, ValueError, "from -1"),
    "crow wraps": ({"crow_indices": ints(0, 2**32 + 2, 3)}, ValueError, "outside of"),
    "crow wraps negative": (
        {"crow_indices": ints(0, 2, 3 - 2**32)}, ValueError, "outside of",
    ),
    "crow short": ({"crow_indices": ints(0, 3)}, ValueError, "one entry more"),
    "crow long": ({"crow_indices": ints(0, 2, 3, 3)}, ValueError, "one entry more"),
    "crow empty": ({"crow_indices": ints()}, ValueError, "one entry more"),
    "crow 2d": ({"crow_indices": ints(0, 2, 3)[None]}, ValueError, "1 dimensions"),
    "crow scalar": ({"crow_indices": torch.tensor(0)}, ValueError, "1 dimensions"),
    "crow float": (
        {"crow_indices": torch.tensor([0.0, 2.0, 3.0])}, TypeError, "int32 or int64",
    ),
    "crow bool": (
        {"crow_indices": torch.tensor([False, True, True])}, TypeError, "int32 or",
    ),
    "col beyond": ({"col_indices": ints(0, 3, 1)}, ValueError, "stay under 3"),
    "col far beyond": (
        {"col_indices": ints(0, 2**31 - 1, 1)}, ValueError, "stay under 3",
    ),
    "col wraps": ({"col_indices": ints(0, 2, 2**32 + 1)}, ValueError, "outside of"),
    "col negative": (
        {"col_indices": torch.tensor([-1, 2, 1], dtype=torch.int32)},
        ValueError, "must increase",
    ),
    "col twice": ({"col_indices": ints(2, 2, 1)}, ValueError, "must increase"),
    "col unsorted": ({"col_indices": ints(2, 0, 1)}, ValueError, "must increase"),
    "col short": ({"col_indices": ints(0, 2)}, ValueError, "they must be equal"),
    "col long": ({"col_indices": ints(0, 2, 1, 2)}, ValueError, "they must be equal"),
    "col 2d": ({"col_indices": ints(0, 2, 1)[:, None]}, ValueError, "1 dimensions"),
    "col float": ({"col_indices": torch.zeros(3)}, TypeError, "int32 or int64"),
    "values 2d": ({"values": torch.ones(3, 4)}, ValueError, r"shape \(nnz, r, c\)"),
    "values 4d": ({"values": torch.ones(3, 2, 2, 1)}, ValueError, r"\(nnz, r, c\)"),
    "values short": ({"values": torch.ones(2, 2, 2)}, ValueError, "must be equal"),
    "values float64": (
        {"values": torch.ones(3, 2, 2).double()}, TypeError, "must be float32",
    ),
    "values do not divide": (
        {"values": torch.ones(3, 2, 4)}, ValueError, "does not divide",
    ),
    "values empty blocks": (
        {"values": torch.ones(3, 0, 2)}, ValueError, "does not divide",
    ),
    "values elsewhere": (
        {"values": torch.ones(3, 2, 2, device="meta")}, ValueError, "one device",
    ),
    "shape zero": ({"shape": (0, 6)}, ValueError, "does not divide"),
    "shape negative": ({"shape": (-4, 6)}, ValueError, "does not divide"),
    "shape too tall": ({"shape": (8, 6)}, ValueError, "one entry more"),
    "shape too narrow": ({"shape": (4, 4)}, ValueError, "stay under 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_fields_that_contradict_each_other_are_refused(case: str) -> None:
    change, error, message = HOSTILE[case]
    with pytest.raises(error, match=message):
        BlockSparseMatrix(**{**GOOD, **change})


def test_fields_that_agree_are_accepted() -> None:
    W = BlockSparseMatrix(**GOOD)
    dense = torch.zeros(4, 6)
    dense[:2, :2] = dense[:2, 4:] = dense[2:, 2:4] = 1
    assert torch.equal(W.to_dense(), dense)


@no_bsr_warning
def test_an_unchecked_bsr_tensor_cannot_reach_the_kernel() -> None:
    bad = torch.sparse_bsr_tensor(
        ints(0, 2, 3), ints(0, 77, 1), torch.ones(3, 2, 2), size=(4, 6),
        check_invariants=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="stay under 3"):
        BlockSparseMatrix.from_bsr(bad)
    with pytest.raises(ValueError, match="stay under 3"):
        ops.block_sparse_linear(torch.randn(2, 6), bad)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda W: pickle.loads(pickle.dumps(W)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    weight = block_sparse_weight((24, 48), (4, 3), 0.4)
    W = BlockSparseMatrix.from_dense(weight, (4, 3))
    W.values.requires_grad_()
    other = COPIES[how](W)
    assert isinstance(other, BlockSparseMatrix)
    assert same_bits(other.to_dense(), weight)
    assert other.values.requires_grad
    assert other.values.transpose(1, 2).is_contiguous()
    assert (other.values is W.values) == (how == "copy")
    x = torch.randn(20, 48)
    with torch.no_grad():
        if how != "copy":
            W.values.zero_()
        del W
        assert_linear(ops.block_sparse_linear(x, other), x, weight)


def test_the_pattern_keeps_its_indices_alive() -> None:
    weight = block_sparse_weight((64, 64), (8, 1), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (8, 1))
    W.crow_indices = W.col_indices = torch.zeros(1, dtype=torch.int32)
    _ = [torch.full((1000,), 10**9, dtype=torch.int32) for _ in range(50)]
    x = torch.randn(20, 64)
    assert_linear(ops.block_sparse_linear(x, W), x, weight)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "block_shape"),
    [
        ((96, 40), (8, 1)), ((1536, 384), (8, 1)), ((512, 768), (1, 96)),
        ((1100, 64), (1, 8)), ((1100, 8), (1, 8)), ((64, 64), (64, 64)),
        ((9, 7), (1, 7)),
    ],
    ids=str,
)  # fmt: skip
def test_the_schedule_covers_every_block_once(
    shape: Any, block_shape: Any, density: float
) -> None:
    weight = block_sparse_weight(shape, block_shape, density)
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    assert W.pattern.nnz == W.nnz
    part_rows, part_tiles, tile_ptr, blocks, rows = W.pattern.schedule()
    grid_rows = shape[0] // block_shape[0]
    assert part_rows[0] == 0
    assert part_rows[-1] == grid_rows
    assert (np.diff(part_rows) > 0).all()
    if block_shape[0] > 1 or block_shape[1] < 8:
        assert len(blocks) == len(rows) == len(tile_ptr) == len(part_tiles) == 0
        return
    assert sorted(blocks.tolist()) == list(range(W.nnz))
    owner = np.repeat(np.arange(grid_rows), np.diff(W.crow_indices.numpy()))
    assert np.array_equal(rows, owner[blocks])
    assert tile_ptr[0] == part_tiles[0] == 0
    assert tile_ptr[-1] == W.nnz
    assert len(part_tiles) == len(part_rows)
    assert part_tiles[-1] == len(tile_ptr) - 1
    heights = np.diff(tile_ptr)
    assert ((heights >= 1) & (heights <= 8)).all()
    col = W.col_indices.numpy()
    for part in range(len(part_rows) - 1):
        for tile in range(part_tiles[part], part_tiles[part + 1]):
            inside = blocks[tile_ptr[tile] : tile_ptr[tile + 1]]
            assert len(set(col[inside].tolist())) == 1
            own = rows[tile_ptr[tile] : tile_ptr[tile + 1]]
            assert part_rows[part] <= own.min()
            assert own.max() < part_rows[part + 1]
            assert len(set(own.tolist())) == len(own)


def int8_matrix(
    shape: tuple[int, int] = (24, 16), block_shape: tuple[int, int] = (8, 2)
) -> BlockSparseMatrix:
    weight = block_sparse_weight(shape, block_shape, 0.5)
    return BlockSparseMatrix.from_dense(weight, block_shape).quantize()


@pytest.mark.parametrize("clip", ["mse", "max", "percentile"])
def test_quantize_rounds_each_row_by_its_scale(clip: Any) -> None:
    weight = block_sparse_weight((24, 16), (8, 2), 0.5)
    weight[3] = 0
    W = BlockSparseMatrix.from_dense(weight, (8, 2))
    Q = W.quantize("int8", clip)
    q, scales = quantize_rows(weight, clip)
    assert Q.dtype == torch.int8
    assert Q.scales is not None
    assert torch.equal(Q.scales, scales)
    assert Q.scales[3] == 0
    assert torch.equal(Q.to_dense(), q.float() * scales[:, None])
    assert torch.equal(Q.crow_indices, W.crow_indices)
    assert torch.equal(Q.col_indices, W.col_indices)
    assert Q.quantize() is Q
    assert W.dequantize() is W


def test_what_was_dequantized_is_quantized_to_the_same_numbers() -> None:
    Q = int8_matrix()
    again = Q.dequantize()
    assert again.dtype == torch.float32
    assert torch.equal(again.to_dense(), Q.to_dense())
    assert torch.equal(again.quantize().values, Q.values)
    assert Q.scales is not None
    exact = again.quantize_with(Q.scales)
    assert torch.equal(exact.values, Q.values)
    assert exact.scales is Q.scales
    assert torch.equal(exact.to_dense(), Q.to_dense())


@no_bsr_warning
def test_int8_to_bsr_is_dequantized() -> None:
    Q = int8_matrix()
    assert torch.equal(Q.to_bsr().to_dense(), Q.to_dense())


def test_int8_bytes_repr_and_copies() -> None:
    W = BlockSparseMatrix.from_dense(torch.eye(8), (4, 4))
    Q = W.quantize()
    assert Q.nbytes == 2 * 16 + 4 * (2 + 3) + 4 * 8
    assert "dtype=int8" in repr(Q)
    assert "dtype=float32" in repr(W)
    x = torch.randn(5, 8)
    for clone in (copy.deepcopy(Q), copy.copy(Q), pickle.loads(pickle.dumps(Q))):
        assert torch.equal(clone.values, Q.values)
        assert torch.equal(clone.scales, Q.scales)
        y = ops.block_sparse_linear(x, clone)
        assert torch.equal(y, ops.block_sparse_linear(x, Q))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scales": None}, TypeError, "int8 values need scales"),
        ({"scales": torch.ones(23)}, ValueError, r"\(out,\) = \(24,\)"),
        ({"scales": torch.ones(24, 1)}, ValueError, r"\(out,\) = \(24,\)"),
        ({"scales": torch.ones(24).double()}, TypeError, "scales must be float32"),
        ({"scales": -torch.ones(24)}, ValueError, "not negative"),
        ({"scales": torch.full((24,), torch.nan)}, ValueError, "finite"),
        ({"scales": torch.full((24,), torch.inf)}, ValueError, "finite"),
        ({"scales": torch.ones(24, device="meta")}, ValueError, "one device"),
        ({"values": torch.zeros(5, 8, 2)}, TypeError, "belong to int8 values"),
    ],
)
def test_wrong_int8_fields_are_named(change: Any, error: Any, message: str) -> None:
    Q = int8_matrix()
    fields = {
        "crow_indices": Q.crow_indices,
        "col_indices": Q.col_indices,
        "values": Q.values,
        "shape": Q.shape,
        "scales": Q.scales,
    }
    with pytest.raises(error, match=message):
        BlockSparseMatrix(**{**fields, **change})


def test_quantize_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="'int8' or 'bfloat16'; got 'int4'"):
        BlockSparseMatrix.from_dense(torch.eye(4), (2, 2)).quantize("int4")


def test_a_weight_that_bfloat16_cannot_hold():
    weight = torch.ones(8, 8)
    weight[3, 3] = torch.finfo(torch.float32).max
    matrix = BlockSparseMatrix.from_dense(weight, (8, 1))
    with pytest.raises(ValueError, match=r"at most 3\.3895e38 .* got 3\.4028e\+38"):
        matrix.quantize("bfloat16")
