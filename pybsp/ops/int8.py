"""The product with int8 weights: eager call, operator for compile and export, autograd.

An int8 weight is not trained. Gradients reach ``x``, ``bias`` and ``residual``: that
in ``x`` goes through the dequantised weight, as if ``x`` had not been rounded, so that
what lies before a frozen int8 layer can be trained.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from .arguments import operands
from .codes import CODES
from .fields import bind_int8, column_major_blocks

_get_num_threads = torch.get_num_threads


def check_input_scale(input_scale: float) -> None:
    """Refuse what is neither 0, one scale for each token, nor a scale."""
    scale = float(input_scale)
    if scale and not (math.isfinite(scale) and scale >= reference.LEAST_INPUT):
        raise ValueError(
            "input_scale must be a number of at least 2**-100, or 0 for one scale for "
            f"each token; got {input_scale!r}"
        )


def multiply_int8(
    pattern: Any,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    residual: torch.Tensor | None,
    input_scale: float,
    out_features: int,
) -> torch.Tensor:
    """The native call on checked tensors."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    pattern.multiply(
        x.data_ptr(),
        y.numel() // out_features,
        input_scale,
        0 if bias is None else bias.data_ptr(),
        activation,
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        _get_num_threads(),
    )
    return y


class EagerInt8Product(torch.autograd.Function):
    """The product with gradients on a matrix that is bound already."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: Any, W: Any, input_scale: float
    ) -> torch.Tensor:
        ctx.matrix = W
        return multiply_int8(
            W.pattern, x, bias, CODES[None], None, input_scale, W.shape[0]
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        W = ctx.matrix
        fields = (W.values, W.scales, W.crow_indices, W.col_indices)
        needs = ctx.needs_input_grad[:2]
        return *_gradients(grad, fields, W.shape, needs), None, None


@torch.library.custom_op("pybsp::block_sparse_linear_int8", mutates_args=())
def _block_sparse_linear_int8(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    input_scale: float,
    out_features: int,
) -> torch.Tensor:
    name = None if activation == "none" else activation
    shape = (out_features, x.shape[-1])
    if not x.is_cpu:
        return reference.block_sparse_linear_int8(
            x, crow_indices, col_indices, values, scales, shape, bias, name, input_scale
        )
    x, bias = operands(x, bias, out_features)
    check_input_scale(input_scale)
    pattern = _bound(crow_indices, col_indices, values, shape, scales)
    return multiply_int8(pattern, x, bias, CODES[name], None, input_scale, out_features)


@_block_sparse_linear_int8.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], args[-1]), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    x, *fields, _bias, activation, _scale, out_features = inputs
    if activation != "none":
        raise ValueError("gradients need the activation outside of the operator")
    ctx.save_for_backward(*fields)
    ctx.shape = (out_features, x.shape[-1])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[5])
    grad_x, grad_bias = _gradients(grad, ctx.saved_tensors, ctx.shape, needs)
    return grad_x, None, None, None, None, grad_bias, None, None, None


_block_sparse_linear_int8.register_autograd(_backward, setup_context=_save_for_backward)


def _gradients(
    grad: torch.Tensor,
    fields: tuple[torch.Tensor, ...],
    shape: tuple[int, int],
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those in ``x`` and the bias that are needed."""
    values, scales, crow_indices, col_indices = fields
    grad_x = None
    if needs[0]:
        blocks = reference.dequantized_blocks(crow_indices, col_indices, values, scales)
        grad_x = torch.ops.pybsp.block_sparse_grad_x(
            grad, blocks, crow_indices, col_indices, shape[1]
        )
    return grad_x, grad.reshape(-1, shape[0]).sum(0) if needs[1] else None


class _Bound:
    """A native matrix and the state of the tensors that it was made of."""

    def __init__(
        self, pattern: Any, fields: tuple[torch.Tensor, ...], shape: tuple[int, int]
    ) -> None:
        self.pattern, self.shape = pattern, shape
        self.others = fields[1:]
        self.state = [_state(field) for field in fields]

    def of(self, fields: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> bool:
        return (
            self.shape == shape
            and all(a is b for a, b in zip(self.others, fields[1:], strict=True))
            and self.state == [_state(field) for field in fields]
        )


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    # Inference tensors count no versions.
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


#: By values: the operator sees the tensors alone, and to bind them anew in every call
#: would cost more than the product.
_matrices: MutableMapping[torch.Tensor, _Bound] = WeakTensorKeyDictionary()


def _bound(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    scales: torch.Tensor,
) -> Any:
    fields = (values, crow_indices, col_indices, scales)
    known = _matrices.get(values)
    if known is None or not known.of(fields, shape):
        pattern = bind_int8(
            crow_indices, col_indices, column_major_blocks(values), shape, scales
        )
        known = _Bound(pattern, fields, shape)
        if not any(field.is_inference() for field in fields):
            _matrices[values] = known
    return known.pattern
