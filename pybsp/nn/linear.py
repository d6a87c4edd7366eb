"""``BlockSparseLinear``: a linear layer that stores and multiplies only kept blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..blocks import BlockShape, BlockShapeSpec
from ..matrix import BlockSparseMatrix

#: The names of the three tensors of a packed weight, as in ``torch.sparse_bsr``.
FIELDS = ("weight_values", "weight_crow_indices", "weight_col_indices")


class BlockSparseLinear(nn.Module):
    """``y = activation(x W^T + bias)`` with ``W`` block-sparse.

    Parameters and buffers carry torch's BSR names: ``weight_values`` ``(nnz, r, c)``
    (a parameter, so it is counted and trained), ``weight_crow_indices`` and
    ``weight_col_indices`` (int32 buffers), ``bias`` ``(out,)`` or None. The zero
    pattern is fixed; gradients reach only the kept blocks. To change the pattern
    replace the tensors or call ``load_state_dict``; do not write into the indices.
    """

    weight_values: nn.Parameter
    weight_crow_indices: torch.Tensor
    weight_col_indices: torch.Tensor
    bias: nn.Parameter | None
    _column_major = False

    def __init__(
        self,
        matrix: BlockSparseMatrix,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        ops.check_activation(activation)
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.block_shape: BlockShape = matrix.block_shape
        self.activation = activation
        self.weight_values = nn.Parameter(matrix.values.detach())
        self.register_buffer("weight_crow_indices", matrix.crow_indices)
        self.register_buffer("weight_col_indices", matrix.col_indices)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone())
        )
        self._matrix: BlockSparseMatrix | None = None
        self._address = 0

    @classmethod
    def on_meta(
        cls,
        linear: nn.Linear,
        block_shape: BlockShape,
        nnz: int,
        column_major: bool = False,
    ) -> BlockSparseLinear:
        """A layer in place of ``linear`` whose ``nnz`` blocks are still to be loaded.

        The fields are on the meta device; the bias is the one of ``linear`` itself.
        ``column_major``: the values come as ``(nnz, c, r)``, until they are first used.
        """
        rows, cols = block_shape
        layer = cls.__new__(cls)
        super(BlockSparseLinear, layer).__init__()
        layer.out_features, layer.in_features = linear.out_features, linear.in_features
        layer.block_shape = block_shape
        layer.activation = None
        sizes = (nnz, cols, rows) if column_major else (nnz, rows, cols)
        layer.weight_values = nn.Parameter(torch.empty(sizes, device="meta"))
        layer._column_major = column_major
        for name, size in zip(
            FIELDS[1:], (linear.out_features // rows + 1, nnz), strict=True
        ):
            indices = torch.empty(size, dtype=torch.int32, device="meta")
            layer.register_buffer(name, indices)
        layer.register_parameter("bias", linear.bias)
        layer._matrix, layer._address = None, 0
        return layer.train(linear.training)

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
        layer.weight_values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer

    def to_linear(self) -> nn.Linear:
        """The same layer with a dense weight.

        ``ValueError`` when an activation is computed in the layer: ``nn.Linear`` has
        none (``pybsp.nn.unpack_`` gives it back to the module it was taken from).
        """
        if self.activation is not None:
            raise ValueError(
                f"this layer computes {self.activation!r} and nn.Linear does not: call "
                "pybsp.nn.unpack_ on the model, or set layer.activation = None and "
                "apply the activation after it"
            )
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(
            self.weight.detach(), requires_grad=self.weight_values.requires_grad
        )
        if self.bias is not None:
            linear.bias = nn.Parameter(
                self.bias.detach().clone(), requires_grad=self.bias.requires_grad
            )
        linear.pybsp_block_shape = self.block_shape  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not torch.Tensor or torch.compiler.is_compiling():
            shape = (self.out_features, self.in_features)
            return ops.block_sparse_linear_fields(
                x, self.weight_values, self.weight_crow_indices,
                self.weight_col_indices, shape, self.bias, self.activation,
            )  # fmt: skip
        # Straight from the dictionaries: a lookup through nn.Module.__getattr__ costs
        # a third of a microsecond, and a small layer takes five in all.
        parameters, buffers = self._parameters, self._buffers
        values = parameters["weight_values"]
        matrix = self._matrix
        if (
            matrix is None
            or matrix.values is not values
            or matrix.crow_indices is not buffers["weight_crow_indices"]
            or matrix.col_indices is not buffers["weight_col_indices"]
            or self._address != values.data_ptr()
        ):
            matrix = self.matrix
        result: torch.Tensor = ops.block_sparse_linear(
            x, matrix, parameters["bias"], self.activation
        )
        return result

    @property
    def matrix(self) -> BlockSparseMatrix:
        """The weight as a matrix over this module's own tensors; no copy.

        Built once and again whenever a tensor was replaced, moved or loaded.
        """
        matrix, values = self._matrix, self.weight_values
        if (
            matrix is None
            or matrix.values is not values
            or matrix.crow_indices is not self.weight_crow_indices
            or matrix.col_indices is not self.weight_col_indices
            or self._address != values.data_ptr()
        ):
            matrix = self._bind()
        return matrix

    def _bind(self) -> BlockSparseMatrix:
        values = self.weight_values
        if self._column_major:
            values.data, self._column_major = values.data.transpose(1, 2), False
        if isinstance(values, nn.Parameter):
            values.data = ops.column_major_blocks(values.data)
        matrix = BlockSparseMatrix(
            self.weight_crow_indices,
            self.weight_col_indices,
            values,
            (self.out_features, self.in_features),
        )
        self.weight_crow_indices = matrix.crow_indices
        self.weight_col_indices = matrix.col_indices
        self.block_shape = matrix.block_shape
        self._matrix, self._address = matrix, values.data_ptr()
        return matrix

    @property
    def weight(self) -> torch.Tensor:
        """The dense ``(out, in)`` weight, rebuilt on every access."""
        return self.matrix.to_dense()

    @property
    def density(self) -> float:
        """Kept fraction of the weights."""
        total = self.out_features * self.in_features
        return self.weight_values.numel() / total if total else 0.0

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_shape={self.block_shape}, "
            f"density={self.density:.3f}"
        )
        if self.activation is None:
            return text
        return f"{text}, activation={self.activation}"

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseLinear:
        self._matrix = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The matrix holds a native handle; a copy or an unpickled module makes its own.
        return {**self.__dict__, "_matrix": None, "_address": 0}

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        """The dense ``weight`` of an ``nn.Linear``, so that whatever saves this state
        writes a checkpoint that is right without pybsp; ``save_packed`` writes packed
        fields. Only an unloaded layer, on meta, names the fields it waits for."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_values.is_meta:
            return
        for field in FIELDS:
            del destination[prefix + field]
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Load packed fields of any pattern, or a dense ``weight`` with zero blocks."""
        error_messages: list[str] = args[-1]
        try:
            matrix = self._matrix_from_state_dict(state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_messages.append(f"{prefix}weight: {error}")
            return
        if matrix is not None:
            self._resize(matrix)
            state_dict = {k: v for k, v in state_dict.items() if k != f"{prefix}weight"}
            state_dict[f"{prefix}weight_values"] = matrix.values
            state_dict[f"{prefix}weight_crow_indices"] = matrix.crow_indices
            state_dict[f"{prefix}weight_col_indices"] = matrix.col_indices
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._matrix = None

    def _matrix_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str
    ) -> BlockSparseMatrix | None:
        shape = (self.out_features, self.in_features)
        present = [name for name in FIELDS if prefix + name in state_dict]
        dense = state_dict.get(f"{prefix}weight")
        if dense is not None and not present:
            if tuple(dense.shape) != shape:
                raise ValueError(
                    f"the dense weight in the checkpoint is {tuple(dense.shape)} and "
                    f"this layer {shape}"
                )
            return BlockSparseMatrix.from_dense(dense, self.block_shape)
        if not present:
            return None
        if len(present) < len(FIELDS):
            missing = sorted(set(FIELDS) - set(present))
            raise ValueError(
                f"the checkpoint has {', '.join(present)} without {', '.join(missing)}:"
                " save the model again"
            )
        values, crow_indices, col_indices = (state_dict[prefix + key] for key in FIELDS)
        try:
            return BlockSparseMatrix(crow_indices, col_indices, values, shape)
        except ValueError as error:
            raise ValueError(f"{error}: the checkpoint is damaged") from error

    def _resize(self, matrix: BlockSparseMatrix) -> None:
        self.block_shape = matrix.block_shape
        old = self.weight_values
        if old.shape != matrix.values.shape:
            values = torch.empty_like(matrix.values, device=old.device, dtype=old.dtype)
            self.weight_values = nn.Parameter(values, requires_grad=old.requires_grad)
        for name, indices in zip(
            FIELDS[1:], (matrix.crow_indices, matrix.col_indices), strict=True
        ):
            if self._buffers[name].shape != indices.shape:  # type: ignore[union-attr]
                setattr(self, name, torch.empty_like(indices, device=old.device))
