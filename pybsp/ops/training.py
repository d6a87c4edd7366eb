"""Operations of the training loop: norms, reweighting, penalty, masks."""

from __future__ import annotations

import operator
from typing import Any

import torch

from .. import _core, reference
from ..blocks import BlockShape, grid_shape


def check_weight(weight: torch.Tensor, name: str = "weight") -> None:
    """Refuse anything but a two-dimensional float32 tensor."""
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
    if weight.dtype != torch.float32:
        raise TypeError(
            f"{name} must be float32; got {weight.dtype}; call .float() first"
        )


def _per_block(
    tensor: torch.Tensor, weight: torch.Tensor, block_shape: BlockShape, name: str
) -> None:
    grid = grid_shape(weight.shape, block_shape)
    if tuple(tensor.shape) != grid:
        raise ValueError(
            f"{name} needs one entry for each block, {grid}; got {tuple(tensor.shape)}"
        )


def _writable(tensor: torch.Tensor, name: str) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad and would be changed in place; call this under "
            "torch.no_grad()"
        )
    if tensor.is_cpu and not _has_contiguous_rows(tensor):
        raise ValueError(
            f"{name} is changed in place and needs contiguous rows; got strides "
            f"{tensor.stride()}; call .contiguous() first"
        )


def _has_contiguous_rows(tensor: torch.Tensor) -> bool:
    rows, cols = tensor.shape
    return (cols <= 1 or tensor.stride(1) == 1) and (
        rows <= 1 or tensor.stride(0) >= cols
    )


def _rows(tensor: torch.Tensor) -> Any:
    """A numpy view (a copy only where rows are not contiguous)."""
    tensor = tensor.detach()
    return (tensor if _has_contiguous_rows(tensor) else tensor.contiguous()).numpy()


def block_norms(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """Frobenius norm of every block, float32 ``(out/r, in/c)``; not differentiable."""
    check_weight(weight)
    grid = grid_shape(weight.shape, block_shape)
    if not weight.is_cpu:
        return reference.block_norms(weight.detach(), block_shape)
    norms = torch.empty(grid, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads()
    _core.block_norms(_rows(weight), block_shape, norms.numpy(), threads)
    return norms


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
    exactly zero is zero. Source: Li et al. 2020, mixed loss with group-Lasso term.
    """
    check_weight(weight)
    check_weight(grad, "grad")
    if grad.shape != weight.shape:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and weight {tuple(weight.shape)}; "
            "they must be equal"
        )
    _per_block(factors, weight, block_shape, "factors")
    _writable(grad, "grad")
    if not weight.is_cpu:
        return reference.group_lasso_grad_(
            grad, weight.detach(), factors, lam, block_shape
        )
    penalty = _core.group_lasso_grad(
        grad.detach().numpy(),
        _rows(weight),
        factors.detach().float().contiguous().numpy(),
        lam,
        block_shape,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(grad)
    return penalty


def group_lasso_prox_(
    weight: torch.Tensor, thresholds: torch.Tensor, block_shape: BlockShape
) -> torch.Tensor:
    """Block soft-threshold in place: ``W_b *= max(0, 1 - threshold / ||W_b||)``.

    Blocks with ``||W_b|| <= threshold`` become exactly zero, blocks with a NaN stay
    NaN. Returns ``weight``.
    Source: Yuan & Lin 2006, the proximal operator of the group Lasso.
    """
    check_weight(weight)
    _per_block(thresholds, weight, block_shape, "thresholds")
    _writable(weight, "weight")
    if not weight.is_cpu:
        return reference.group_lasso_prox_(weight, thresholds, block_shape)
    _core.group_lasso_prox(
        weight.detach().numpy(),
        thresholds.detach().float().contiguous().numpy(),
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
    """Zero the blocks of ``weight`` whose boolean mask is False; returns ``weight``."""
    check_weight(weight)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}")
    _per_block(mask, weight, block_shape, "mask")
    _writable(weight, "weight")
    if not weight.is_cpu:
        return reference.apply_block_mask_(weight, mask, block_shape)
    _core.apply_block_mask(
        weight.detach().numpy(),
        mask.contiguous().numpy(),
        block_shape,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(weight)
    return weight
