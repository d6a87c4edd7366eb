"""The operator in torch: gradients, compile, export, grad modes, tracing, forking."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_linear, block_sparse_weight, same_bits

import pybsp
from pybsp import BlockSparseMatrix, ops, reference
from pybsp.nn import BlockSparseLinear

ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
BLOCKS = [(4, 1), (1, 6), (4, 3), (1, 1), (24, 18)]


def matrix(block_shape: Any = (4, 1), density: float = 0.5) -> BlockSparseMatrix:
    weight = block_sparse_weight((24, 18), block_shape, density)
    return BlockSparseMatrix.from_dense(weight, block_shape)


def layer(activation: str | None = None, bias: bool = True) -> BlockSparseLinear:
    linear = torch.nn.Linear(18, 24, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(matrix().to_dense())
    return BlockSparseLinear.from_linear(linear, (4, 1), activation)


def gradients(
    function: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    seed: torch.Tensor,
) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, seed))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_gradients_match_dense_float64(
    isa: str, block_shape: Any, activation: str | None
) -> None:
    W = matrix(block_shape)
    x, bias, seed = torch.randn(2, 5, 18), torch.randn(24), torch.randn(2, 5, 24)
    fields = (W.crow_indices, W.col_indices)

    def sparse(x: Any, values: Any, bias: Any) -> torch.Tensor:
        V = BlockSparseMatrix(*fields, values, W.shape)
        result: torch.Tensor = ops.block_sparse_linear(x, V, bias, activation)
        return result

    def dense(x: Any, values: Any, bias: Any) -> torch.Tensor:
        return reference.block_sparse_linear(
            x, *fields, values, W.shape, bias, activation
        )

    inputs = [x, W.values, bias]
    found = gradients(sparse, inputs, seed)
    expected = gradients(dense, [t.double() for t in inputs], seed.double())
    for name, a, b in zip(("x", "values", "bias"), found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{isa} {n}: {m}"
        )


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_wanted_gradient_is_computed(wanted: str) -> None:
    W = matrix()
    tensors = {"x": torch.randn(3, 18), "values": W.values, "bias": torch.randn(24)}
    tensors[wanted].requires_grad_()
    y = ops.block_sparse_linear(tensors["x"], W, tensors["bias"], "gelu")
    y.sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name == wanted)
    assert tensors[wanted].grad.shape == tensors[wanted].shape


def test_gradients_of_finite_differences() -> None:
    W = matrix((4, 3))
    x = torch.randn(4, 18)
    x_grad = gradients(lambda a: ops.block_sparse_linear(a, W), [x], torch.ones(4, 24))
    step = 0.5  # the product is linear: any step is exact
    for feature in (0, 7, 17):
        moved = x.clone()
        moved[:, feature] += step
        difference = ops.block_sparse_linear(moved, W) - ops.block_sparse_linear(x, W)
        torch.testing.assert_close(
            difference.sum(1) / step, x_grad[0][:, feature], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_training_and_inference_agree(activation: str | None) -> None:
    W, x, bias = matrix(), torch.randn(7, 18), torch.randn(24)
    with torch.no_grad():
        fused = ops.block_sparse_linear(x, W, bias, activation)
    y = ops.block_sparse_linear(x.requires_grad_(), W, bias, activation)
    assert y.requires_grad
    assert not fused.requires_grad
    torch.testing.assert_close(y.detach(), fused, rtol=1e-5, atol=1e-6)


def test_second_derivatives() -> None:
    W = matrix()
    x = torch.randn(3, 18, requires_grad=True)
    y = ops.block_sparse_linear(x, W, activation="silu")
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    z = F.silu(exact @ W.to_dense().double().t())
    (expected,) = torch.autograd.grad(z.sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(expected.square().sum(), exact)
    torch.testing.assert_close(second.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes(mode: Any) -> None:
    W, x, bias = matrix(), torch.randn(5, 18), torch.randn(24)
    expected = ops.block_sparse_linear(x, W, bias, "gelu")
    for tensor in (x, W.values, bias):
        tensor.requires_grad_()
    with mode():
        y = ops.block_sparse_linear(x, W, bias, "gelu")
        assert not y.requires_grad
        assert same_bits(y, expected)
        inner = ops.block_sparse_linear(torch.randn(2, 18), W)  # an inference tensor
        assert inner.shape == (2, 24)


def test_an_inference_tensor_outside_of_inference_mode() -> None:
    W = matrix()
    with torch.inference_mode():
        x = torch.randn(5, 18)
    expected = ops.block_sparse_linear(x.clone(), W)
    assert same_bits(ops.block_sparse_linear(x, W), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_computes_in_float32(grad: bool) -> None:
    W, x, bias = matrix(), torch.randn(5, 18), torch.randn(24)
    W.values.requires_grad_(grad)
    low = x.bfloat16()
    with pytest.raises(TypeError, match="x must be float32"):
        ops.block_sparse_linear(low, W, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.block_sparse_linear(low, W, bias)
        z = ops.block_sparse_linear(x, W, bias)
    assert y.dtype == z.dtype == torch.float32
    assert_linear(y, low.float(), W.to_dense(), bias)
    assert_linear(z, x, W.to_dense(), bias)
    if grad:
        y.sum().backward()
        assert W.values.grad is not None


def test_opcheck() -> None:
    W = matrix((4, 3))
    x, bias = torch.randn(2, 5, 18), torch.randn(24)
    op = torch.ops.pybsp.block_sparse_linear
    rest = (W.crow_indices, W.col_indices)
    torch.library.opcheck(op, (x, W.values, *rest, None, "gelu", 24))
    grads = [t.clone().requires_grad_() for t in (x, W.values, bias)]
    torch.library.opcheck(op, (grads[0], grads[1], *rest, grads[2], "none", 24))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_a_function(backend: str, grad: bool) -> None:
    W, bias = matrix(), torch.randn(24)

    def function(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ops.block_sparse_linear(x * 2, W, bias, "gelu")
        return y + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (2, 5, 11):
        x = torch.randn(tokens, 18, requires_grad=grad)
        expected = function(x)
        y = compiled(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        if grad:
            (a,) = torch.autograd.grad(y.sum(), x)
            (b,) = torch.autograd.grad(expected.sum(), x)
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compile_a_layer(backend: str, activation: str | None) -> None:
    module = layer(activation)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(3, 18)
    y = compiled(x)
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_export_a_layer_for_any_batch(bias: bool) -> None:
    module = layer("gelu", bias).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        module, (torch.randn(4, 18),), dynamic_shapes=({0: batch},)
    )
    names = [str(node.target) for node in exported.graph.nodes]
    assert any("pybsp.block_sparse_linear" in name for name in names), names
    for tokens in (1, 4, 33):
        x = torch.randn(tokens, 18)
        torch.testing.assert_close(
            exported.module()(x), module(x), rtol=1e-5, atol=1e-6
        )


def test_export_a_function() -> None:
    W = matrix()

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = pybsp.block_sparse_linear(x, W, activation="relu")
            return y

    x = torch.randn(4, 18)
    exported = torch.export.export(Model(), (x,))
    torch.testing.assert_close(exported.module()(x), Model()(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_traced_layer_computes_instead_of_replaying() -> None:
    module = layer("gelu").eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, (torch.randn(4, 18),), check_trace=False)
        x = torch.randn(4, 18)
        torch.testing.assert_close(traced(x), module(x), rtol=1e-5, atol=1e-6)


def test_fake_tensors_take_the_shape_only() -> None:
    W = matrix()
    x = torch.empty(2, 3, 18, device="meta")
    y = torch.ops.pybsp.block_sparse_linear(
        x, W.values, W.crow_indices, W.col_indices, None, "none", 24
    )
    assert y.shape == (2, 3, 24)
    assert y.is_meta


def test_hostile_fields_of_the_operator_are_refused() -> None:
    W, x = matrix(), torch.randn(3, 18)
    op = torch.ops.pybsp.block_sparse_linear
    beyond = W.col_indices.clone()
    beyond[-1] = 18
    with pytest.raises(ValueError, match="stay under 18"):
        op(x, W.values, W.crow_indices, beyond, None, "none", 24)
    with pytest.raises(ValueError, match="one entry more"):
        op(x, W.values, W.crow_indices, W.col_indices, None, "none", 28)
    with pytest.raises(ValueError, match="they must be equal"):
        op(x, W.values[:-1], W.crow_indices, W.col_indices, None, "none", 24)


def test_operands_that_the_operators_would_misread_are_refused() -> None:
    """Exported graphs call them without the functions around them."""
    W = matrix()
    x, dy, bias = torch.randn(3, 18), torch.randn(3, 24), torch.randn(24)
    fields, call = (W.crow_indices, W.col_indices), torch.ops.pybsp
    linear, q = call.block_sparse_linear, W.quantize()
    with pytest.raises(TypeError, match="x must be float32"):
        linear(x.bfloat16(), W.values, *fields, None, "none", 24)
    with pytest.raises(TypeError, match="bias must be float32"):
        linear(x, W.values, *fields, bias.half(), "none", 24)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        linear(x, W.values, *fields, bias[:3], "none", 24)
    int8 = (q.values, q.scales, q.crow_indices, q.col_indices)
    with pytest.raises(TypeError, match="x must be float32"):
        call.block_sparse_linear_int8(x.half(), *int8, None, "none", 0.0, 24)
    with pytest.raises(ValueError, match="bias has shape"):
        call.block_sparse_linear_int8(x, *int8, bias[:3], "none", 0.0, 24)
    with pytest.raises(ValueError, match="input_scale must be"):
        call.block_sparse_linear_int8(x, *int8, None, "none", float("nan"), 24)
    with pytest.raises(TypeError, match="grad must be float32"):
        call.block_sparse_grad_x(dy.half(), W.values, *fields, 18)
    with pytest.raises(TypeError, match="x must be float32"):
        call.block_sparse_grad_values(dy, x.half(), *fields, 4, 1)
    with pytest.raises(ValueError, match="all but the last dimension"):
        call.block_sparse_grad_values(dy, x[:1], *fields, 4, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_exported_layer_computes_in_float32_under_autocast(dtype: str) -> None:
    second = layer("relu")
    second = second if dtype == "float32" else second.quantize(dtype=dtype)
    module = torch.nn.Sequential(torch.nn.Linear(18, 18), second).eval()
    x = torch.randn(400, 18)
    exported = torch.export.export(module, (x,)).module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = exported(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, module(x))
        if dtype != "bfloat16":
            y.sum().backward()
            found = [p.grad.clone() for p in exported.parameters()]  # type: ignore[union-attr]
            module.zero_grad()
            module(x).sum().backward()
            expected = [p.grad for p in module.parameters()]
            torch.testing.assert_close(found, expected)


def test_a_matrix_that_is_not_on_the_cpu_is_refused() -> None:
    W = matrix()
    W.values = W.values.to("meta")
    for x in (torch.randn(3, 18), torch.randn(3, 18).numpy()):
        with pytest.raises(ValueError, match="W on meta"):
            ops.block_sparse_linear(x, W)


def test_values_may_be_trained_in_place() -> None:
    W, x = matrix(), torch.randn(6, 18)
    W.values.requires_grad_()
    optimizer = torch.optim.SGD([W.values], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = ops.block_sparse_linear(x, W).square().sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            assert_linear(ops.block_sparse_linear(x, W), x, W.to_dense())


def test_backward_runs_in_threads_at_once() -> None:
    W = matrix()
    inputs = [torch.randn(9, 18, requires_grad=True) for _ in range(4)]
    threads = [
        threading.Thread(
            target=lambda x=x: ops.block_sparse_linear(x, W).sum().backward()
        )
        for x in inputs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = W.to_dense().sum(0)
    for x in inputs:
        torch.testing.assert_close(x.grad, expected.expand(9, 18))


class Tagged(torch.Tensor):
    """A tensor class of its own."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.as_subclass(Tagged)])
@pytest.mark.parametrize("grad", [True, False])
def test_parameters_and_tensor_classes_as_input(kind: Any, grad: bool) -> None:
    W = BlockSparseMatrix.from_dense(torch.randn(16, 8), (8, 1))
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(grad):
        y = ops.block_sparse_linear(kind(x), W)
    assert torch.equal(
        y.detach().as_subclass(torch.Tensor), ops.block_sparse_linear(x, W)
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
def test_those_who_expect_operators_see_one() -> None:
    from torch.autograd import forward_ad
    from torch.fx.experimental.proxy_tensor import make_fx

    W = BlockSparseMatrix.from_dense(torch.randn(16, 8), (8, 1))
    x = torch.randn(3, 8)
    graph = make_fx(lambda x: ops.block_sparse_linear(x, W))(x)
    assert torch.equal(graph(x * 2), ops.block_sparse_linear(x * 2, W))
    negative = torch._neg_view(x)
    assert torch.equal(ops.block_sparse_linear(negative, W),
                       ops.block_sparse_linear(-x, W))  # fmt: skip
    # A tangent that silently vanishes would be worse.
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        ops.block_sparse_linear(forward_ad.make_dual(x, x), W)


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_all_second_derivatives(block_shape: Any) -> None:
    W = matrix(block_shape)
    fields = (W.crow_indices, W.col_indices)

    def twice(product: Any, x: Any, values: Any) -> list[torch.Tensor]:
        x, values = x.clone().requires_grad_(), values.clone().requires_grad_()
        y = product(x, values)
        first = torch.autograd.grad(y.pow(3).sum(), (x, values), create_graph=True)
        total = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(total, (x, values)))

    def sparse(x: Any, values: Any) -> Any:
        return ops.block_sparse_linear(x, BlockSparseMatrix(*fields, values, W.shape))

    def dense(x: Any, values: Any) -> Any:
        return reference.block_sparse_linear(x, *fields, values, W.shape)

    x = torch.randn(2, 3, 18)
    found = twice(sparse, x, W.values)
    expected = twice(dense, x.double(), W.values.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max())


def test_opcheck_of_the_gradients() -> None:
    W = matrix((4, 3))
    x, dy = torch.randn(2, 5, 18), torch.randn(2, 5, 24)
    fields = (W.crow_indices, W.col_indices)
    dy.requires_grad_()
    torch.library.opcheck(
        torch.ops.pybsp.block_sparse_grad_x,
        (dy, W.values.clone().requires_grad_(), *fields, 18),
    )
    torch.library.opcheck(
        torch.ops.pybsp.block_sparse_grad_values,
        (dy, x.requires_grad_(), *fields, 4, 3),
    )


def test_batched_gradients() -> None:
    W, x = matrix(), torch.randn(4, 18, requires_grad=True)
    y = ops.block_sparse_linear(x, W)
    seeds = torch.randn(3, 4, 24)
    (batched,) = torch.autograd.grad(
        y, x, seeds, is_grads_batched=True, retain_graph=True
    )
    for seed, dx in zip(seeds, batched, strict=True):
        (expected,) = torch.autograd.grad(y, x, seed, retain_graph=True)
        torch.testing.assert_close(dx, expected)


def test_the_gradient_of_values_lies_as_they_do() -> None:
    W, x = matrix((4, 3)), torch.randn(5, 18)
    W.values.requires_grad_()
    ops.block_sparse_linear(x, W).sum().backward()
    assert W.values.grad is not None
    assert W.values.grad.stride() == W.values.stride() == (12, 1, 4)
