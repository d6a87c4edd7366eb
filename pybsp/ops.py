"""Native operations on torch tensors; the only importer of the compiled module.

Each has a few-line twin in ``pybsp.reference`` that defines it and that serves tensors
which are not on the CPU. Weights are float32 ``(out, in)``, block shapes ``(r, c)``
divide them, per-block tensors are ``(out/r, in/c)``. The number of threads is
``torch.get_num_threads()``.

``TypeError``: not a float32 tensor. ``ValueError``: a shape that does not fit.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _core, reference
from .blocks import BlockShape, grid_shape

_CPU = torch.device("cpu")
_ACTIVATION_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

set_active_isa = _core.set_active_isa
active_isa = _core.active_isa
available_isas = _core.available_isas
build_info = _core.build_info
BlockSparsePattern = _core.BlockSparsePattern

# Fails at import, not in the first layer, when PYBSP_ISA names what cannot run.
active_isa()


# ------------------------------------------------------------------------------ checks


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


def check_activation(activation: str | None) -> None:
    """Refuse the name of an activation that the kernels do not have."""
    if activation not in _ACTIVATION_CODES:
        raise ValueError(
            f"activation must be one of {list(_ACTIVATION_CODES)}; got {activation!r}; "
            "apply other activations to the result"
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


# ------------------------------------------------------------------- training operations


def block_norms(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """Frobenius norm of every block, float32 ``(out/r, in/c)``; not differentiable."""
    check_weight(weight)
    grid = grid_shape(weight.shape, block_shape)
    if not weight.is_cpu:
        return reference.block_norms(weight.detach(), block_shape)
    norms = torch.empty(grid)
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
    return _core.group_lasso_grad(
        grad.detach().numpy(),
        _rows(weight),
        factors.float().contiguous().numpy(),
        lam,
        block_shape,
        torch.get_num_threads(),
    )


def group_lasso_prox_(
    weight: torch.Tensor, thresholds: torch.Tensor, block_shape: BlockShape
) -> torch.Tensor:
    """Block soft-threshold in place: ``W_b *= max(0, 1 - threshold / ||W_b||)``.

    Blocks with ``||W_b|| <= threshold`` become exactly zero. Returns ``weight``. Source:
    Yuan & Lin 2006, the proximal operator of the group Lasso.
    """
    check_weight(weight)
    _per_block(thresholds, weight, block_shape, "thresholds")
    _writable(weight, "weight")
    if not weight.is_cpu:
        return reference.group_lasso_prox_(weight, thresholds, block_shape)
    _core.group_lasso_prox(
        weight.detach().numpy(),
        thresholds.float().contiguous().numpy(),
        block_shape,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version(weight)
    return weight


def block_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Boolean mask, like ``scores``, of exactly the ``keep`` largest.

    Of equal scores the first in row-major order stay. NaN is refused.
    """
    if not 0 <= keep <= scores.numel():
        raise ValueError(
            f"keep must lie between 0 and the {scores.numel()} blocks; got {keep}"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN; blocks cannot be ranked: check the weights")
    if not scores.is_cpu:
        return reference.block_mask(scores, keep)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    flat = scores.detach().float().contiguous().view(-1)
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


# ------------------------------------------------------------------- block-sparse product


def column_major_blocks(values: torch.Tensor) -> torch.Tensor:
    """``values`` ``(nnz, r, c)`` with strides ``(r*c, 1, r)``; itself if it has them."""
    if values.transpose(1, 2).is_contiguous():
        return values
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def bind_pattern(
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
) -> Any:
    """Check the fields of a block-sparse matrix and return the native pattern.

    The pattern keeps the index tensors' memory; they must not be written to.
    """
    if values.dim() != 3:
        raise ValueError(
            f"values must have shape (nnz, r, c); got {tuple(values.shape)}"
        )
    if values.dtype != torch.float32:
        raise TypeError(
            f"values must be float32; got {values.dtype}; call .float() first"
        )
    if values.shape[0] != col_indices.numel():
        raise ValueError(
            f"values holds {values.shape[0]} blocks and col_indices {col_indices.numel()} "
            "entries; they must be equal"
        )
    block_shape = (values.shape[1], values.shape[2])
    return BlockSparsePattern(
        crow_indices.detach().cpu().numpy(), col_indices.detach().cpu().numpy(),
        shape, block_shape,
    )  # fmt: skip


def block_sparse_linear(
    x: Any, W: Any, bias: Any = None, activation: str | None = None
) -> Any:
    """``activation(x @ W.T + bias)`` for a block-sparse ``W``.

    Parameters
    ----------
    x : float32 torch tensor or numpy array ``(..., in)``
    W : ``BlockSparseMatrix`` or two-dimensional ``torch.sparse_bsr`` tensor ``(out, in)``
        The latter is checked and copied on every call.
    bias : ``(out,)`` of the kind of ``x``, or None
    activation : None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``

    Returns ``(..., out)`` of the kind of ``x``. Differentiable in ``x``, ``bias`` and
    ``W.values``; ``W``'s pattern is fixed. Works under ``inference_mode``,
    ``torch.compile`` and ``torch.export``.
    """
    if type(x) is torch.Tensor and not torch.compiler.is_compiling() and x.is_cpu:
        # The eager call without gradients, a few microseconds in all: no dispatcher.
        try:
            values, pattern, (out_features, in_features) = W.values, W.pattern, W.shape
        except AttributeError:
            return block_sparse_linear(x, _Fields(W), bias, activation)
        if x.dtype is torch.float32 and not (
            torch.is_grad_enabled()
            and (
                x.requires_grad
                or values.requires_grad
                or (bias is not None and bias.requires_grad)
            )
        ):
            if x.shape[-1] != in_features or activation not in _ACTIVATION_CODES:
                _check_linear(x, W, bias, activation)
            if bias is not None and (
                bias.shape != (out_features,)
                or bias.dtype is not torch.float32
                or not bias.is_contiguous()
            ):
                bias = _checked_bias(bias, out_features)
            return _multiply(
                pattern, x, values, bias, _ACTIVATION_CODES[activation], out_features
            )
    elif type(x).__module__ == "numpy":
        return _block_sparse_linear_numpy(x, W, bias, activation)
    return _block_sparse_linear_dispatched(x, W, bias, activation)


def _multiply(
    pattern: Any,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    out_features: int,
) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], out_features))
    pattern.multiply(
        values.data_ptr(),
        x.data_ptr(),
        y.numel() // out_features,
        0 if bias is None else bias.data_ptr(),
        activation,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


class _Fields:
    """The fields of a ``torch.sparse_bsr`` tensor, laid out for the kernel."""

    def __init__(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_bsr:
            kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor)
            raise TypeError(
                "W must be a pybsp.BlockSparseMatrix or a torch.sparse_bsr tensor; got "
                f"{kind}; see BlockSparseMatrix.from_dense"
            )
        self.shape = tuple(tensor.shape)
        self.crow_indices = tensor.crow_indices().to(torch.int32)
        self.col_indices = tensor.col_indices().to(torch.int32)
        self.values = column_major_blocks(tensor.values())
        self.pattern = bind_pattern(
            self.crow_indices, self.col_indices, self.values, self.shape
        )


def _check_linear(x: Any, W: Any, bias: Any, activation: str | None) -> None:
    check_activation(activation)
    out_features, in_features = W.shape
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and W {(out_features, in_features)}: the last "
            f"dimension of x must be in = {in_features}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be (out,) = ({out_features},)"
        )


def _checked_bias(bias: torch.Tensor, out_features: int) -> torch.Tensor:
    if tuple(bias.shape) != (out_features,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be (out,) = ({out_features},)"
        )
    if bias.dtype != torch.float32:
        raise TypeError(f"bias must be float32; got {bias.dtype}; call .float() first")
    return bias.contiguous()


def _block_sparse_linear_numpy(
    x: Any, W: Any, bias: Any, activation: str | None
) -> Any:
    import numpy as np

    W = W if hasattr(W, "pattern") else _Fields(W)
    _check_linear(x, W, bias, activation)
    if x.dtype != np.float32:
        raise TypeError(
            f"x must be float32; got {x.dtype}; call .astype('float32') first"
        )
    out_features, in_features = W.shape
    x = np.ascontiguousarray(x)
    y = np.empty((*x.shape[:-1], out_features), np.float32)
    if bias is not None:
        bias = _checked_bias(torch.as_tensor(np.array(bias)), out_features)
    W.pattern.multiply(
        W.values.data_ptr(),
        x.ctypes.data,
        y.size // out_features,
        0 if bias is None else bias.data_ptr(),
        _ACTIVATION_CODES[activation],
        y.ctypes.data,
        torch.get_num_threads(),
    )
    return y


def _block_sparse_linear_dispatched(
    x: Any, W: Any, bias: Any, activation: str | None
) -> Any:
    """Through the operator: autograd, compile, export, other devices, autocast."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"x must be a torch tensor or numpy array; got {type(x).__name__}"
        )
    W = W if hasattr(W, "crow_indices") and not callable(W.crow_indices) else _Fields(W)
    return block_sparse_linear_fields(
        x, W.values, W.crow_indices, W.col_indices, W.shape, bias, activation
    )


def block_sparse_linear_fields(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """``block_sparse_linear`` on the tensors themselves: what compile and export see."""
    check_activation(activation)
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32; got {x.dtype}; call .float() first")
    if values.dtype != torch.float32:
        raise TypeError(
            f"values must be float32; got {values.dtype}; call .float() first"
        )
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and W {tuple(shape)}: the last dimension of x "
            f"must be in = {shape[1]}"
        )
    if bias is not None:
        bias = _checked_bias(bias, shape[0])
    tensors = (x, values, bias)
    fused = not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in tensors
    )
    operator = torch.ops.pybsp.block_sparse_linear
    y = operator(
        x, values, crow_indices, col_indices, bias,
        (activation if fused else None) or "none", shape[0],
    )  # fmt: skip
    return y if fused else reference.ACTIVATIONS[activation](y)


@torch.library.custom_op("pybsp::block_sparse_linear", mutates_args=())
def _block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_features: int,
) -> torch.Tensor:
    name = None if activation == "none" else activation
    shape = (out_features, x.shape[-1])
    if not x.is_cpu:
        return reference.block_sparse_linear(
            x, crow_indices, col_indices, values, shape, bias, name
        )
    values = column_major_blocks(values)
    pattern = bind_pattern(crow_indices, col_indices, values, shape)
    return _multiply(pattern, x, values, bias, _ACTIVATION_CODES[name], out_features)


@_block_sparse_linear.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, crow_indices, col_indices, bias, activation, out_features = inputs
    if activation != "none":
        raise ValueError("gradients need the activation outside of the operator")
    ctx.save_for_backward(x, values, crow_indices, col_indices)
    ctx.shape = (out_features, x.shape[-1])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, values, crow_indices, col_indices = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    rows = grad.reshape(-1, ctx.shape[0])
    if ctx.needs_input_grad[0]:
        weight = reference.block_sparse_to_dense(
            crow_indices, col_indices, values, ctx.shape
        )
        grad_x = grad @ weight
    if ctx.needs_input_grad[1]:
        grad_values = reference.gather_blocks(
            rows.t() @ x.reshape(-1, ctx.shape[1]), crow_indices, col_indices,
            (values.shape[1], values.shape[2]),
        )  # fmt: skip
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    return grad_x, grad_values, None, None, grad_bias, None, None


_block_sparse_linear.register_autograd(_backward, setup_context=_save_for_backward)


def show_config() -> None:
    """Print the instruction sets found and used, the threads and the build."""
    print("\n".join(f"{name:>10}: {value}" for name, value in config().items()))


def config() -> dict[str, str]:
    """What ``show_config`` prints."""
    build = build_info()
    return {
        "pybsp": build["version"],
        "isa": f"{active_isa()} (available: {', '.join(available_isas())}; "
        "PYBSP_ISA forces one)",
        "threads": str(torch.get_num_threads()),
        "compiler": build["compiler"],
        "openmp": str(build["openmp"]),
        "torch": torch.__version__,
    }
