"""Operations of the training loop: norms, reweighting, penalty, masks.

Weights and gradients are float32 or bfloat16; everything is computed in float32 and
rounded once when it is stored. What is per block (norms, factors, thresholds) is
float32. Rows of a tensor may lie apart; any other layout is copied, and copied back
where it is changed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .. import _core, reference
from ..blocks import BlockShape, grid_shape

#: Element types of weights and gradients in training.
TRAINED_DTYPES = (torch.float32, torch.bfloat16)


def check_weight(
    weight: torch.Tensor,
    name: str = "weight",
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Refuse anything but a dense two-dimensional tensor of one of ``dtypes``."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor; got {type(weight).__name__}")
    if weight.layout != torch.strided:
        raise TypeError(
            f"{name} must be dense; got {weight.layout}; call .to_dense() first"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"{name} must have two dimensions; got shape {tuple(weight.shape)}"
        )
    if weight.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} must be {accepted}; got {weight.dtype}; call .float() first"
        )


def _per_block(
    tensor: torch.Tensor, weight: torch.Tensor, block_shape: BlockShape, name: str
) -> None:
    grid = grid_shape(weight.shape, block_shape)
    if tuple(tensor.shape) != grid:
        raise ValueError(
            f"{name} needs one entry for each block, {grid}; got {tuple(tensor.shape)}"
        )


def _check_changeable(tensor: torch.Tensor, name: str) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad and would be changed in place; call this under "
            "torch.no_grad()"
        )
    rows, cols = tensor.shape
    if (rows > 1 and tensor.stride(0) == 0) or (cols > 1 and tensor.stride(1) == 0):
        raise ValueError(
            f"{name} is changed in place, but its elements share memory (strides "
            f"{tensor.stride()}); call .clone() first"
        )


def _has_contiguous_rows(tensor: torch.Tensor) -> bool:
    rows, cols = tensor.shape
    return (cols <= 1 or tensor.stride(1) == 1) and (
        rows <= 1 or tensor.stride(0) >= cols
    )


def _rows(tensor: torch.Tensor) -> Any:
    """A numpy view, of a copy where rows are not contiguous; bfloat16 as uint16."""
    tensor = tensor.detach()
    if not _has_contiguous_rows(tensor):
        tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


@contextmanager
def _changed_rows(tensor: torch.Tensor) -> Iterator[Any]:
    """``_rows`` of a tensor that the body changes: a copy is written back."""
    tensor = tensor.detach()
    if _has_contiguous_rows(tensor):
        yield _rows(tensor)
    else:
        copy = tensor.contiguous()
        yield _rows(copy)
        tensor.copy_(copy)


def block_norms(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """Frobenius norm of every block, float32 ``(out/r, in/c)``; not differentiable."""
    check_weight(weight, dtypes=TRAINED_DTYPES)
    grid = grid_shape(weight.shape, block_shape)
    if not weight.is_cpu:
        return reference.block_norms(weight.detach(), block_shape)
    norms = np.empty(grid, np.float32)  # half the time of torch.empty(...).numpy()
    _core.block_norms(_rows(weight), block_shape, norms, torch.get_num_threads())
    return torch.from_numpy(norms)


def reweight(norms: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / (norm + eps)`` (Li et al. 2020), float32 of any shape; ``eps > 0``."""
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps}; the paper uses 1e-3")
    if norms.dtype != torch.float32:
        raise TypeError(f"norms must be float32; got {norms.dtype}")
    if not norms.is_cpu:
        return reference.reweight(norms, eps)
    norms = norms.detach().contiguous()
    factors = torch.empty_like(norms)
    _core.reweight(norms.view(-1).numpy(), eps, factors.view(-1).numpy())
    return factors


def group_lasso_grad_(
    grad: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    lam: float,
    block_shape: BlockShape,
) -> float:
    """``grad += lam * factor * W_b / ||W_b||`` in one pass over the weight.

    Returns the penalty ``lam * sum(factor * ||W_b||)``. The gradient of a block that is
    exactly zero is zero. ``grad`` has the weight's dtype and may be the weight itself.
    Source: Li et al. 2020, mixed loss with group-Lasso term.
    """
    check_weight(weight, dtypes=TRAINED_DTYPES)
    check_weight(grad, "grad", dtypes=(weight.dtype,))
    if grad.shape != weight.shape:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and weight {tuple(weight.shape)}; "
            "they must be equal"
        )
    _per_block(factors, weight, block_shape, "factors")
    _check_changeable(grad, "grad")
    if not weight.is_cpu:
        return reference.group_lasso_grad_(
            grad, weight.detach(), factors, lam, block_shape
        )
    with _changed_rows(grad) as changed:
        penalty = _core.group_lasso_grad(
            changed,
            _rows(weight),
            factors.detach().float().contiguous().numpy(),
            lam,
            block_shape,
            torch.get_num_threads(),
        )
    torch.autograd.graph.increment_version(grad)
    return penalty


def group_lasso_prox_(
    weight: torch.Tensor,
    thresholds: torch.Tensor,
    block_shape: BlockShape,
    *,
    step: float = 1.0,
) -> torch.Tensor:
    """Block soft-threshold in place: ``W_b *= max(0, 1 - step * threshold / ||W_b||)``.

    Blocks with ``||W_b|| <= step * threshold`` become exactly zero, blocks with a NaN
    stay NaN. Returns ``weight``.
    Source: Yuan & Lin 2006, the proximal operator of the group Lasso.
    """
    check_weight(weight, dtypes=TRAINED_DTYPES)
    _per_block(thresholds, weight, block_shape, "thresholds")
    _check_changeable(weight, "weight")
    if not weight.is_cpu:
        return reference.group_lasso_prox_(weight, thresholds, block_shape, step=step)
    with _changed_rows(weight) as changed:
        _core.group_lasso_prox(
            changed,
            thresholds.detach().float().contiguous().numpy(),
            step,
            block_shape,
            torch.get_num_threads(),
        )
    torch.autograd.graph.increment_version(weight)
    return weight


def block_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Boolean mask, like ``scores``, of exactly the ``keep`` largest.

    Of equal scores the first in row-major order stay. NaN is refused.
    """
    keep = operator.index(keep)
    if not 0 <= keep <= scores.numel():
        raise ValueError(
            f"keep must lie between 0 and the {scores.numel()} blocks; got {keep}"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN; blocks cannot be ranked: check the weights")
    if not scores.is_cpu or scores.dtype != torch.float32:
        return reference.block_mask(scores, keep)
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    flat = scores.detach().contiguous().view(-1)
    _core.block_mask(flat.numpy(), keep, mask.view(-1).numpy())
    return mask


def apply_block_mask_(
    weight: torch.Tensor, mask: torch.Tensor, block_shape: BlockShape
) -> torch.Tensor:
    """Zero the blocks of ``weight`` whose boolean mask is False; returns ``weight``.

    Memory is written only where something changes.
    """
    check_weight(weight, dtypes=TRAINED_DTYPES)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}")
    _per_block(mask, weight, block_shape, "mask")
    _check_changeable(weight, "weight")
    if not weight.is_cpu:
        return reference.apply_block_mask_(weight, mask, block_shape)
    with _changed_rows(weight) as changed:
        _core.apply_block_mask(
            changed,
            mask.contiguous().numpy(),
            block_shape,
            torch.get_num_threads(),
        )
    torch.autograd.graph.increment_version(weight)
    return weight
