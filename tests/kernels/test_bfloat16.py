"""Products with bfloat16 weights have the bits of those with the same in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    EPS,
    GRIDS,
    assert_within,
    block_sparse_weight,
    same_bits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pybsp
from pybsp import BlockSparseMatrix, ops, reference
from pybsp.blocks import grid_shape

ALL_GRIDS = [*GRIDS, ((17, 99), (1, 33))]


def both(
    shape: tuple[int, int], block_shape: tuple[int, int], density: float, seed: int = 0
) -> tuple[BlockSparseMatrix, BlockSparseMatrix]:
    """A bfloat16 matrix, and in float32 the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid_shape(shape, block_shape), generator=generator) < density
    weight = torch.randn(shape, generator=generator)
    W = BlockSparseMatrix.from_mask(weight, mask, block_shape).quantize("bfloat16")
    return W, W.dequantize()


@pytest.mark.parametrize(
    ("shape", "block_shape"), ALL_GRIDS, ids=lambda pair: "x".join(map(str, pair))
)
def test_equals_the_float32_product(isa: str, shape: Any, block_shape: Any) -> None:
    out_features, in_features = shape
    bias = torch.randn(out_features)
    for density in (0.0, 0.05, 0.4, 1.0):
        W, wide = both(shape, block_shape, density)
        assert W.values.dtype == torch.bfloat16
        assert wide.values.dtype == torch.float32
        for tokens in (0, 1, 2, 3, 4, 5, 8, 16, 17, 33, 49, 100):
            x = torch.randn(tokens, in_features)
            residual = torch.randn(tokens, out_features)
            for rest in ((), (bias, "relu"), (bias, "gelu", residual)):
                found = ops.block_sparse_linear(x, W, *rest)
                expected = ops.block_sparse_linear(x, wide, *rest)
                what = f"{isa} density {density} tokens {tokens}"
                assert same_bits(found, expected), what
            found = torch.from_numpy(ops.block_sparse_linear(x.numpy(), W))
            assert same_bits(found, ops.block_sparse_linear(x, W))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block_shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0, 1),
    tokens=st.integers(0, 130),
    activation=st.sampled_from(ACTIVATIONS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_fuzzed(
    isa: str,
    grid: tuple[int, int],
    block_shape: tuple[int, int],
    density: float,
    tokens: int,
    activation: str | None,
    threads: int,
    seed: int,
) -> None:
    shape = (grid[0] * block_shape[0], grid[1] * block_shape[1])
    W, wide = both(shape, block_shape, density, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ops.block_sparse_linear(x, W, bias, activation)
        expected = ops.block_sparse_linear(x, wide, bias, activation)
    finally:
        torch.set_num_threads(before)
    assert same_bits(found, expected), isa


def test_agrees_with_the_reference(isa: str) -> None:
    W, _ = both((64, 48), (8, 1), 0.4)
    x, bias = torch.randn(37, 48), torch.randn(64)
    fields = (W.crow_indices, W.col_indices, W.values)
    found = reference.block_sparse_linear(x, *fields, W.shape, bias)
    dense = W.to_dense().double()
    exact = x.double() @ dense.T + bias.double()
    bound = (48 + 2) * EPS * (x.double().abs() @ dense.abs().T + bias.double().abs())
    assert_within(found, exact, bound, "reference")
    assert_within(ops.block_sparse_linear(x, W, bias), exact, bound, isa)


def test_several_products_and_tiles(isa: str) -> None:
    pairs = [both((40, 48), block, 0.4) for block in ((8, 1), (4, 4), (1, 12), (1, 48))]
    int8 = pairs[0][1].quantize()
    biases = [torch.randn(40), None, torch.randn(40), None]
    for tokens in (1, 3, 16, 21, 100):
        x = torch.randn(tokens, 48)
        found = ops.block_sparse_linears(x, [W for W, _ in pairs], biases)
        expected = ops.block_sparse_linears(x, [wide for _, wide in pairs], biases)
        mixed = ops.block_sparse_linears(x, [W for p in pairs for W in p] + [int8])
        for i, (W, wide) in enumerate(pairs):
            assert same_bits(found[i], expected[i]), (isa, tokens, i)
            assert same_bits(mixed[2 * i], mixed[2 * i + 1]), (isa, tokens, i)
            tiles = ops.pack_tokens(x)
            y = ops.block_sparse_linear_tiles(tiles, W, biases[i], "relu")
            twin = ops.block_sparse_linear_tiles(tiles, wide, biases[i], "relu")
            assert same_bits(ops.unpack_tokens(y), ops.unpack_tokens(twin))
        assert same_bits(mixed[-1], ops.block_sparse_linear(x, int8))


def test_rounds_to_nearest_even_and_keeps_what_is_special() -> None:
    up = 1.0 + 2.0**-8
    weights = torch.tensor([
        [1.0, up, 1.0 + 3 * 2.0**-8, up + 2.0**-20],
        [float("nan"), float("inf"), -0.0, 2.0**-130],
    ])  # fmt: skip
    mask = torch.ones(2, 4, dtype=torch.bool)
    W = BlockSparseMatrix.from_mask(weights, mask, (1, 1)).quantize("bfloat16")
    dense = W.to_dense()
    assert dense[0].tolist() == [1.0, 1.0, 1.0 + 2.0**-6, 1.0 + 2.0**-7]
    assert dense[1, 0].isnan()
    assert same_bits(dense[1, 1:], weights[1, 1:])
    assert W.quantize("bfloat16") is W
    assert same_bits(W.dequantize().quantize("bfloat16").to_dense(), dense)


def test_special_values_reach_the_result(isa: str) -> None:
    W, wide = both((32, 24), (8, 1), 1.0)
    for index, special in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        W.values[3 * index], wide.values[3 * index] = special, special
    for tokens in (1, 4, 20, 100):
        x = torch.rand(tokens, 24) + 0.5
        found, expected = (ops.block_sparse_linear(x, m) for m in (W, wide))
        assert torch.equal(found.isnan(), expected.isnan())
        assert same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0)), isa


def test_half_the_bytes() -> None:
    W, wide = both((96, 96), (8, 1), 0.5)
    assert wide.nbytes - W.nbytes == 2 * W.values.numel()
    assert W.dtype == torch.bfloat16
    assert "dtype=bfloat16" in repr(W)
    assert W.quantize("int8").dtype == torch.int8
    rounded = W.quantize("int8").quantize("bfloat16").to_dense()
    assert torch.equal(rounded, W.quantize("int8").to_dense().bfloat16().float())


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_reach_what_is_around_it(activation: str | None) -> None:
    W, wide = both((24, 18), (8, 1), 0.5)
    tensors = torch.randn(7, 18), torch.randn(24), torch.randn(7, 24)
    grads = []
    for matrix in (W, wide):
        x, bias, residual = (t.clone().requires_grad_() for t in tensors)
        ops.block_sparse_linear(
            x, matrix, bias, activation, residual
        ).square().sum().backward()
        grads.append((x.grad, bias.grad, residual.grad))
    for found, expected in zip(*grads, strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected)


def test_second_derivatives() -> None:
    W, wide = both((8, 6), (4, 1), 0.7)
    found = []
    for matrix in (W, wide):
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        y = ops.block_sparse_linear(x, matrix).square().sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_compile_and_export_see_one_operator() -> None:
    W, _ = both((24, 18), (8, 1), 0.5)
    layer = pybsp.nn.BlockSparseLinear(W, torch.randn(24), "relu")
    x = torch.randn(5, 18)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(x), expected)
        program = torch.export.export(layer, (x,))
        assert same_bits(program.module()(x), expected)
        fields = (W.values, W.crow_indices, W.col_indices)
        inputs = (x, *fields, layer.bias, "none", 24)
        torch.library.opcheck(torch.ops.pybsp.block_sparse_linear.default, inputs)


def test_values_that_require_grad_are_refused() -> None:
    W, _ = both((24, 18), (8, 1), 0.5)
    values = W.values.clone().requires_grad_()
    with pytest.raises(TypeError, match="bfloat16 values are not trained") as caught:
        BlockSparseMatrix(W.crow_indices, W.col_indices, values, W.shape)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="gradients need float32 values"):
        W.pattern.grad_x(W.values.data_ptr(), 0, 0, 0, 1)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match="must be float32 or bfloat16"):
            BlockSparseMatrix(
                W.crow_indices, W.col_indices, W.values.to(dtype), W.shape
            )


def test_scales_are_for_int8() -> None:
    W, _ = both((24, 18), (8, 1), 0.5)
    with pytest.raises(TypeError, match="scales belong to int8 values"):
        BlockSparseMatrix(
            W.crow_indices, W.col_indices, W.values, W.shape, torch.ones(24)
        )


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")
def test_bsr_tensors() -> None:
    dense = block_sparse_weight((24, 18), (8, 1), 0.5).bfloat16()
    W = BlockSparseMatrix.from_bsr(dense.to_sparse_bsr((8, 1)))
    assert W.dtype == torch.bfloat16
    assert torch.equal(W.to_dense(), dense.float())
    assert torch.equal(W.to_bsr().to_dense(), dense.float())
    x = torch.randn(3, 18)
    expected = ops.block_sparse_linear(x, W.dequantize())
    assert same_bits(ops.block_sparse_linear(x, W), expected)
