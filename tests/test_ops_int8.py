"""The int8 product in torch: autograd, compile, export, wrong use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import EPS, block_sparse_weight, same_bits

import pybsp
from pybsp import BlockSparseMatrix, ops, reference


def matrix(block_shape: Any = (8, 1)) -> BlockSparseMatrix:
    weight = block_sparse_weight((24, 18), block_shape, 0.5)
    return BlockSparseMatrix.from_dense(weight, block_shape).quantize()


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("input_scale", [0.0, 0.02])
def test_gradients_go_through_the_dequantized_weight(
    activation: str | None, input_scale: float
) -> None:
    W = matrix()
    x, bias = torch.randn(7, 18), torch.randn(24)
    residual, factor = torch.randn(7, 24), torch.randn(7, 24)
    given = [t.clone().requires_grad_() for t in (x, bias, residual)]
    y = ops.block_sparse_linear(
        given[0], W, given[1], activation, given[2], input_scale=input_scale
    )
    with torch.no_grad():
        plain = ops.block_sparse_linear(x, W, bias, input_scale=input_scale)
        fused = ops.block_sparse_linear(
            x, W, bias, activation, residual, input_scale=input_scale
        )
    torch.testing.assert_close(y.detach(), fused)
    (y * factor).sum().backward()
    before = plain.double().requires_grad_()
    (reference.ACTIVATIONS[activation](before) * factor).sum().backward()
    grad = before.grad
    assert grad is not None
    exact = grad @ W.to_dense().double(), grad.sum(0), factor.double()
    for tensor, wanted in zip(given, exact, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(
            tensor.grad.double(), wanted, rtol=64 * EPS, atol=256 * EPS
        )


def test_a_call_without_gradients_records_nothing() -> None:
    W = matrix()
    assert not ops.block_sparse_linear(torch.randn(3, 18), W).requires_grad
    x = torch.randn(3, 18, requires_grad=True)
    with torch.no_grad():
        assert not ops.block_sparse_linear(x, W).requires_grad
    with torch.inference_mode():
        ops.block_sparse_linear(x, W)


class Product(torch.nn.Module):
    def __init__(self, W: BlockSparseMatrix, input_scale: float) -> None:
        super().__init__()
        for name in ("values", "scales", "crow_indices", "col_indices"):
            self.register_buffer(name, getattr(W, name))
        self.shape, self.input_scale = W.shape, input_scale

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.block_sparse_linear_fields(
            x, self.values, self.crow_indices, self.col_indices, self.shape, bias,
            "relu", self.scales, self.input_scale,
        )  # fmt: skip


@pytest.mark.parametrize("input_scale", [0.0, 0.02])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_sees_one_operator(input_scale: float, grad: bool) -> None:
    W = matrix()
    compiled = torch.compile(
        Product(W, input_scale), fullgraph=True, backend="aot_eager"
    )
    for tokens in (3, 8):
        x = torch.randn(tokens, 18, requires_grad=grad)
        twin = x.detach().clone().requires_grad_(grad)
        bias = torch.randn(24)
        y = compiled(x, bias)
        expected = ops.block_sparse_linear(
            twin, W, bias, "relu", input_scale=input_scale
        )
        assert same_bits(y.detach(), expected.detach())
        if grad:
            y.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(x.grad, twin.grad)


def test_export_for_any_batch() -> None:
    W, bias = matrix(), torch.randn(24)
    module = Product(W, 0.0)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(5, 18), bias), dynamic_shapes=({0: tokens}, None)
    )
    for count in (2, 31):
        x = torch.randn(count, 18)
        found = program.module()(x, bias)
        assert same_bits(found, ops.block_sparse_linear(x, W, bias, "relu"))


def test_the_operator_sees_that_a_tensor_changed() -> None:
    W, bias, x = matrix(), torch.zeros(24), torch.randn(5, 18)
    module = Product(W, 0.0)
    first = module(x, bias)
    assert same_bits(module(x, bias), first)
    module.scales.mul_(2)
    assert same_bits(module(x, bias), 2 * first)
    module.values.zero_()
    assert not module(x, bias).any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_operator_is_registered_as_torch_wants(dynamic: bool) -> None:
    W = matrix()
    x = torch.randn(5, 18, requires_grad=dynamic)
    torch.library.opcheck(
        torch.ops.pybsp.block_sparse_linear_int8.default,
        (
            x, W.values, W.scales, W.crow_indices, W.col_indices, torch.randn(24),
            "none", 0.0, 24,
        ),
    )  # fmt: skip


def test_other_devices_are_served_by_the_reference() -> None:
    W = matrix()
    fields = (W.values, W.crow_indices, W.col_indices)
    y = ops.block_sparse_linear_fields(
        torch.empty(3, 18, device="meta"), *(t.to("meta") for t in fields), W.shape,
        scales=W.scales.to("meta"),
    )  # fmt: skip
    assert y.shape == (3, 24)
    assert y.is_meta


def test_autocast_computes_in_float32() -> None:
    W, x = matrix(), torch.randn(5, 18).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.block_sparse_linear(x, W)
    assert same_bits(y, ops.block_sparse_linear(x.float(), W))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    from torch.autograd import forward_ad

    W, x = matrix(), torch.randn(5, 18)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        ops.block_sparse_linear(forward_ad.make_dual(x, x), W)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.randn(3, 17)}, ValueError, "last dimension of x"),
        ({"x": torch.randn(3, 18).double()}, TypeError, "x must be float32"),
        ({"x": [1.0]}, TypeError, "torch tensor or numpy array"),
        ({"bias": torch.randn(18)}, ValueError, r"must be \(out,\)"),
        ({"activation": "tanh"}, ValueError, "activation must be"),
        ({"residual": torch.randn(3, 23)}, ValueError, "residual has shape"),
        ({"input_scale": -1.0}, ValueError, r"at least 2\*\*-100.*-1\.0"),
        ({"input_scale": float("nan")}, ValueError, "input_scale must be"),
        ({"input_scale": float("inf")}, ValueError, "input_scale must be"),
        ({"input_scale": 1e-40}, ValueError, "input_scale must be"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_arguments_are_named(
    options: Any, error: Any, message: str, grad: bool
) -> None:
    bias = torch.randn(24, requires_grad=grad)
    arguments: dict[str, Any] = {"x": torch.randn(3, 18), "W": matrix(), "bias": bias}
    with pytest.raises(error, match=message):
        ops.block_sparse_linear(**{**arguments, **options})


def test_tiles_are_float32() -> None:
    tiles = ops.pack_tokens(torch.randn(3, 18))
    with pytest.raises(TypeError, match="W int8"):
        ops.block_sparse_linear_tiles(tiles, matrix())


def test_matrices_with_one_input() -> None:
    W, x = matrix(), torch.randn(3, 18)
    both = pybsp.ops.block_sparse_linears(x, [W, W.dequantize()])
    assert same_bits(both[0], ops.block_sparse_linear(x, W))
    assert same_bits(both[1], ops.block_sparse_linear(x, W.dequantize()))
