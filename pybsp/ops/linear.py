"""The block-sparse product: eager call, operator for compile and export, autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from .. import reference
from .arguments import (
    autocast,
    check_activation,
    check_cpu,
    checked_bias,
    checked_residual,
    operands,
    refuse_tangents,
)
from .codes import CODES
from .fields import (
    bind_pattern,
    check_float_values,
    column_major_blocks,
    int32_indices,
)
from .gradients import gradients
from .int8 import EagerInt8Product, check_input_scale, multiply_int8

# Global names: an attribute of torch costs a twentieth of a microsecond a look-up.
_float32 = torch.float32
_bfloat16 = torch.bfloat16
_plain_tensors = {torch.Tensor, torch.nn.Parameter}
_get_num_threads = torch.get_num_threads
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_transforming = torch._C._are_functorch_transforms_active


def block_sparse_linear(
    x: Any,
    W: Any,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
    *,
    input_scale: float = 0.0,
) -> Any:
    """``activation(x @ W.T + bias) + residual`` for a block-sparse ``W``.

    Parameters
    ----------
    x : float32 torch tensor or numpy array ``(..., in)``
    W : ``BlockSparseMatrix`` or ``torch.sparse_bsr`` tensor ``(out, in)``
        The latter is checked and copied on every call.
    bias : ``(out,)`` of the kind of ``x``, or None
    activation : None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``
    residual : ``(..., out)`` of the kind of ``x``, or None
    input_scale : for an int8 ``W``, which multiplies ``x`` rounded to whole numbers of
        this size, at most 127; 0: ``max |x| / 127`` of each token by itself

    bfloat16 ``W.values`` are widened, and all arithmetic is float32.

    Returns ``(..., out)`` of the kind of ``x``. Differentiable in ``x``, ``bias``,
    ``residual`` and float32 ``W.values``; ``W``'s pattern is fixed. Works under
    ``inference_mode``, ``torch.compile`` and ``torch.export``.
    """
    if (
        not _is_compiling()
        and type(x) is torch.Tensor
        and x.is_cpu
        and not x.is_neg()
        and not _is_tracing()
        and not _dispatch_modes()
        and not _is_transforming()
        and forward_ad._current_level < 0
    ):
        # The eager call without gradients: a few microseconds in all, most of them the
        # allocation of y, so neither the dispatcher nor a helper stands in its way.
        # What expects to see operators (tracers, modes, functorch, forward-mode AD)
        # goes through the operator.
        try:
            values, pattern, (out_features, in_features) = W.values, W.pattern, W.shape
        except AttributeError:
            return block_sparse_linear(x, _from_bsr(W), bias, activation, residual)
        if values.dtype is not _float32 and values.dtype is not _bfloat16:
            return _block_sparse_linear_int8(
                x, W, bias, activation, residual, input_scale
            )
        shape = x.shape
        if (
            x.dtype is not _float32
            or not values.is_cpu
            or not shape
            or shape[-1] != in_features
            or activation not in CODES
            # A wrapper has no memory of its own.
            or (bias is not None and type(bias) not in _plain_tensors)
            or (residual is not None and type(residual) not in _plain_tensors)
        ):
            _check_linear(x, W, activation)
            return _block_sparse_linear_dispatched(x, W, bias, activation, residual)
        bias_address = residual_address = 0
        if bias is not None:
            bias = checked_bias(bias, out_features)
            bias_address = bias.data_ptr()
        if residual is not None:
            residual = checked_residual(residual, (*shape[:-1], out_features))
            residual_address = residual.data_ptr()
        if _is_grad_enabled() and (
            x.requires_grad
            or values.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            product = _EagerProduct.apply(x, values, bias, W)  # type: ignore[no-untyped-call]
            y = reference.ACTIVATIONS[activation](product)
            return y if residual is None else y + residual
        x = x.contiguous()
        # Not torch.empty, which follows the default dtype and device.
        y = x.new_empty((*shape[:-1], out_features))
        pattern.multiply(
            values.data_ptr(),
            x.data_ptr(),
            y.numel() // out_features,
            bias_address,
            CODES[activation],
            residual_address,
            y.data_ptr(),
            _get_num_threads(),
        )
        return y
    if type(x).__module__ == "numpy":
        return _block_sparse_linear_numpy(x, W, bias, activation, residual, input_scale)
    return _block_sparse_linear_dispatched(
        x, W, bias, activation, residual, input_scale
    )


def _block_sparse_linear_int8(
    x: torch.Tensor,
    W: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    input_scale: float,
) -> Any:
    """The eager call with int8 weights."""
    out_features, in_features = W.shape
    check_input_scale(input_scale)
    if (
        x.dtype is not _float32
        or not W.values.is_cpu
        or not x.shape
        or x.shape[-1] != in_features
        or activation not in CODES
        or (bias is not None and type(bias) not in _plain_tensors)
        or (residual is not None and type(residual) not in _plain_tensors)
    ):
        _check_linear(x, W, activation)
        return _block_sparse_linear_dispatched(
            x, W, bias, activation, residual, input_scale
        )
    if bias is not None:
        bias = checked_bias(bias, out_features)
    if residual is not None:
        residual = checked_residual(residual, (*x.shape[:-1], out_features))
    if _is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias, residual)
    ):
        product = EagerInt8Product.apply(x, bias, W, input_scale)  # type: ignore[no-untyped-call]
        y: torch.Tensor = reference.ACTIVATIONS[activation](product)
        return y if residual is None else y + residual
    return multiply_int8(
        W.pattern, x, bias, CODES[activation], residual, input_scale, out_features
    )


def _multiply(
    pattern: Any,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    out_features: int,
) -> torch.Tensor:
    """The native call on checked tensors, outside of the eager call's hot path."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    pattern.multiply(
        values.data_ptr(),
        x.data_ptr(),
        y.numel() // out_features,
        0 if bias is None else bias.data_ptr(),
        activation,
        0,
        y.data_ptr(),
        _get_num_threads(),
    )
    return y


class _Matrix(NamedTuple):
    """What a call needs of a block-sparse matrix."""

    shape: tuple[int, int]
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    values: torch.Tensor
    pattern: Any
    scales: None = None


def _from_bsr(tensor: Any) -> _Matrix:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_bsr:
        kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor)
        raise TypeError(
            "W must be a pybsp.BlockSparseMatrix or a torch.sparse_bsr tensor; got "
            f"{kind}; see BlockSparseMatrix.from_dense"
        )
    shape = (tensor.shape[0], tensor.shape[1])
    values = column_major_blocks(tensor.values())
    crow_indices = int32_indices("crow_indices", tensor.crow_indices())
    col_indices = int32_indices("col_indices", tensor.col_indices())
    pattern = bind_pattern(crow_indices, col_indices, values, shape)
    return _Matrix(shape, crow_indices, col_indices, values, pattern)


def _check_linear(x: Any, W: Any, activation: str | None) -> None:
    check_activation(activation)
    _check_features(x, W.shape)
    if not W.values.is_cpu:
        raise ValueError(
            f"x is on the CPU and W on {W.values.device}; move one of them"
        )


def _check_features(x: Any, shape: tuple[int, int]) -> None:
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and W {tuple(shape)}: the last dimension "
            f"of x must be in = {shape[1]}"
        )


def _block_sparse_linear_numpy(
    x: Any,
    W: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    input_scale: float = 0.0,
) -> Any:
    import numpy as np

    W = W if hasattr(W, "pattern") else _from_bsr(W)
    if bias is not None and type(bias).__module__ != "numpy":
        raise TypeError(
            f"bias must be of the kind of x, a numpy array; got {type(bias).__name__}"
        )
    if residual is not None and type(residual).__module__ != "numpy":
        raise TypeError(
            "residual must be of the kind of x, a numpy array; got "
            f"{type(residual).__name__}"
        )
    _check_linear(x, W, activation)
    if x.dtype != np.float32:
        raise TypeError(
            f"x must be float32; got {x.dtype}; call .astype('float32') first"
        )
    out_features = W.shape[0]
    x = np.ascontiguousarray(x)
    y = np.empty((*x.shape[:-1], out_features), np.float32)
    if bias is not None:
        bias = checked_bias(torch.as_tensor(np.array(bias)), out_features)
    if residual is not None:
        residual = checked_residual(torch.as_tensor(np.array(residual)), y.shape)
    check_input_scale(input_scale)
    input_arguments: tuple[Any, ...] = (
        (W.values.data_ptr(), x.ctypes.data, y.size // out_features)
        if W.scales is None
        else (x.ctypes.data, y.size // out_features, input_scale)
    )
    W.pattern.multiply(
        *input_arguments,
        0 if bias is None else bias.data_ptr(),
        CODES[activation],
        0 if residual is None else residual.data_ptr(),
        y.ctypes.data,
        torch.get_num_threads(),
    )
    return y


def _block_sparse_linear_dispatched(
    x: Any,
    W: Any,
    bias: Any,
    activation: str | None,
    residual: Any,
    input_scale: float = 0.0,
) -> Any:
    """Through the operator: autograd, compile, export, other devices, autocast."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"x must be a torch tensor or numpy array; got {type(x).__name__}"
        )
    W = W if hasattr(W, "pattern") else _from_bsr(W)
    y = block_sparse_linear_fields(
        x, W.values, W.crow_indices, W.col_indices, W.shape, bias, activation,
        W.scales, input_scale,
    )  # fmt: skip
    return y if residual is None else y + checked_residual(residual, y.shape, y.device)


def block_sparse_linear_fields(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    scales: torch.Tensor | None = None,
    input_scale: float = 0.0,
) -> torch.Tensor:
    """``block_sparse_linear`` on the tensors: what compile and export see."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch tensor; got {type(x).__name__}")
    refuse_tangents(x=x, values=values, bias=bias)
    check_activation(activation)
    x = autocast(x)
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32; got {x.dtype}; call .float() first")
    if scales is not None and values.dtype != torch.int8:
        raise TypeError(
            f"values must be torch.int8; got {values.dtype}; quantize them again"
        )
    if scales is None:
        check_float_values(values)
    _check_features(x, shape)
    if bias is not None:
        bias = checked_bias(bias, shape[0], x.device)
    tensors = (x, values, bias)
    fused = not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in tensors
    )
    inside = (activation if fused else None) or "none"
    y: torch.Tensor
    if scales is None:
        y = torch.ops.pybsp.block_sparse_linear(
            x, values, crow_indices, col_indices, bias, inside, shape[0]
        )
    else:
        if not _is_compiling():  # which has no numbers to check
            check_input_scale(input_scale)
        y = torch.ops.pybsp.block_sparse_linear_int8(
            x, values, scales, crow_indices, col_indices, bias, inside, input_scale,
            shape[0],
        )  # fmt: skip
    return y if fused else reference.ACTIVATIONS[activation](y)


@torch.library.custom_op("pybsp::block_sparse_linear", mutates_args=())
def _block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_features: int,
) -> torch.Tensor:
    name = None if activation == "none" else activation
    shape = (out_features, x.shape[-1])
    if not x.is_cpu:
        return reference.block_sparse_linear(
            x, crow_indices, col_indices, values, shape, bias, name
        )
    x, bias = operands(x, bias, out_features)
    check_cpu(values=values)
    values = column_major_blocks(values)
    pattern = bind_pattern(crow_indices, col_indices, values, shape)
    return _multiply(pattern, x, values, bias, CODES[name], out_features)


@_block_sparse_linear.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], args[-1]), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    x, values, crow_indices, col_indices, _bias, activation, out_features = inputs
    if activation != "none":
        raise ValueError("gradients need the activation outside of the operator")
    ctx.save_for_backward(x, values, crow_indices, col_indices)
    ctx.shape = (out_features, x.shape[-1])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad
    x, values, crow_indices, col_indices = ctx.saved_tensors
    grad_x, grad_values, grad_bias = gradients(
        grad, x.to(grad.dtype), values, crow_indices, col_indices, ctx.shape,
        (needs[0], needs[1], needs[4]),
    )  # fmt: skip
    return grad_x, grad_values, None, None, grad_bias, None, None


_block_sparse_linear.register_autograd(_backward, setup_context=_save_for_backward)


class _EagerProduct(torch.autograd.Function):
    """The product with gradients on a pattern that is bound already: the operator would
    check the indices again on every call."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, bias: Any, W: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values, W.crow_indices, W.col_indices)
        ctx.shape, ctx.pattern = W.shape, W.pattern
        return _multiply(W.pattern, x, values, bias, CODES[None], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        # What expects to see operators gets them: double backward, modes, functorch.
        direct = (
            type(grad) is torch.Tensor
            and not _is_grad_enabled()
            and not _dispatch_modes()
            and not _is_transforming()
        )
        x, values, crow_indices, col_indices = ctx.saved_tensors
        found = gradients(
            grad, x, values, crow_indices, col_indices, ctx.shape, needs,
            ctx.pattern if direct else None,
        )  # fmt: skip
        return *found, None
