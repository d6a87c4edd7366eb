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
#: What an int8 weight has beside them: a scale for each output, and one of the input
#: where that is not found for each token.
SCALES = "weight_scales"
INPUT_SCALE = "input_scale"
ALL_FIELDS = (*FIELDS, SCALES, INPUT_SCALE)


class BlockSparseLinear(nn.Module):
    """``y = activation(x W^T + bias)`` with ``W`` block-sparse.

    Parameters and buffers carry torch's BSR names: ``weight_values`` ``(nnz, r, c)``
    (a parameter, so it is counted and trained), ``weight_crow_indices`` and
    ``weight_col_indices`` (int32 buffers), ``bias`` ``(out,)`` or None. The zero
    pattern is fixed; gradients reach only the kept blocks. To change the pattern
    replace the tensors or call ``load_state_dict``; do not write into the indices.

    Over a bfloat16 matrix ``weight_values`` is a bfloat16 buffer, which is not trained,
    and neither is what ``float()`` makes of it; ``to_linear()`` gives a layer that is.
    Over an int8 matrix it is an int8 buffer, with
    ``weight_scales`` ``(out,)``. ``input_scale`` is then a float32 number, or None
    where each token of ``x`` gets a scale of its own. An int8 layer computes with a
    native copy of these, which a write in place renews, but none through ``.data`` or
    numpy, which torch does not count: replace the tensor instead.
    """

    weight_values: torch.Tensor
    weight_scales: torch.Tensor | None
    input_scale: torch.Tensor | None
    weight_crow_indices: torch.Tensor
    weight_col_indices: torch.Tensor
    bias: nn.Parameter | None
    _column_major = False

    def __init__(
        self,
        matrix: BlockSparseMatrix,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        input_scale: float | None = None,
    ) -> None:
        ops.check_activation(activation)
        if input_scale is not None:
            ops.check_input_scale(input_scale)
            if matrix.scales is None:
                kind = str(matrix.dtype).removeprefix("torch.")
                raise ValueError(f"input_scale is for int8 weights; these are {kind}")
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.block_shape: BlockShape = matrix.block_shape
        self.activation = activation
        if matrix.dtype == torch.float32:
            self.weight_values = nn.Parameter(matrix.values.detach())
        else:
            self.register_buffer("weight_values", matrix.values)
        self.register_buffer("weight_crow_indices", matrix.crow_indices)
        self.register_buffer("weight_col_indices", matrix.col_indices)
        self.register_buffer(SCALES, matrix.scales)
        # Last, because torch.export miscounts buffers that follow a None. Of the input
        # None or 0: a scale for each token.
        scale = (
            torch.tensor(input_scale, device=matrix.values.device)
            if input_scale
            else None
        )
        self.register_buffer(INPUT_SCALE, scale)
        if matrix.scales is not None:
            self._counting_writes()
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone())
        )
        self._matrix: BlockSparseMatrix | None = None
        self._state: tuple[int, ...] = ()
        #: ``input_scale`` as a number, which compiled code takes for a constant.
        self._input_scale = self.static_scale

    @classmethod
    def on_meta(
        cls,
        linear: nn.Linear,
        block_shape: BlockShape,
        nnz: int,
        column_major: bool = False,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
    ) -> BlockSparseLinear:
        """A layer in place of ``linear`` whose ``nnz`` blocks are still to be loaded.

        The fields are on the meta device; the bias is the one of ``linear`` itself.
        ``column_major``: the values come as ``(nnz, c, r)``, until they are first used.
        ``static``: there is an ``input_scale``.
        """
        rows, cols = block_shape
        layer = cls.__new__(cls)
        super(BlockSparseLinear, layer).__init__()
        layer.out_features, layer.in_features = linear.out_features, linear.in_features
        layer.block_shape = block_shape
        layer.activation = None
        sizes = (nnz, cols, rows) if column_major else (nnz, rows, cols)
        values = torch.empty(sizes, device="meta", dtype=dtype)
        scales = input_scale = None
        if dtype == torch.float32:
            layer.weight_values = nn.Parameter(values)
        else:
            layer.register_buffer("weight_values", values)
        if dtype == torch.int8:
            scales = torch.empty(linear.out_features, device="meta")
            input_scale = torch.empty((), device="meta") if static else None
        layer._column_major = column_major
        for name, size in zip(
            FIELDS[1:], (linear.out_features // rows + 1, nnz), strict=True
        ):
            indices = torch.empty(size, dtype=torch.int32, device="meta")
            layer.register_buffer(name, indices)
        layer.register_buffer(SCALES, scales)
        layer.register_buffer(INPUT_SCALE, input_scale)
        layer.register_parameter("bias", linear.bias)
        layer._matrix, layer._state, layer._input_scale = None, (), 0.0
        return layer.train(linear.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_shape: BlockShapeSpec,
        activation: str | None = None,
        dtype: str = "float32",
        input_scale: float | None = None,
    ) -> BlockSparseLinear:
        """Keep the blocks of ``linear.weight`` that are not entirely zero; ``dtype``
        ``"int8"`` quantises them, ``"bfloat16"`` rounds them."""
        matrix = BlockSparseMatrix.from_dense(linear.weight, block_shape)
        if dtype != "float32":
            matrix = matrix.quantize(dtype)
        layer = cls(matrix, linear.bias, activation, input_scale)
        layer.train(linear.training)
        if matrix.dtype == torch.float32:
            layer.weight_values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer

    def quantize(
        self, input_scale: float | None = None, dtype: str = "int8"
    ) -> BlockSparseLinear:
        """The same layer with int8 weights, or bfloat16 ones, and the same bias; one
        that has them already, and no other ``input_scale``, as it is."""
        matrix = self.matrix.quantize(dtype)
        if matrix is self.matrix and input_scale in (None, self.static_scale):
            return self
        layer = type(self)(matrix, None, self.activation, input_scale)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

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
            self.weight.detach(),
            requires_grad=self.weight_values.requires_grad or self.is_rounded,
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
                self.weight_scales, self._input_scale,
            )  # fmt: skip
        # Straight from the dictionaries: a lookup through nn.Module.__getattr__ costs
        # a third of a microsecond, and a small layer takes five in all.
        parameters, buffers = self._parameters, self._buffers
        values = parameters.get("weight_values")
        if values is None:
            matrix = self._matrix
            if matrix is None or not self._is_of(matrix):
                matrix = self._bind()
            result: torch.Tensor = ops.block_sparse_linear(
                x, matrix, parameters["bias"], self.activation,
                input_scale=self._input_scale,
            )  # fmt: skip
            return result
        matrix = self._matrix
        if (
            matrix is None
            or matrix.values is not values
            or matrix.crow_indices is not buffers["weight_crow_indices"]
            or matrix.col_indices is not buffers["weight_col_indices"]
            or self._state[0] != values.data_ptr()
        ):
            matrix = self._bind()
        result = ops.block_sparse_linear(x, matrix, parameters["bias"], self.activation)
        return result

    @property
    def matrix(self) -> BlockSparseMatrix:
        """The weight as a matrix over this module's own tensors; no copy.

        Built once and again whenever a tensor was replaced, moved or loaded, and with
        int8 values when one was written to.
        """
        matrix = self._matrix
        if matrix is None or not self._is_of(matrix):
            matrix = self._bind()
        return matrix

    def _is_of(self, matrix: BlockSparseMatrix) -> bool:
        """Whether ``matrix`` is made of the tensors that are here now."""
        buffers = self._buffers
        values: torch.Tensor | None = self._parameters.get("weight_values")
        if values is None:
            values = buffers["weight_values"]
        return (
            matrix.values is values
            and matrix.crow_indices is buffers["weight_crow_indices"]
            and matrix.col_indices is buffers["weight_col_indices"]
            and matrix.scales is buffers[SCALES]
            and self._state == _state(values, matrix.scales, buffers[INPUT_SCALE])
        )

    def _bind(self) -> BlockSparseMatrix:
        values = self.weight_values
        if not self.is_rounded and not isinstance(values, nn.Parameter):
            # From torch.func.functional_call, for this call: left as it is.
            values = values.transpose(1, 2) if self._column_major else values
            values = ops.column_major_blocks(values)
        elif self._column_major:
            values.data, self._column_major = values.data.transpose(1, 2), False
        if isinstance(values, nn.Parameter):
            values.data = ops.column_major_blocks(values.data)
        elif self.is_rounded:
            self.weight_values = values = ops.column_major_blocks(values)
        if self.weight_scales is not None:
            self.weight_scales = self.weight_scales.contiguous()
            values = self._counting_writes()
        matrix = BlockSparseMatrix(
            self.weight_crow_indices,
            self.weight_col_indices,
            values,
            (self.out_features, self.in_features),
            self.weight_scales,
        )
        self.weight_crow_indices = matrix.crow_indices
        self.weight_col_indices = matrix.col_indices
        self.block_shape = matrix.block_shape
        self._input_scale = self.static_scale
        # Another thread that sees the matrix also sees its state.
        self._state = _state(values, matrix.scales, self.input_scale)
        self._matrix = matrix
        return matrix

    def _counting_writes(self) -> torch.Tensor:
        """The int8 values. Inference tensors count no writes: ordinary ones, that do,
        take their place and that of the scales."""
        with torch.inference_mode(False):
            for name in ("weight_values", SCALES, INPUT_SCALE):
                tensor = self._buffers[name]
                if tensor is not None and tensor.is_inference():
                    setattr(self, name, tensor.clone())
        return self.weight_values

    @property
    def is_int8(self) -> bool:
        """Whether the weights are int8."""
        return self.weight_scales is not None

    @property
    def is_rounded(self) -> bool:
        """Whether the weights were rounded, to int8 or bfloat16, and perhaps widened
        again: a buffer that is not trained."""
        return "weight_values" in self._buffers

    @property
    def dtype(self) -> str:
        """Of the weights: ``"float32"``, ``"bfloat16"`` or ``"int8"``."""
        return str(self.weight_values.dtype).removeprefix("torch.")

    @property
    def static_scale(self) -> float:
        """``input_scale`` as a number; 0 where each token has a scale of its own."""
        if self.input_scale is None:
            return 0.0
        scale = float(self.input_scale)
        ops.check_input_scale(scale)
        return scale

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
        if self.dtype != "float32":
            text += f", dtype={self.dtype}"
        if self.activation is None:
            return text
        return f"{text}, activation={self.activation}"

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseLinear:
        self._matrix = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The matrix holds a native handle; a copy or an unpickled module makes its own.
        return {**self.__dict__, "_matrix": None, "_state": ()}

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        """The dense ``weight`` of an ``nn.Linear``, so that whatever saves this state
        writes a checkpoint that is right without pybsp; ``save_packed`` writes packed
        fields. Only an unloaded layer, on meta, names the fields it waits for."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_values.is_meta:
            return
        for field in ALL_FIELDS:
            destination.pop(prefix + field, None)
        weight = self.weight
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Load packed fields of any pattern, or a dense ``weight`` with zero blocks.
        The layer stays float32, bfloat16 or int8."""
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
            state_dict.pop(f"{prefix}{SCALES}", None)
            if matrix.scales is not None:
                state_dict[f"{prefix}{SCALES}"] = matrix.scales
            # How inputs are rounded belongs to the layer and not to a weight.
            input_scale = state_dict.pop(f"{prefix}{INPUT_SCALE}", self.input_scale)
            if self.is_int8 and input_scale is not None:
                if self.input_scale is None:
                    self.input_scale = torch.empty_like(input_scale)
                state_dict[f"{prefix}{INPUT_SCALE}"] = input_scale
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._matrix = None
        if self.input_scale is not None and not self.input_scale.is_meta:
            try:  # at once: compiled code never looks at the buffer
                self._input_scale = self.static_scale
            except ValueError as error:
                error_messages.append(f"{prefix}{INPUT_SCALE}: {error}")

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
            matrix = BlockSparseMatrix.from_dense(dense, self.block_shape)
            return self._as_own_type(matrix)
        if not present:
            return None
        if len(present) < len(FIELDS):
            missing = sorted(set(FIELDS) - set(present))
            raise ValueError(
                f"the checkpoint has {', '.join(present)} without {', '.join(missing)}:"
                " save the model again"
            )
        values, crow_indices, col_indices = (state_dict[prefix + key] for key in FIELDS)
        scales = state_dict.get(prefix + SCALES)
        try:
            matrix = BlockSparseMatrix(crow_indices, col_indices, values, shape, scales)
        except ValueError as error:
            raise ValueError(f"{error}: the checkpoint is damaged") from error
        return self._as_own_type(matrix)

    def _as_own_type(self, matrix: BlockSparseMatrix) -> BlockSparseMatrix:
        if self.weight_values.dtype == torch.bfloat16 and self.is_rounded:
            return matrix.quantize("bfloat16")
        if self.weight_scales is None:
            return matrix.dequantize()
        if matrix.scales is None and not self.weight_scales.is_meta:
            # What this layer gave away, dense, comes back as it was. Of a layer that
            # lacks columns the largest weight of a row no longer tells its scale.
            same = matrix.quantize_with(self.weight_scales.to(matrix.values.device))
            if torch.equal(same.to_dense(), matrix.to_dense()):
                return same
        return matrix.quantize()

    def _resize(self, matrix: BlockSparseMatrix) -> None:
        self.block_shape = matrix.block_shape
        old = self.weight_values
        if old.shape != matrix.values.shape:
            values = torch.empty_like(matrix.values, device=old.device)
            if self.is_rounded:
                self.weight_values = values
            else:  # the same parameter, which an optimizer may hold
                old.data, old.grad = values, None
        # Always new ones: native patterns, of other layers too, use the old memory.
        for name, indices in zip(
            FIELDS[1:], (matrix.crow_indices, matrix.col_indices), strict=True
        ):
            setattr(self, name, torch.empty_like(indices, device=old.device))


def _state(
    values: torch.Tensor, scales: torch.Tensor | None, input_scale: torch.Tensor | None
) -> tuple[int, ...]:
    """What changes with the tensors that a matrix was made of. The native form of int8
    weights is a copy, which a change in place outdates too."""
    if scales is None:
        return (values.data_ptr(),)
    both = (values.data_ptr(), scales.data_ptr(), _version(values), _version(scales))
    if input_scale is None:
        return both
    return (*both, input_scale.data_ptr(), _version(input_scale))


def _version(tensor: torch.Tensor) -> int:
    # Inference tensors count none.
    return 0 if tensor.is_inference() else tensor._version
