"""Every native operation in a few lines of plain torch.

These definitions are what the kernels are tested against, and they serve tensors that
are not on the CPU. Symbols: a weight ``W`` of shape ``(out, in)`` in blocks ``(r, c)``,
``||W_b||`` the Frobenius norm of block ``b``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .blocks import BlockShape, block_view, expand_blocks

ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def gelu_short(y: torch.Tensor) -> torch.Tensor:
    """GELU with an error under ``5e-6 + 1e-6 max(y, 0)``, of outputs that are rounded
    to 8 bits next: ``max(y, -4.8) (1/2 + z P(2 (z / 4.8)^2 - 1))`` with ``z = y``
    limited to ``[-4.8, 4.8]``."""
    z = y.clamp(-4.8, 4.8)
    t, p = z * z * 0.08680555 - 1, torch.zeros_like(z)
    for coefficient in (1.443781546e-03, -4.195191038e-03, 5.392703822e-03,
                        -7.442357418e-03, 1.386338234e-02, -2.218810766e-02,
                        3.072124054e-02, -4.056583101e-02, 5.290401761e-02,
                        -7.297975620e-02, 1.472127800e-01):  # fmt: skip
        p = p * t + coefficient
    return y.clamp(min=-4.8) * (p * z + 0.5)


#: Inputs of which none reaches this are rounded to zero before an int8 product.
LEAST_INPUT = 2.0**-100


def block_norms(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """``||W_b||`` for every block, shape ``(out/r, in/c)``; float32 for bfloat16."""
    blocks = block_view(_wide(weight), block_shape)
    return blocks.square().sum((2, 3)).sqrt()


def _wide(weight: torch.Tensor) -> torch.Tensor:
    # bfloat16 is computed in float32 and rounded once, where it is stored
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def reweight(norms: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / (||W_b|| + eps)`` (Li et al. 2020)."""
    return 1.0 / (norms + eps)


def group_lasso_grad_(
    grad: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    lam: float,
    block_shape: BlockShape,
) -> float:
    """``grad += lam * factor * W_b / ||W_b||``; returns ``lam * sum(factor ||W_b||)``.

    A block that is exactly zero has gradient zero (the minimum-norm subgradient).
    """
    norms = block_norms(weight, block_shape)
    scale = torch.where(norms > 0, lam * factors / norms, 0.0)
    added = expand_blocks(scale, block_shape) * _wide(weight)
    grad.copy_(_wide(grad) + added)
    return float(lam * (factors.double() * norms.double()).sum())


def group_lasso_prox_(
    weight: torch.Tensor,
    thresholds: torch.Tensor,
    block_shape: BlockShape,
    *,
    step: float = 1.0,
) -> torch.Tensor:
    """``W_b *= max(0, 1 - step * threshold / ||W_b||)``, exactly zero where that is."""
    norms, thresholds = block_norms(weight, block_shape), step * thresholds
    removed = norms <= thresholds
    left = expand_blocks(1.0 - thresholds / norms, block_shape)
    weight.copy_(_wide(weight) * left)
    return weight.masked_fill_(expand_blocks(removed, block_shape), 0.0)


def block_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Mask of the ``keep`` largest scores; of equal ones the first (row-major) stay."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:keep]] = True
    return mask.view(scores.shape)


def apply_block_mask_(
    weight: torch.Tensor, mask: torch.Tensor, block_shape: BlockShape
) -> torch.Tensor:
    """Zero the blocks whose mask is False."""
    return weight.masked_fill_(~expand_blocks(mask, block_shape), 0.0)


def block_row_indices(
    crow_indices: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """The block row of every block, ``(nnz,)``."""
    block_rows = torch.arange(crow_indices.shape[0] - 1, device=crow_indices.device)
    return torch.repeat_interleave(
        block_rows, crow_indices.diff().long(), output_size=col_indices.shape[0]
    )


def block_sparse_to_dense(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """The dense ``(out, in)`` matrix of BSR fields with ``values`` ``(nnz, r, c)``."""
    rows, cols = values.shape[1:]
    row_indices = block_row_indices(crow_indices, col_indices)
    blocks = values.new_zeros(shape[0] // rows, shape[1] // cols, rows, cols)
    blocks = blocks.index_put((row_indices, col_indices.long()), values)
    return blocks.transpose(1, 2).reshape(shape)


def gather_blocks(
    dense: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_shape: BlockShape,
) -> torch.Tensor:
    """The blocks of a dense matrix that a pattern keeps, ``(nnz, r, c)``."""
    row_indices = block_row_indices(crow_indices, col_indices)
    return block_view(dense, block_shape)[row_indices, col_indices.long()]


def block_sparse_linear(
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """``activation(x @ W.T + bias)`` through the dense ``W``; bfloat16 values are
    widened first."""
    weight = block_sparse_to_dense(crow_indices, col_indices, _wide(values), shape)
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def dequantized_blocks(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """``values * scales`` in float32: int8 blocks ``(nnz, r, c)`` and the scale of each
    of the ``out`` rows."""
    row_indices = block_row_indices(crow_indices, col_indices)
    row_scales = scales.view(-1, values.shape[1], 1)
    return values.float() * row_scales[row_indices]


def quantize_tokens(
    x: torch.Tensor, input_scale: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``(..., in)`` as whole numbers of -127 to 127, and the scale ``(..., 1)``.

    ``input_scale`` 0: ``max |x| / 127`` for each token, and zeros with the scale 0 for
    one whose numbers are all below ``LEAST_INPUT``. Else that scale for all tokens, and
    what is beyond ``127 input_scale`` becomes 127. A token with a NaN or an infinity
    has the scale NaN.
    """
    largest = x.abs().amax(-1, keepdim=True)
    if input_scale:
        scale = torch.full_like(largest, input_scale)
        inverse = 1.0 / scale
    else:
        usable, most = largest >= LEAST_INPUT, torch.full_like(largest, 127.0)
        # Of two tensors: a number divided by a tensor is rounded twice.
        scale = torch.where(usable, largest / most, 0.0)
        inverse = torch.where(usable, most / largest, 0.0)
    quantized = (x * inverse).round().clamp(-127.0, 127.0)
    finite = largest.isfinite()
    return torch.where(finite, quantized, 0.0), torch.where(finite, scale, torch.nan)


def block_sparse_linear_int8(
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    input_scale: float = 0.0,
) -> torch.Tensor:
    """``activation((q_x @ q_W.T) * scales * s + bias)`` with ``x ~ q_x s``; no bias is
    one of zeros.

    The sums of products are exact and rounded to float32 once; each operation after
    that is rounded by itself.
    """
    weight = block_sparse_to_dense(crow_indices, col_indices, values, shape)
    quantized, scale = quantize_tokens(x, input_scale)
    # float64 holds every sum of products of bytes. The zero of integers has no sign.
    sums = (quantized.double() @ weight.double().t()).to(torch.int32)
    y = sums.float() * scales * scale
    return ACTIVATIONS[activation](y + (0.0 if bias is None else bias))


def block_sparse_grad_x(
    grad: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """``grad @ W``, the gradient in ``x`` of ``x @ W.T``."""
    return grad @ block_sparse_to_dense(crow_indices, col_indices, values, shape)


def block_sparse_grad_values(
    grad: torch.Tensor,
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    block_shape: BlockShape,
) -> torch.Tensor:
    """``grad.T @ x`` at the kept blocks, ``(nnz, r, c)``."""
    product = grad.flatten(0, -2).t() @ x.flatten(0, -2)
    return gather_blocks(product, crow_indices, col_indices, block_shape)
