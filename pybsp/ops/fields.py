"""The tensors of a block-sparse matrix, checked and bound to the native pattern."""

from __future__ import annotations

from typing import Any

import torch

from .. import _core


def column_major_blocks(values: torch.Tensor) -> torch.Tensor:
    """``values`` with strides ``(r*c, 1, r)``; itself when it already has them."""
    if values.dim() != 3:
        raise ValueError(
            f"values must have shape (nnz, r, c); got {tuple(values.shape)}"
        )
    values = values.resolve_neg()
    if values.transpose(1, 2).is_contiguous():
        return values
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; for float32 and wider."""
    # A sum reads the memory once and allocates nothing, where isfinite makes three
    # temporaries. NaN and infinity reach it; that it overflows by itself is rare.
    tensor = tensor.detach()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def int32_indices(name: str, indices: torch.Tensor) -> torch.Tensor:
    """``indices`` as contiguous int32; an entry that does not fit is refused."""
    if indices.dtype != torch.int32:
        # int16 is how checkpoints store indices that fit in it.
        if indices.dtype not in (torch.int16, torch.int64):
            raise TypeError(
                f"{name} must be integers, int16, int32 or int64; got {indices.dtype}; "
                "call .int() first"
            )
        low, high = (int(v) for v in indices.aminmax()) if indices.numel() else (0, 0)
        if low < 0 or high >= 2**31:
            raise ValueError(
                f"{name} reaches from {low} to {high}, outside of 0 to 2**31 - 1"
            )
    return indices.to(torch.int32).contiguous()


def check_float_values(values: torch.Tensor) -> None:
    """``TypeError`` for values, without scales, of a type that kernels do not take."""
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"values must be float32 or bfloat16; got {values.dtype}; call .float() "
            "first"
        )


def bind_pattern(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
) -> Any:
    """Check the fields of a block-sparse matrix and return the native pattern.

    The pattern keeps the index tensors' memory; they must not be written to. It takes
    values of the type of ``values``, float32 or bfloat16.
    """
    if values.dtype == torch.int8:
        raise TypeError("int8 values need scales, one for each output; got none")
    check_float_values(values)
    bfloat16 = values.dtype == torch.bfloat16
    if bfloat16 and values.requires_grad:
        raise TypeError(
            "bfloat16 values are not trained and these require grad; train in float32: "
            "call .float() first"
        )
    _check_fields(crow_indices, col_indices, values)
    block_shape = (values.shape[1], values.shape[2])
    return _core.BlockSparsePattern(
        crow_indices.detach().cpu().numpy(), col_indices.detach().cpu().numpy(),
        shape, block_shape, bfloat16,
    )  # fmt: skip


def bind_int8(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    scales: torch.Tensor,
) -> Any:
    """Check the fields of an int8 block-sparse matrix and return the native one, which
    keeps a copy of all numbers. ``values`` lie column by column."""
    if values.dtype != torch.int8:
        raise TypeError(
            f"scales belong to int8 values; got {values.dtype}: leave them out"
        )
    if scales.dtype != torch.float32:
        raise TypeError(
            f"scales must be float32; got {scales.dtype}; call .float() first"
        )
    if tuple(scales.shape) != (shape[0],):
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}; it must be (out,) = ({shape[0]},)"
        )
    _check_fields(crow_indices, col_indices, values, scales)
    scales = scales.detach().cpu()
    if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
        raise ValueError(
            "scales must be finite and not negative; they are max |row| / 127 or less"
        )
    block_shape = (values.shape[1], values.shape[2])
    return _core.Int8Matrix(
        crow_indices.detach().cpu().numpy(), col_indices.detach().cpu().numpy(),
        values.detach().cpu().transpose(1, 2).numpy(), scales.numpy(),
        shape, block_shape,
    )  # fmt: skip


def _check_fields(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    *scales: torch.Tensor,
) -> None:
    devices = {t.device for t in (crow_indices, col_indices, values, *scales)}
    if len(devices) > 1:
        raise ValueError(
            "the fields of a matrix must be on one device; got "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    if values.shape[0] != col_indices.numel():
        raise ValueError(
            f"values holds {values.shape[0]} blocks and col_indices "
            f"{col_indices.numel()} entries; they must be equal"
        )
