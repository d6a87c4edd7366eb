"""The (reweighted) group-Lasso penalty and its three ways into an update.

For a weight ``W`` in blocks ``W_b`` with factors ``R_b`` (Li et al. 2020)::

    P(W) = lambda * sum_b R_b ||W_b||      R_b = 1 / (||W_b|| + eps), held constant

    gradient     g   += lambda R_b W_b / ||W_b||              before the optimizer step
    decoupled    W_b -= lr lambda R_b W_b / ||W_b||           after it
    proximal     W_b *= max(0, 1 - lr lambda R_b / ||W_b||)   after it

The first is the gradient of a loss term. Under Adam it is rescaled like any gradient,
so it drives weights by up to ``lr`` a step wherever it outweighs the loss. The others
move a block by ``lr * lambda * R_b`` whatever the optimizer, as AdamW does with weight
decay; only the proximal step (the exact minimiser of the penalty plus half the squared
distance) arrives at exact zeros and cannot overshoot.
"""

from __future__ import annotations

import math

import torch

from .. import ops
from ..blocks import BlockShape
from .config import BlockPruningConfig
from .targets import Target


def penalty_lambda(cfg: BlockPruningConfig, target: Target) -> float:
    """Lambda of one layer: ``reg_lambda``, times ``sqrt(r c)`` when the config says so
    (the group-size factor of Yuan & Lin 2006)."""
    if cfg.reg_lambda == "auto":
        raise ValueError(
            "an automatic lambda comes from the norms: see automatic_strength"
        )
    scaled = cfg.lambda_scaling == "sqrt_block_size"
    return cfg.reg_lambda * (math.sqrt(target.block_size) if scaled else 1.0)


def automatic_strength(norm: float, steps: int) -> float:
    """The shrinkage per step that empties a block of this norm in ``steps`` steps.

    While its factor follows its norm ``n``, a block shrinks by ``s / (n + eps)`` a
    step, so ``n^2 / 2`` falls by ``s``: blocks below ``norm`` are gone after ``steps``
    steps when ``s = norm^2 / (2 steps)``, unless the loss holds them. It stands in for
    ``lr * lambda``; the learning rate does not enter.
    """
    return norm * norm / (2.0 * max(steps, 1))


def penalty_value(norms: torch.Tensor, factors: torch.Tensor, lam: float) -> float:
    """``lambda * sum_b R_b ||W_b||``."""
    return lam * float((norms.double() * factors.double()).sum())


def add_gradient_(
    grad: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    lam: float,
    block_shape: BlockShape,
) -> float:
    """Add the penalty's gradient to ``grad`` in place; returns the penalty."""
    return ops.group_lasso_grad_(grad, weight, factors, lam, block_shape)


def gradient_step_(
    weight: torch.Tensor, factors: torch.Tensor, step: float, block_shape: BlockShape
) -> None:
    """``W_b -= step * R_b * W_b / ||W_b||`` with ``step = lr * lambda``.

    The plain gradient step: it overshoots a block whose norm is below ``step * R_b``.
    """
    ops.group_lasso_grad_(weight, weight, factors, -step, block_shape)


def proximal_step_(
    weight: torch.Tensor, factors: torch.Tensor, step: float, block_shape: BlockShape
) -> None:
    """Block soft-threshold with thresholds ``step * R_b``, ``step = lr * lambda``."""
    ops.group_lasso_prox_(weight, factors, block_shape, step=step)


def block_norms(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """Block norms of a weight in any memory layout."""
    return ops.block_norms(weight, block_shape)


def mask_blocks_(
    tensor: torch.Tensor, mask: torch.Tensor, block_shape: BlockShape
) -> None:
    """Zero the blocks of ``tensor`` whose mask is False, in any memory layout."""
    ops.apply_block_mask_(tensor, mask, block_shape)
