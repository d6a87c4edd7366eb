"""What a call is given beside its matrix, checked and as the kernels read it."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from .codes import CODES

# Global names: an attribute of torch costs a twentieth of a microsecond a look-up.
_cpu = torch.device("cpu")
_float32 = torch.float32
_is_compiling = torch.compiler.is_compiling


def check_activation(activation: str | None) -> None:
    """Refuse the name of an activation that the kernels do not have."""
    if activation not in CODES:
        raise ValueError(
            f"activation must be one of {list(CODES)}; got {activation!r}; "
            "apply other activations to the result"
        )


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as float32 where autocast is on: the kernels have no other type."""
    if tensor.dtype is _float32 or tensor.is_meta:
        return tensor
    return tensor.float() if torch.is_autocast_enabled(tensor.device.type) else tensor


def refuse_tangents(**tensors: torch.Tensor | None) -> None:
    """The kernels have no forward-mode derivative; a tangent would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"block_sparse_linear has no forward-mode derivative and {name} "
                "carries a tangent; use reverse mode, or W.to_dense()"
            )


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its elements in memory as they are; what is compiled sees to
    negative views by itself."""
    tensor = tensor.contiguous()
    if _is_compiling() or not tensor.is_neg():
        return tensor
    return torch.resolve_neg(tensor)


def checked_bias(bias: Any, out_features: int, device: Any = _cpu) -> torch.Tensor:
    if not isinstance(bias, torch.Tensor):
        raise TypeError(
            f"bias must be of the kind of x, a torch tensor; got {type(bias).__name__}"
        )
    if bias.shape != (out_features,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be (out,) = ({out_features},)"
        )
    bias = autocast(bias)
    if bias.dtype is not _float32:
        raise TypeError(f"bias must be float32; got {bias.dtype}; call .float() first")
    if bias.device != device:
        raise ValueError(
            f"bias is on {bias.device} and x on {device}; move one of them"
        )
    return _readable(bias)


def checked_residual(
    residual: Any, shape: tuple[int, ...], device: Any = _cpu
) -> torch.Tensor:
    """``residual`` as the contiguous float32 tensor that the kernel adds."""
    if not isinstance(residual, torch.Tensor):
        raise TypeError(
            "residual must be of the kind of x, a torch tensor; got "
            f"{type(residual).__name__}"
        )
    if residual.shape != shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; it must be that of the "
            f"result, {tuple(shape)}"
        )
    residual = autocast(residual)
    if residual.dtype is not _float32:
        raise TypeError(
            f"residual must be float32; got {residual.dtype}; call .float() first"
        )
    if residual.device != device:
        raise ValueError(
            f"residual is on {residual.device} and x on {device}; move one of them"
        )
    return _readable(residual)


def operands(
    x: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x`` and ``bias`` of an operator, whose callers may have checked nothing: an
    exported graph calls it without the functions around it."""
    x = autocast(plain(x))
    check_float32(x=x)
    return x, None if bias is None else checked_bias(plain(bias), out_features)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The caller's may be a parameter or of a class of its own."""
    return tensor.detach().as_subclass(torch.Tensor).resolve_neg()


def check_float32(**tensors: torch.Tensor) -> None:
    """Refuse what a kernel, which is given an address, would misread."""
    check_cpu(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype is not _float32:
            raise TypeError(
                f"{name} must be float32; got {tensor.dtype}; call .float() first"
            )


def check_cpu(**tensors: torch.Tensor) -> None:
    """Refuse memory that is not the CPU's."""
    for name, tensor in tensors.items():
        if not tensor.is_cpu:
            raise ValueError(
                f"{name} is on {tensor.device} and the rest on the CPU; move one of "
                "them"
            )
