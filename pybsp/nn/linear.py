"""``BlockSparseLinear``: a linear layer that stores and multiplies only kept blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..blocks import BlockShapeSpec
from ..matrix import BlockSparseMatrix


class BlockSparseLinear(nn.Module):
    """``y = activation(x W^T + bias)`` with ``W`` block-sparse.

    Parameters and buffers carry torch's BSR names: ``weight_values`` ``(nnz, r, c)``
    (a parameter, so it is counted, saved and trained), ``weight_crow_indices`` and
    ``weight_col_indices`` (int32 buffers), ``bias`` ``(out,)`` or None. The zero
    pattern is fixed; gradients reach only the kept blocks.
    """

    weight_crow_indices: torch.Tensor
    weight_col_indices: torch.Tensor

    def __init__(
        self,
        matrix: BlockSparseMatrix,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        ops.check_activation(activation)
        self.out_features, self.in_features = matrix.shape
        self.block_shape = matrix.block_shape
        self.activation = activation
        self.weight_values = nn.Parameter(matrix.values.detach())
        self.register_buffer("weight_crow_indices", matrix.crow_indices)
        self.register_buffer("weight_col_indices", matrix.col_indices)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._matrix: BlockSparseMatrix | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_shape: BlockShapeSpec,
        activation: str | None = None,
    ) -> BlockSparseLinear:
        """Keep the blocks of ``linear.weight`` that are not entirely zero."""
        matrix = BlockSparseMatrix.from_dense(linear.weight, block_shape)
        layer = cls(matrix, linear.bias, activation)
        layer.train(linear.training)
        for parameter in layer.parameters():
            parameter.requires_grad_(linear.weight.requires_grad)
        return layer
