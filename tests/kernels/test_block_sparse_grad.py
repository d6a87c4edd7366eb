"""The gradients against float64, for every instruction set, shape and size."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers import EPS, GRIDS, assert_within, block_sparse_weight, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybsp import BlockSparseMatrix, ops, reference
from pybsp.ops.gradients import gradients

# (shape, block shape): runs and gathered columns, rows and flat blocks, extents of
# fewer and more than a tile of either, more features than one part, single blocks.
ALL_GRIDS = [
    *GRIDS,
    ((34, 30), (2, 2)),
    ((18, 24), (2, 3)),
    ((21, 40), (3, 10)),
    ((41, 96), (1, 48)),
    ((1, 70), (1, 7)),
    ((70, 1), (7, 1)),
    ((30, 1200), (3, 1)),
    ((32, 1200), (1, 16)),
    ((26, 1200), (13, 4)),
]


def differentiate(
    W: BlockSparseMatrix, dy: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dx`` and ``dW`` from the native calls."""
    dx, dvalues, _ = differentiate_all(W, dy, x)
    return dx, dvalues


def differentiate_all(
    W: BlockSparseMatrix, dy: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dx``, ``dW`` and ``dbias``."""
    dx, dvalues, dbias = gradients(
        dy, x, W.values, W.crow_indices, W.col_indices, W.shape,
        (True, True, True), W.pattern,
    )  # fmt: skip
    assert dx is not None
    assert dvalues is not None
    assert dbias is not None
    return dx, dvalues, dbias


def assert_gradients(
    W: BlockSparseMatrix, dy: torch.Tensor, x: torch.Tensor, what: str = ""
) -> None:
    dx, dvalues, dbias = differentiate_all(W, dy, x)
    assert dx.dtype == dvalues.dtype == dbias.dtype == torch.float32
    assert dvalues.transpose(1, 2).is_contiguous()
    weight = W.to_dense()
    exact = reference.block_sparse_grad_x(
        dy.double(), W.crow_indices, W.col_indices, W.values.double(), W.shape
    )
    kept = (weight != 0).sum(0).double()
    bound = EPS * (4 + 2 * kept.sqrt()) * (dy.abs().double() @ weight.abs().double())
    assert_within(dx, exact, bound + 1e-44, f"{what} dx")
    indices = (W.crow_indices, W.col_indices, W.block_shape)
    exact = reference.block_sparse_grad_values(dy.double(), x.double(), *indices)
    total = reference.block_sparse_grad_values(
        dy.abs().double(), x.abs().double(), *indices
    )
    bound = EPS * (4 + 2 * dy.shape[0] ** 0.5) * total
    assert_within(dvalues, exact, bound + 1e-44, f"{what} dW")
    bound = EPS * (4 + 2 * dy.shape[0] ** 0.5) * dy.abs().double().sum(0)
    assert_within(dbias, dy.double().sum(0), bound + 1e-44, f"{what} dbias")


@pytest.mark.parametrize(
    ("shape", "block_shape"), ALL_GRIDS, ids=lambda pair: "x".join(map(str, pair))
)
def test_matches_float64(isa: str, shape: Any, block_shape: Any) -> None:
    for density in (0.0, 0.05, 0.4, 1.0):
        weight = block_sparse_weight(shape, block_shape, density)
        W = BlockSparseMatrix.from_dense(weight, block_shape)
        for tokens in (1, 5, 17, 50, 130):
            x, dy = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
            what = f"{isa} density {density} tokens {tokens}"
            assert_gradients(W, dy, x, what)


@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (1, 8), (2, 5)], ids=str)
def test_every_number_of_tokens(isa: str, block_shape: Any) -> None:
    weight = block_sparse_weight((48, 40), block_shape, 0.5)
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    # Up to four tiles, and around one and two panels.
    for tokens in [*range(1, 150), 383, 384, 385, 769]:
        x, dy = torch.randn(tokens, 40), torch.randn(tokens, 48)
        assert_gradients(W, dy, x, f"{isa} tokens {tokens}")


@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (1, 8)], ids=str)
def test_large_layers_take_several_groups_and_chunks(
    isa: str, block_shape: Any
) -> None:
    # 384 KB of dy, and 640 KB of either input of dW, at a time.
    for shape in ((2560, 32), (32, 2560), (768, 800)):
        W = BlockSparseMatrix.from_dense(
            block_sparse_weight(shape, block_shape, 0.1), block_shape
        )
        x, dy = torch.randn(800, shape[1]), torch.randn(800, shape[0])
        assert_gradients(W, dy, x, isa)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_shapes(isa: str, data: st.DataObject) -> None:
    r, c = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    shape = (r * data.draw(st.integers(1, 12)), c * data.draw(st.integers(1, 12)))
    density = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    tokens = data.draw(st.integers(1, 200))
    W = BlockSparseMatrix.from_dense(
        block_sparse_weight(shape, (r, c), density), (r, c)
    )
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape[1], generator=generator)
    dy = torch.randn(tokens, shape[0], generator=generator)
    assert_gradients(W, dy, x, f"{isa} {shape} {(r, c)} tokens {tokens}")


@pytest.mark.parametrize("tokens", [1, 45, 900])
@pytest.mark.parametrize("block_shape", [(8, 1), (1, 16), (16, 4)], ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (128, 640), (640, 128)], ids=str)
@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_threads(
    isa: str, tokens: int, block_shape: Any, shape: tuple[int, int]
) -> None:
    weight = block_sparse_weight(shape, block_shape, 0.5)
    weight[: shape[0] // 2, 64:] = 0  # unbalanced both ways
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    x, dy = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        results.append(differentiate_all(W, dy, x))
    for result in results[1:]:
        for gradient, first in zip(result, results[0], strict=True):
            assert same_bits(gradient, first), isa
    assert_gradients(W, dy, x, isa)


def test_a_tokens_gradient_does_not_depend_on_its_company(isa: str) -> None:
    for block_shape in ((8, 1), (16, 4), (1, 16)):
        weight = block_sparse_weight((64, 64), block_shape, 0.5)
        W = BlockSparseMatrix.from_dense(weight, block_shape)
        x, dy = torch.randn(130, 64), torch.randn(130, 64)
        whole, _ = differentiate(W, dy, x)
        for part in (slice(0, 1), slice(20, 61), slice(129, 130)):
            dx, _ = differentiate(W, dy[part], x[part])
            assert same_bits(dx, whole[part]), (isa, block_shape)


@pytest.mark.parametrize("special", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 53])
def test_nan_and_inf_reach_only_what_they_multiply(
    isa: str, special: float, tokens: int
) -> None:
    for block_shape in ((8, 1), (1, 8), (4, 4)):
        weight = block_sparse_weight((32, 32), block_shape, 0.7)
        W = BlockSparseMatrix.from_dense(weight, block_shape)
        x, dy = torch.randn(tokens, 32), torch.randn(tokens, 32)
        clean_x, clean_values = differentiate(W, dy, x)
        dy[-1, 29] = special
        dx, dvalues = differentiate(W, dy, x)
        reached = torch.zeros(tokens, 32, dtype=torch.bool)
        reached[-1] = weight[29] != 0
        assert not dx[reached].isfinite().any(), (isa, block_shape)
        assert same_bits(dx[~reached], clean_x[~reached])
        rows = torch.zeros(32, 32)
        rows[29] = 1
        in_row = reference.gather_blocks(
            rows, W.crow_indices, W.col_indices, block_shape
        ).bool()
        assert in_row.any()
        assert not dvalues[in_row].isfinite().any(), (isa, block_shape)
        assert same_bits(dvalues[~in_row], clean_values[~in_row])


def test_no_tokens_and_no_blocks(isa: str) -> None:
    W = BlockSparseMatrix.from_dense(block_sparse_weight((16, 8), (8, 1), 0.5), (8, 1))
    dx, dvalues = differentiate(W, torch.empty(0, 16), torch.empty(0, 8))
    assert dx.shape == (0, 8)
    assert dvalues.shape == W.values.shape
    assert not dvalues.any(), isa
    _, _, dbias = differentiate_all(W, torch.empty(0, 16), torch.empty(0, 8))
    assert torch.equal(dbias, torch.zeros(16))
    for block_shape in ((8, 1), (4, 4), (1, 8)):
        W = BlockSparseMatrix.from_dense(torch.zeros(16, 8), block_shape)
        dy = torch.full((5, 16), torch.nan)
        dy[:, 3:] = 1.0
        dx, dvalues, dbias = differentiate_all(W, dy, torch.randn(5, 8))
        assert dvalues.shape == (0, *block_shape)
        assert torch.equal(dx, torch.zeros(5, 8))
        assert dbias[:3].isnan().all()
        assert torch.equal(dbias[3:], torch.full((13,), 5.0))


def test_python_threads_may_ask_for_the_first_gradient_at_once(isa: str) -> None:
    weight = block_sparse_weight((256, 256), (8, 1), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (8, 1))
    x, dy = torch.randn(60, 256), torch.randn(60, 256)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    workers = [
        threading.Thread(target=lambda: results.append(differentiate(W, dy, x)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(same_bits(dx, results[0][0]) for dx, _ in results), isa
    assert_gradients(W, dy, x, isa)


def test_gradients_through_any_layout_of_the_incoming_one(isa: str) -> None:
    W = BlockSparseMatrix.from_dense(block_sparse_weight((24, 18), (4, 3), 0.5), (4, 3))
    W.values.requires_grad_()
    for seed in (
        torch.randn(24, 6).t(),
        torch.ones(()).expand(6, 24),
        torch.randn(6, 48)[:, ::2],
        torch._neg_view(torch.randn(6, 24)),
    ):
        x = torch.randn(6, 18, requires_grad=True)
        y = ops.block_sparse_linear(x, W)
        dx, dvalues = torch.autograd.grad(y, (x, W.values), seed)
        plain = differentiate(W, seed.clone().contiguous(), x.detach())
        assert same_bits(dx, plain[0]), isa
        assert same_bits(dvalues, plain[1]), isa
