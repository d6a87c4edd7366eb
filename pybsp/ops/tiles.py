"""Products on activations that stay transposed, tokens in SIMD lanes, between them.

The kernels work on tiles of tokens; row-major activations are transposed on the way in
and out. Matrices that share an input (query, key, value) share one transposition, and a
chain of layers can stay in tiles. For inference: nothing here is recorded by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _core
from .arguments import (
    check_activation,
    checked_bias,
    checked_residual,
    refuse_tangents,
)
from .codes import CODES
from .linear import block_sparse_linear


@dataclass(frozen=True)
class TokenTiles:
    """Activations ``shape`` = ``(..., features)`` in the layout of one instruction set.

    ``data`` is flat float32: tiles of up to ``max_vectors`` vectors of tokens, each
    ``[feature][token]``. Made by ``pack_tokens``, read by ``unpack_tokens``.
    """

    data: torch.Tensor
    shape: tuple[int, ...]
    isa: str

    @property
    def features(self) -> int:
        return self.shape[-1]

    @property
    def tokens(self) -> int:
        return _tokens(self.shape)


def pack_tokens(x: torch.Tensor) -> TokenTiles:
    """Transpose float32 ``(..., features)`` on the CPU into tiles."""
    _check_input(x)
    x = x.detach().contiguous().resolve_neg()
    tiles = _empty_tiles(tuple(x.shape))
    _core.pack_tiles(
        x.data_ptr(), tiles.tokens, tiles.features, tiles.data.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return tiles


def unpack_tokens(tiles: TokenTiles) -> torch.Tensor:
    """The row-major tensor ``tiles.shape`` that the tiles hold."""
    _check_tiles("tiles", tiles)
    y = torch.empty(tiles.shape, dtype=torch.float32, device="cpu")
    _core.unpack_tiles(
        tiles.data.data_ptr(), tiles.tokens, tiles.features, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def block_sparse_linear_tiles(
    tiles: TokenTiles,
    W: Any,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: TokenTiles | None = None,
    out: TokenTiles | None = None,
) -> TokenTiles:
    """``block_sparse_linear`` from tiles ``(..., in)`` to tiles ``(..., out)``.

    ``W`` is a ``BlockSparseMatrix``; ``residual`` and ``out``, whose memory is reused,
    are tiles of the result's shape and may be the same.
    """
    _check_tiles("tiles", tiles)
    check_activation(activation)
    if not hasattr(W, "pattern") or not W.values.is_cpu:
        place = f" on {W.values.device}" if hasattr(W, "pattern") else ""
        raise TypeError(
            "W must be a pybsp.BlockSparseMatrix on the CPU; got "
            f"{type(W).__name__}{place}"
        )
    if W.values.dtype is torch.int8:
        raise TypeError(
            "tiles hold float32 and W int8; use block_sparse_linear, or W.dequantize()"
        )
    shape = (*tiles.shape[:-1], W.shape[0])
    if tiles.features != W.shape[1]:
        raise ValueError(
            f"tiles hold {tiles.features} features and W is {tuple(W.shape)}; they "
            f"must hold in = {W.shape[1]}"
        )
    for name, other in (("residual", residual), ("out", out)):
        if other is not None:
            _check_tiles(name, other)
            if other.shape != shape:
                raise ValueError(
                    f"{name} holds {other.shape}; it must be that of the result, "
                    f"{shape}"
                )
    if (
        out is not None
        and tiles.tokens
        and out.data.data_ptr() == tiles.data.data_ptr()
    ):
        raise ValueError(
            "out is the input and would be overwritten while it is read; give other "
            "tiles"
        )
    result = _empty_tiles(shape) if out is None else out
    if bias is not None:
        bias = checked_bias(bias.detach(), W.shape[0])
    residual_address = 0 if residual is None else residual.data.data_ptr()
    product = (
        W.pattern, W.values.data_ptr(), 0 if bias is None else bias.data_ptr(),
        CODES[activation], residual_address, result.data.data_ptr(),
    )  # fmt: skip
    _core.multiply_many(
        [product], tiles.data.data_ptr(), tiles.tokens, True, torch.get_num_threads()
    )
    return result


def block_sparse_linears(
    x: torch.Tensor,
    matrices: Sequence[Any],
    biases: Sequence[torch.Tensor | None] | None = None,
    activations: Sequence[str | None] | None = None,
    residuals: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """``[block_sparse_linear(x, W, ...) for W in matrices]``, transposing ``x`` once.

    For matrices that read the same input, such as query, key and value. Results are
    equal to those of the single calls. Where a gradient is wanted, or an operator has
    to be seen (``torch.compile``), the single calls are made.
    """
    count = len(matrices)
    per_matrix = (biases, activations, residuals)
    for name, values in zip(
        ("biases", "activations", "residuals"), per_matrix, strict=True
    ):
        if values is not None and len(values) != count:
            raise ValueError(
                f"{name} has {len(values)} entries for {count} matrices; give one for "
                "each, None where there is none"
            )
    calls = list(zip(matrices, *(v or [None] * count for v in per_matrix), strict=True))
    if not _plain(x, calls):
        return [block_sparse_linear(x, *call) for call in calls]
    x = x.contiguous()
    results, products, kept = [], [], []
    for W, bias, activation, residual in calls:
        y = x.new_empty((*x.shape[:-1], W.shape[0]))
        bias = None if bias is None else checked_bias(bias, W.shape[0])
        if residual is not None:
            residual = checked_residual(residual, tuple(y.shape))
        check_activation(activation)
        if x.shape[-1] != W.shape[1]:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and W {tuple(W.shape)}: the last "
                f"dimension of x must be in = {W.shape[1]}"
            )
        results.append(y)
        kept.append((bias, residual))  # contiguous copies must outlive the call
        products.append((
            W.pattern, W.values.data_ptr(), 0 if bias is None else bias.data_ptr(),
            CODES[activation], 0 if residual is None else residual.data_ptr(),
            y.data_ptr(),
        ))  # fmt: skip
    _core.multiply_many(
        products, x.data_ptr(), _tokens(x.shape), False, torch.get_num_threads()
    )
    return results


def _plain(x: Any, calls: list[tuple[Any, ...]]) -> bool:
    """Whether the products of ``x`` can be one native call."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not calls:
        return False
    if type(x) is not torch.Tensor or not x.is_cpu or x.is_neg() or x.dim() == 0:
        return False
    if x.dtype != torch.float32 or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    for W, *_ in calls:
        if not hasattr(W, "pattern") or not W.values.is_cpu:
            return False
        if W.values.dtype is torch.int8:
            return False
    tensors = [x]
    for W, bias, _, residual in calls:
        added = [t for t in (bias, residual) if t is not None]
        # The single calls take or refuse what is not a tensor with memory of its own.
        if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in added):
            return False
        tensors += [W.values, *added]
    wanted = any(getattr(t, "requires_grad", False) for t in tensors)
    return not (torch.is_grad_enabled() and wanted)


def _tokens(shape: Sequence[int]) -> int:
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    return tokens


def _empty_tiles(shape: tuple[int, ...]) -> TokenTiles:
    floats = _core.tile_lanes(_tokens(shape)) * shape[-1]
    data = torch.empty(floats, dtype=torch.float32, device="cpu")
    return TokenTiles(data, shape, _core.active_isa())


def _check_input(x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch tensor; got {type(x).__name__}")
    if x.dim() == 0 or x.dtype != torch.float32 or not x.is_cpu:
        raise TypeError(
            f"x must be a float32 tensor (..., features) on the CPU; got {x.dtype} "
            f"{tuple(x.shape)} on {x.device}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "tiles carry no gradient and x requires one; call this under "
            "torch.no_grad(), or use block_sparse_linear"
        )
    refuse_tangents(x=x)


def _check_tiles(name: str, tiles: Any) -> None:
    if not isinstance(tiles, TokenTiles):
        raise TypeError(
            f"{name} must be TokenTiles; got {type(tiles).__name__}; see pack_tokens"
        )
    if tiles.isa != _core.active_isa():
        raise ValueError(
            f"these tiles are laid out for {tiles.isa} and {_core.active_isa()} is in "
            "use; pack the tokens again"
        )
    data, floats = tiles.data, _core.tile_lanes(tiles.tokens) * tiles.features
    if (
        data.shape != (floats,)
        or data.dtype != torch.float32
        or not data.is_cpu
        or not data.is_contiguous()
    ):
        raise ValueError(
            f"{name} of {tiles.shape} need {floats} contiguous floats on the CPU; got "
            f"{data.dtype} {tuple(data.shape)} on {data.device}; see pack_tokens"
        )
