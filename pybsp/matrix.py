"""Block-sparse matrices in torch's BSR fields.

A ``BlockSparseMatrix`` of shape ``(out, in)`` and block shape ``(r, c)`` keeps the
blocks that are not zero: ``values`` ``(nnz, r, c)``, ordered by block row and then by
block column, ``col_indices`` ``(nnz,)`` and ``crow_indices`` ``(out/r + 1,)``.

In memory each block lies column by column (strides ``(r*c, 1, r)``): the kernel then
reads the ``r`` weights of one input feature from consecutive addresses, so the storage
format is the execution format and no second copy exists.

The values are float32; bfloat16, half the bytes, which are widened to float32 as they
are multiplied; or int8 with one float32 scale for each output: row ``o`` of the matrix
is then ``scales[o]`` times its whole numbers. The kernels read int8 blocks in an order
of their own, so the matrix holds these twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .blocks import BlockShape, BlockShapeSpec, block_view, resolve_block_shape
from .quantization.weights import Clip, quantize_rows, round_rows
from .reference import block_sparse_to_dense, dequantized_blocks, gather_blocks


class BlockSparseMatrix:
    """A two-dimensional matrix that stores only its nonzero blocks.

    Parameters
    ----------
    crow_indices : int16, int32 or int64 tensor ``(out/r + 1,)``
        Block row ``i`` owns blocks ``crow_indices[i]:crow_indices[i+1]``.
    col_indices : int16, int32 or int64 tensor ``(nnz,)``
        Block column of every block, strictly increasing within a block row.
    values : float32, bfloat16 or int8 tensor ``(nnz, r, c)``
        Kept as it is when its blocks already lie column by column. Only float32 may
        require grad; int8 must not be written to.
    shape : ``(out, in)``
    scales : float32 tensor ``(out,)``, finite and not negative; with int8 values only

    Raises ``ValueError`` or ``TypeError`` when the fields contradict each other.
    """

    __slots__ = ("col_indices", "crow_indices", "pattern", "scales", "shape", "values")

    def __init__(
        self,
        crow_indices: torch.Tensor,
        col_indices: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
        scales: torch.Tensor | None = None,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.crow_indices = ops.int32_indices("crow_indices", crow_indices)
        self.col_indices = ops.int32_indices("col_indices", col_indices)
        self.values = ops.column_major_blocks(values)
        self.scales = None if scales is None else scales.contiguous()
        fields = (self.crow_indices, self.col_indices, self.values, self.shape)
        #: The native call bound to the indices, which must not be written to, and to
        #: the numbers of an int8 matrix.
        self.pattern = (
            ops.bind_pattern(*fields)
            if self.scales is None
            else ops.bind_int8(*fields, self.scales)
        )

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, block_shape: BlockShapeSpec
    ) -> BlockSparseMatrix:
        """Keep the blocks of ``weight`` that have any nonzero element.

        NaN and infinite weights raise ``ValueError``.
        """
        ops.check_weight(weight)
        if not ops.all_finite(weight):
            raise ValueError(
                "weight holds NaN or infinite values; a block-sparse matrix must be "
                "finite: check the checkpoint or the training run that made it"
            )
        shape = resolve_block_shape(block_shape, weight.shape)
        blocks = block_view(weight.detach(), shape)
        mask = (blocks != 0).any(3).any(2)
        return cls.from_mask(weight, mask, shape)

    @classmethod
    def from_mask(
        cls, weight: torch.Tensor, mask: torch.Tensor, block_shape: BlockShape
    ) -> BlockSparseMatrix:
        """Keep the blocks of ``weight`` where the ``(out/r, in/c)`` mask is True."""
        blocks = block_view(weight.detach(), block_shape)
        crow_indices = F.pad(mask.sum(1).cumsum(0), (1, 0))
        row_indices, col_indices = mask.nonzero(as_tuple=True)
        values = blocks.transpose(2, 3)[row_indices, col_indices].transpose(1, 2)
        return cls(
            crow_indices, col_indices, values, (weight.shape[0], weight.shape[1])
        )

    @classmethod
    def from_bsr(cls, tensor: torch.Tensor) -> BlockSparseMatrix:
        """From a two-dimensional ``torch.sparse_bsr`` tensor."""
        if tensor.layout != torch.sparse_bsr or tensor.dim() != 2:
            raise TypeError(
                f"expected a two-dimensional torch.sparse_bsr tensor; got layout "
                f"{tensor.layout} with {tensor.dim()} dimensions"
            )
        return cls(
            tensor.crow_indices().clone(),
            tensor.col_indices().clone(),
            tensor.values(),
            (tensor.shape[0], tensor.shape[1]),
        )

    def to_bsr(self) -> torch.Tensor:
        """As a ``torch.sparse_bsr`` tensor of float32 with contiguous blocks."""
        return torch.sparse_bsr_tensor(
            # Copies: the indices of this matrix have been checked and must not change.
            self.crow_indices.clone(),
            self.col_indices.clone(),
            self._float_values().detach().contiguous(),
            size=self.shape,
            check_invariants=False,  # checked when this matrix was made
        )

    def to_dense(self) -> torch.Tensor:
        """The dense float32 ``(out, in)`` matrix; differentiable in float32 values."""
        return block_sparse_to_dense(
            self.crow_indices, self.col_indices, self._float_values(), self.shape
        )

    def quantize(self, dtype: str = "int8", clip: Clip = "mse") -> BlockSparseMatrix:
        """The same pattern with int8 values and a scale for each output, or with values
        rounded to ``"bfloat16"``, the nearest and of two the even one.

        ``clip`` is for int8, as for ``quantization.weights.quantize_rows``. A matrix of
        that type already is returned as it is.
        """
        if dtype not in ("int8", "bfloat16"):
            raise ValueError(f"dtype must be 'int8' or 'bfloat16'; got {dtype!r}")
        if str(self.dtype) == f"torch.{dtype}":
            return self
        if dtype == "bfloat16":
            exact = self._float_values().detach()
            values = exact.bfloat16()
            lost = exact[values.isinf() & exact.isfinite()]
            if len(lost):
                raise ValueError(
                    "weights must be at most 3.3895e38 in magnitude for bfloat16; got "
                    f"{float(lost[0]):.4e}: keep float32"
                )
            return self._with_values(values)
        quantized, scales = quantize_rows(self.to_dense().detach(), clip)
        return self._with_rows(quantized, scales)

    def quantize_with(self, scales: torch.Tensor) -> BlockSparseMatrix:
        """``quantize`` with scales that are known: finds the very numbers again from
        which ``dequantize`` made this matrix."""
        return self._with_rows(round_rows(self.to_dense().detach(), scales), scales)

    def _with_rows(
        self, quantized: torch.Tensor, scales: torch.Tensor
    ) -> BlockSparseMatrix:
        values = gather_blocks(
            quantized, self.crow_indices, self.col_indices, self.block_shape
        )
        return BlockSparseMatrix(
            self.crow_indices, self.col_indices, values, self.shape, scales
        )

    def dequantize(self) -> BlockSparseMatrix:
        """The same matrix in float32; one that is float32 already as it is."""
        if self.dtype == torch.float32:
            return self
        return self._with_values(self._float_values())

    def _with_values(self, values: torch.Tensor) -> BlockSparseMatrix:
        return BlockSparseMatrix(
            self.crow_indices, self.col_indices, values, self.shape
        )

    def _float_values(self) -> torch.Tensor:
        if self.scales is None:
            return self.values.float()
        return dequantized_blocks(
            self.crow_indices, self.col_indices, self.values, self.scales
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the values: ``torch.float32``, ``torch.bfloat16`` or ``torch.int8``."""
        return self.values.dtype

    @property
    def block_shape(self) -> BlockShape:
        return self.values.shape[1], self.values.shape[2]

    @property
    def nnz(self) -> int:
        """Number of kept blocks."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Kept fraction of the weights."""
        total = self.shape[0] * self.shape[1]
        return self.values.numel() / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and indices, without what is derived from them: a
        schedule, and of an int8 matrix its numbers in the order of the kernels."""
        fields = (self.crow_indices, self.col_indices, self.values, self.scales)
        return sum(field.nbytes for field in fields if field is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        # The pattern is native; a copy or an unpickled matrix binds its own.
        fields = (self.crow_indices, self.col_indices, self.values, self.shape)
        return type(self), (*fields, self.scales)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"BlockSparseMatrix(shape={self.shape}, block_shape={self.block_shape}, "
            f"density={self.density:.3f}, dtype={dtype}, nbytes={self.nbytes})"
        )
