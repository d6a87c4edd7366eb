"""Activations in tiles, several products of one input, and the added residual."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_linear, block_sparse_weight, same_bits

from pybsp import BlockSparseMatrix, ops

BLOCKS = [(8, 1), (16, 4), (1, 12), (4, 1), (5, 3), (1, 1), (32, 32)]
TOKENS = [0, 1, 3, 4, 5, 16, 17, 40, 48, 49, 53, 100, 131]


def matrix(block_shape: Any, grid: Any = (3, 4), seed: int = 0) -> Any:
    shape = (block_shape[0] * grid[0], block_shape[1] * grid[1])
    weight = block_sparse_weight(shape, block_shape, 0.5, seed)
    return weight, BlockSparseMatrix.from_dense(weight, block_shape)


@pytest.mark.parametrize("features", [1, 3, 7, 8, 16, 17, 31, 32, 45])
def test_packing_and_back_keeps_every_bit(isa: str, features: int) -> None:
    for tokens in TOKENS:
        x = torch.randn(tokens, features)
        tiles = ops.pack_tokens(x)
        assert tiles.isa == isa
        assert (tiles.tokens, tiles.features) == (tokens, features)
        assert same_bits(ops.unpack_tokens(tiles), x), tokens
    x = torch.randn(2, 3, 5, 7).transpose(0, 2)
    assert same_bits(ops.unpack_tokens(ops.pack_tokens(x)), x)


def test_a_tile_holds_tokens_in_lanes(isa: str) -> None:
    lanes, vectors = ops.token_tile()
    width = lanes * vectors
    x = torch.arange(width * 6.0).view(width, 6)
    data = ops.pack_tokens(x).data
    assert same_bits(data.view(6, width), x.t().contiguous()), isa


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_products_on_tiles(isa: str, block_shape: Any) -> None:
    weight, W = matrix(block_shape)
    bias = torch.randn(W.shape[0])
    for tokens in TOKENS:
        x, residual = torch.randn(tokens, W.shape[1]), torch.randn(tokens, W.shape[0])
        tiles = ops.block_sparse_linear_tiles(
            ops.pack_tokens(x), W, bias, "silu", ops.pack_tokens(residual)
        )
        y = ops.unpack_tokens(tiles)
        exact = ops.block_sparse_linear(x, W, bias, "silu", residual)
        if block_shape[0] > 1 or block_shape[1] < 8:
            assert same_bits(y, exact), (isa, tokens)
        plain = ops.unpack_tokens(ops.block_sparse_linear_tiles(ops.pack_tokens(x), W))
        assert_linear(plain, x, weight, what=f"{isa} tokens {tokens}")
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def test_the_memory_of_the_result_is_reused(isa: str) -> None:
    weight, W = matrix((8, 1))
    x = torch.randn(50, W.shape[1])
    tiles = ops.pack_tokens(x)
    out = ops.pack_tokens(torch.full((50, W.shape[0]), torch.nan))
    result = ops.block_sparse_linear_tiles(tiles, W, out=out)
    assert result is out
    assert_linear(ops.unpack_tokens(out), x, weight, what=isa)


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_the_residual_may_be_the_memory_of_the_result(
    isa: str, block_shape: Any
) -> None:
    _, W = matrix(block_shape)
    for tokens in TOKENS:
        tiles = ops.pack_tokens(torch.randn(tokens, W.shape[1]))
        stream = ops.pack_tokens(torch.randn(tokens, W.shape[0]))
        apart = ops.block_sparse_linear_tiles(tiles, W, None, "relu", stream)
        result = ops.block_sparse_linear_tiles(tiles, W, None, "relu", stream, stream)
        assert result is stream
        expected = ops.unpack_tokens(apart)
        assert same_bits(ops.unpack_tokens(stream), expected), (isa, tokens)


def test_no_tokens_in_reused_memory() -> None:
    W = BlockSparseMatrix.from_dense(torch.eye(4), (1, 1))
    empty, out = (ops.pack_tokens(torch.empty(0, 4)) for _ in range(2))
    assert ops.block_sparse_linear_tiles(empty, W, out=out) is out


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.usefixtures("threads")
def test_several_products_share_the_input(isa: str, block_shape: Any) -> None:
    matrices = [matrix(block_shape, (3 + i, 4), seed=i)[1] for i in range(3)]
    biases = [
        torch.randn(matrices[0].shape[0]),
        None,
        torch.randn(matrices[2].shape[0]),
    ]
    activations = [None, "gelu", "relu"]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for tokens in (0, 1, 6, 51, 120):
            x = torch.randn(tokens, matrices[0].shape[1])
            residuals = [None, torch.randn(tokens, matrices[1].shape[0]), None]
            results = ops.block_sparse_linears(
                x, matrices, biases, activations, residuals
            )
            for y, *call in zip(
                results, matrices, biases, activations, residuals, strict=True
            ):
                assert same_bits(y, ops.block_sparse_linear(x, *call)), (isa, tokens)


def test_several_products_of_a_large_input_on_threads(isa: str, threads: Any) -> None:  # noqa: ARG001
    matrices = [
        BlockSparseMatrix.from_dense(
            block_sparse_weight((256, 512), block, density, seed=1), block
        )
        for block, density in (((8, 1), 0.4), ((1, 64), 0.3), ((16, 4), 0.0))
    ]
    x = torch.randn(150, 512)
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        results.append(torch.cat(ops.block_sparse_linears(x, matrices), 1))
    assert all(same_bits(results[0], y) for y in results[1:]), isa
    assert not results[0][:, 512:].any()


def test_several_products_with_gradients_are_the_single_ones() -> None:
    matrices = [matrix((4, 4), seed=i)[1] for i in range(2)]
    x = torch.randn(9, matrices[0].shape[1], requires_grad=True)
    y = sum(t.sum() for t in ops.block_sparse_linears(x, matrices))
    y.backward()
    expected = sum(W.to_dense().sum(0) for W in matrices)
    torch.testing.assert_close(x.grad, expected.expand(9, -1), rtol=1e-5, atol=1e-5)
    assert ops.block_sparse_linears(x, []) == []


@pytest.mark.parametrize("tokens", [1, 4, 30, 52])
def test_a_residual_is_added_last(isa: str, tokens: int) -> None:
    for block_shape in BLOCKS:
        _, W = matrix(block_shape)
        x, bias = torch.randn(tokens, W.shape[1]), torch.randn(W.shape[0])
        residual = torch.randn(tokens, 2 * W.shape[0])[:, ::2]
        for activation in (None, "gelu"):
            y = ops.block_sparse_linear(x, W, bias, activation, residual)
            plain = ops.block_sparse_linear(x, W, bias, activation)
            assert same_bits(y, plain + residual), (isa, block_shape, activation)
        as_numpy = ops.block_sparse_linear(
            x.numpy(), W, bias.numpy(), None, residual.numpy()
        )
        assert isinstance(as_numpy, np.ndarray)
        assert same_bits(
            torch.from_numpy(as_numpy),
            ops.block_sparse_linear(x, W, bias) + residual,
        )


class Named(torch.Tensor):
    """A class of its own."""


VIEWS: dict[str, Any] = {
    "reversed": lambda t: t.flip(0),
    "negative": torch._neg_view,
    "broadcast": lambda t: t[..., :1].expand(t.shape),
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "parameter": lambda t: torch.nn.Parameter(t),
    "subclass": lambda t: t.as_subclass(Named),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tokens", [1, 50])
def test_what_is_added_is_read_as_what_it_shows(view: str, tokens: int) -> None:
    _, W = matrix((8, 1))
    x = torch.randn(tokens, W.shape[1])
    bias = VIEWS[view](torch.randn(W.shape[0]))
    residual = VIEWS[view](torch.randn(tokens, W.shape[0]))
    plain_bias = (bias * 1.0).detach().as_subclass(torch.Tensor)
    plain_residual = (residual * 1.0).detach().as_subclass(torch.Tensor)
    with torch.no_grad():
        expected = ops.block_sparse_linear(x, W, plain_bias, None, plain_residual)
        results = [
            ops.block_sparse_linear(x, W, bias, None, residual),
            ops.block_sparse_linears(x, [W], [bias], None, [residual])[0],
        ]
        if view != "subclass":  # which torch does not compile
            compiled = torch.compile(ops.block_sparse_linear, backend="aot_eager")
            results.append(compiled(x, W, bias, None, residual))
        for y in results:
            assert same_bits(y.as_subclass(torch.Tensor), expected)
        if view == "negative":
            assert same_bits(
                ops.unpack_tokens(ops.pack_tokens(residual)), plain_residual
            )
            negative = BlockSparseMatrix(
                W.crow_indices, W.col_indices, torch._neg_view(W.values), W.shape
            )
            assert torch.equal(
                ops.block_sparse_linear(x, negative), -ops.block_sparse_linear(x, W)
            )


def test_autocast_casts_what_is_added() -> None:
    _, W = matrix((8, 1))
    x, bias = torch.randn(5, W.shape[1]), torch.randn(W.shape[0])
    arguments = [t.bfloat16() for t in (x, bias, torch.randn(5, W.shape[0]))]
    x, bias, residual = (t.float() for t in arguments)
    expected = ops.block_sparse_linear(x, W, bias, "relu", residual)
    with torch.autocast("cpu", torch.bfloat16):
        for low in (x, arguments[0]):
            y = ops.block_sparse_linear(low, W, arguments[1], "relu", arguments[2])
            assert same_bits(y, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
def test_tangents_are_refused_or_kept() -> None:
    _, W = matrix((8, 1))
    x, bias, residual = (
        torch.randn(5, W.shape[1]), torch.randn(W.shape[0]), torch.randn(5, W.shape[0])
    )  # fmt: skip
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        tangent = torch.randn_like(residual)
        y = ops.block_sparse_linear(x, W, bias, None, dual(residual, tangent))
        assert same_bits(torch.autograd.forward_ad.unpack_dual(y).tangent, tangent)
        x_dual, bias_dual = (dual(t, torch.ones_like(t)) for t in (x, bias))
        for call in (
            lambda: ops.block_sparse_linear(x_dual, W),
            lambda: ops.block_sparse_linears(x_dual, [W]),
            lambda: ops.block_sparse_linear(x, W, bias_dual),
            lambda: ops.block_sparse_linears(x, [W], [bias_dual]),
            lambda: ops.pack_tokens(x_dual),
        ):
            with pytest.raises(ValueError, match="carries a tangent"):
                call()


def test_a_residual_is_compiled_and_exported() -> None:
    _, W = matrix((8, 1))

    class Layer(torch.nn.Module):
        def forward(self, x: Any, residual: Any) -> Any:
            return ops.block_sparse_linear(x, W, None, "gelu", residual)

    x, residual = torch.randn(5, W.shape[1]), torch.randn(5, W.shape[0])
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x, residual), Layer()(x, residual))
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(
        Layer(), (x, residual), dynamic_shapes=({0: tokens}, {0: tokens})
    ).module()
    x, residual = torch.randn(9, W.shape[1]), torch.randn(9, W.shape[0])
    assert same_bits(exported(x, residual), Layer()(x, residual))


def test_gradients_reach_the_residual() -> None:
    _, W = matrix((8, 1))
    x, residual = torch.randn(5, W.shape[1]), torch.randn(5, W.shape[0])
    residual.requires_grad_()
    y = ops.block_sparse_linear(x, W, activation="gelu", residual=residual)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


def test_a_token_has_the_same_bits_in_any_batch(isa: str) -> None:
    for block_shape in ((8, 1), (16, 4), (4, 1), (5, 3), (32, 32)):
        _, W = matrix(block_shape, (5, 9))
        x, bias = torch.randn(60, W.shape[1]), torch.randn(W.shape[0])
        whole = ops.block_sparse_linear(x, W, bias, "gelu")
        for count in (1, 2, 3, 4, 5, 17, 33, 49):
            part = ops.block_sparse_linear(x[:count], W, bias, "gelu")
            assert same_bits(part, whole[:count]), (isa, block_shape, count)


WRONG: dict[str, Any] = {
    "x gradient": (
        lambda W, x, t: ops.pack_tokens(x.requires_grad_()),  # noqa: ARG005
        ValueError, "carry no gradient",
    ),
    "x float64": (
        lambda W, x, t: ops.pack_tokens(x.double()), TypeError, "float32",  # noqa: ARG005
    ),
    "x list": (lambda W, x, t: ops.pack_tokens([1.0]), TypeError, "torch tensor"),  # noqa: ARG005
    "x scalar": (lambda W, x, t: ops.pack_tokens(x[0, 0]), TypeError, "features"),  # noqa: ARG005
    "features": (
        lambda W, x, t: ops.block_sparse_linear_tiles(  # noqa: ARG005
            ops.pack_tokens(x[:, 1:].contiguous()), W
        ),
        ValueError, "must hold in = 4",
    ),
    "activation": (
        lambda W, x, t: ops.block_sparse_linear_tiles(t, W, activation="tanh"),  # noqa: ARG005
        ValueError, "activation must be",
    ),
    "bias": (
        lambda W, x, t: ops.block_sparse_linear_tiles(t, W, torch.zeros(3)),  # noqa: ARG005
        ValueError, r"must be \(out,\)",
    ),
    "residual shape": (
        lambda W, x, t: ops.block_sparse_linear_tiles(t, W, residual=t),  # noqa: ARG005
        ValueError, "residual holds",
    ),
    "out is the input": (
        lambda W, x, t: ops.block_sparse_linear_tiles(  # noqa: ARG005
            t, BlockSparseMatrix.from_dense(torch.eye(4), (1, 1)), out=t
        ),
        ValueError, "out is the input",
    ),
    "row-major residual shape": (
        lambda W, x, t: ops.block_sparse_linear(x, W, residual=x),  # noqa: ARG005
        ValueError, "residual has shape",
    ),
    "row-major residual dtype": (
        lambda W, x, t: ops.block_sparse_linear(  # noqa: ARG005
            x, W, residual=torch.zeros(5, 24).double()
        ),
        TypeError, "residual must be float32",
    ),
    "row-major residual kind": (
        lambda W, x, t: ops.block_sparse_linear(x, W, residual=[0.0]),  # noqa: ARG005
        TypeError, "residual must be",
    ),
    "numpy residual kind": (
        lambda W, x, t: ops.block_sparse_linear(  # noqa: ARG005
            x.numpy(), W, residual=torch.zeros(5, 24)
        ),
        TypeError, "residual must be of the kind of x, a numpy array",
    ),
    "biases count": (
        lambda W, x, t: ops.block_sparse_linears(x, [W, W], biases=[None]),  # noqa: ARG005
        ValueError, "1 entries for 2 matrices",
    ),
    "W is not packed": (
        lambda W, x, t: ops.block_sparse_linear_tiles(t, torch.eye(4)),  # noqa: ARG005
        TypeError, "must be a pybsp.BlockSparseMatrix",
    ),
    "W without memory": (
        lambda W, x, t: ops.block_sparse_linear_tiles(  # noqa: ARG005
            t, SimpleNamespace(pattern=W.pattern, values=W.values.to("meta"))
        ),
        TypeError, "on the CPU; got SimpleNamespace on meta",
    ),
    "not tiles": (
        lambda W, x, t: ops.block_sparse_linear_tiles(x, W),  # noqa: ARG005
        TypeError, "must be TokenTiles; got Tensor",
    ),
    "tiles of another size": (
        lambda W, x, t: ops.unpack_tokens(replace(t, shape=(500, 4))),  # noqa: ARG005
        ValueError, "contiguous floats",
    ),
    "linears features": (
        lambda W, x, t: ops.block_sparse_linears(x[:, 1:], [W]),  # noqa: ARG005
        ValueError, "last dimension",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    function, error, message = WRONG[case]
    _, W = matrix((8, 1))
    x = torch.randn(5, 4)
    with pytest.raises(error, match=message):
        function(W, x, ops.pack_tokens(x))


def test_tiles_of_another_instruction_set_are_refused(isa: str) -> None:
    others = [name for name in ops.available_isas() if name != isa]
    tiles = ops.pack_tokens(torch.randn(3, 4))
    if others:
        ops.set_active_isa(others[0])
        with pytest.raises(ValueError, match="laid out for"):
            ops.unpack_tokens(tiles)
