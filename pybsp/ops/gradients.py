"""The gradients of the block-sparse product, at the kept blocks only.

With ``y = x W^T``, ``dx = dy W`` and ``dW_b = (dy^T x)_b``: as operators for compile
and double backward, and as direct calls on a bound pattern for the eager backward. All
second derivatives are these three operators again.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .arguments import check_cpu, check_float32, plain
from .fields import bind_pattern, column_major_blocks


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    shape: tuple[int, int],
    needs: tuple[bool, bool, bool],
    pattern: Any = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Those of the gradients in ``x``, ``values`` and the bias that are needed.

    With a ``pattern`` the native calls are made directly, without it through the
    operators. bfloat16 ``values`` are not trained, but what comes before them may be.
    """
    if values.dtype == torch.bfloat16:
        values, pattern = values.float(), None
    product: Any = torch.ops.pybsp if pattern is None else _Native(pattern)
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        product = _Reference  # is_grads_batched, for which native products have no rule
    elif pattern is not None:
        grad = _plain(grad)
    fields = (crow_indices, col_indices)
    grad_x = grad_values = grad_bias = None
    # dx last: it is what the next backward reads, and then still in cache.
    if needs[1]:
        if needs[2] and isinstance(product, _Native):
            grad_bias = product.grad_bias = grad.new_empty(shape[0])
        grad_values = product.block_sparse_grad_values(
            grad, x, *fields, *values.shape[1:]
        )
    if needs[2] and grad_bias is None:
        grad_bias = grad.reshape(-1, shape[0]).sum(0)
    if needs[0]:
        grad_x = product.block_sparse_grad_x(grad, values, *fields, shape[1])
    return grad_x, grad_values, grad_bias


class _Native:
    """The operators on a pattern that is bound already and on plain tensors."""

    def __init__(self, pattern: Any) -> None:
        self.pattern = pattern
        #: Filled by block_sparse_grad_values, which has all of dy at hand.
        self.grad_bias: torch.Tensor | None = None

    def block_sparse_grad_x(
        self, grad: torch.Tensor, values: torch.Tensor, *fields: Any
    ) -> torch.Tensor:
        return _grad_x(self.pattern, grad, values, fields[-1])

    def block_sparse_grad_values(
        self, grad: torch.Tensor, x: torch.Tensor, *fields: Any
    ) -> torch.Tensor:
        shape = torch.Size((self.pattern.nnz, *fields[2:]))
        return _grad_values(self.pattern, grad, _plain(x), shape, self.grad_bias)


class _Reference:
    """The operators through dense matrices."""

    @staticmethod
    def block_sparse_grad_x(
        grad: torch.Tensor, values: torch.Tensor, crow: Any, col: Any, in_features: int
    ) -> torch.Tensor:
        shape = (grad.shape[-1], in_features)
        return reference.block_sparse_grad_x(grad, crow, col, values, shape)

    @staticmethod
    def block_sparse_grad_values(
        grad: torch.Tensor, x: torch.Tensor, crow: Any, col: Any, *block_shape: int
    ) -> torch.Tensor:
        shape = (block_shape[0], block_shape[1])
        return reference.block_sparse_grad_values(grad, x, crow, col, shape)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous memory that shows what the tensor does, of torch's own class."""
    return plain(tensor).contiguous()


def _grad_x(
    pattern: Any, grad: torch.Tensor, values: torch.Tensor, in_features: int
) -> torch.Tensor:
    grad_x = grad.new_empty((*grad.shape[:-1], in_features))
    pattern.grad_x(
        values.data_ptr(),
        grad.data_ptr(),
        grad_x.numel() // in_features,
        grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x


def _grad_values(
    pattern: Any,
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: torch.Size,
    grad_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    grad_values = _new_values(grad, shape)
    pattern.grad_values(
        grad.data_ptr(),
        x.data_ptr(),
        x.numel() // x.shape[-1],
        grad_values.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_values


def _new_values(like: torch.Tensor, shape: Any) -> torch.Tensor:
    """Blocks that lie column by column, as the parameter does: an optimizer then walks
    both in the same order."""
    return like.new_empty((shape[0], shape[2], shape[1])).transpose(1, 2)


@torch.library.custom_op("pybsp::block_sparse_grad_x", mutates_args=())
def _block_sparse_grad_x(
    grad: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    in_features: int,
) -> torch.Tensor:
    shape = (grad.shape[-1], in_features)
    if not grad.is_cpu:
        return reference.block_sparse_grad_x(
            grad, crow_indices, col_indices, values, shape
        )
    check_float32(grad=grad)
    check_cpu(values=values)
    values = column_major_blocks(plain(values))
    pattern = bind_pattern(crow_indices, col_indices, values, shape)
    return _grad_x(pattern, _plain(grad), values, in_features)


@torch.library.custom_op("pybsp::block_sparse_grad_values", mutates_args=())
def _block_sparse_grad_values(
    grad: torch.Tensor,
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_rows: int,
    block_cols: int,
) -> torch.Tensor:
    shape = torch.Size((col_indices.shape[0], block_rows, block_cols))
    if not grad.is_cpu:
        blocks = reference.block_sparse_grad_values(
            grad, x, crow_indices, col_indices, (block_rows, block_cols)
        )
        return _new_values(grad, shape).copy_(blocks)
    check_float32(grad=grad, x=x)
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and x {tuple(x.shape)}: all but the "
            "last dimension must be equal"
        )
    # bind_pattern takes the block shape from values.
    values = grad.new_empty(1).as_strided(shape, (0, 0, 0))
    pattern = bind_pattern(
        crow_indices, col_indices, values, (grad.shape[-1], x.shape[-1])
    )
    return _grad_values(pattern, _plain(grad), _plain(x), shape)


@_block_sparse_grad_x.register_fake
def _(grad: torch.Tensor, *args: Any) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], args[-1]))


@_block_sparse_grad_values.register_fake
def _(grad: torch.Tensor, *args: Any) -> torch.Tensor:
    return _new_values(grad, (args[2].shape[0], args[3], args[4]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])


def _backward_of_grad_x(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad, values, *indices = ctx.saved_tensors
    # dx = dy W: linear in dy and in W, as the product itself with dy for x.
    grad_grad = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.pybsp.block_sparse_linear(
            g, values, *indices, None, "none", grad.shape[-1]
        )
    if ctx.needs_input_grad[1]:
        grad_values = torch.ops.pybsp.block_sparse_grad_values(
            grad, g, *indices, *values.shape[1:]
        )
    return grad_grad, grad_values, None, None, None


def _backward_of_grad_values(
    ctx: Any, g: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad, x, *indices = ctx.saved_tensors
    # dW = dy^T x at the pattern of g.
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.pybsp.block_sparse_linear(
            x, g, *indices, None, "none", grad.shape[-1]
        )
    if ctx.needs_input_grad[1]:
        grad_x = torch.ops.pybsp.block_sparse_grad_x(grad, g, *indices, x.shape[-1])
    return grad_grad, grad_x, None, None, None, None


_block_sparse_grad_x.register_autograd(_backward_of_grad_x, setup_context=_save)
_block_sparse_grad_values.register_autograd(
    _backward_of_grad_values, setup_context=_save
)
