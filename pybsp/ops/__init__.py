"""Native operations on torch tensors; the only importer of the compiled module.

Each has a few-line twin in ``pybsp.reference`` that defines it and that serves tensors
which are not on the CPU. Weights are float32 ``(out, in)``, block shapes ``(r, c)``
divide them, per-block tensors are ``(out/r, in/c)``. The number of threads is
``torch.get_num_threads()``.

``TypeError``: not a float32 tensor. ``ValueError``: a shape that does not fit.
"""

try:
    from .. import _core as _core
except ImportError as error:
    raise ImportError(
        f"the compiled module pybsp._core cannot be imported ({error}); build it with "
        "'pip install .' in the source tree (a C++17 compiler and CMake are needed), "
        "and import the installed package from another directory"
    ) from error

from .linear import (
    bind_pattern,
    block_sparse_linear,
    block_sparse_linear_fields,
    check_activation,
    column_major_blocks,
    int32_indices,
)
from .runtime import (
    active_isa,
    available_isas,
    build_id,
    config,
    cpu_name,
    fma_peak,
    set_active_isa,
    show_config,
    token_tile,
)
from .training import (
    apply_block_mask_,
    block_mask,
    block_norms,
    check_weight,
    group_lasso_grad_,
    group_lasso_prox_,
    reweight,
)

__all__ = [
    "active_isa",
    "apply_block_mask_",
    "available_isas",
    "bind_pattern",
    "block_mask",
    "block_norms",
    "block_sparse_linear",
    "block_sparse_linear_fields",
    "build_id",
    "check_activation",
    "check_weight",
    "column_major_blocks",
    "config",
    "cpu_name",
    "fma_peak",
    "group_lasso_grad_",
    "group_lasso_prox_",
    "int32_indices",
    "reweight",
    "set_active_isa",
    "show_config",
    "token_tile",
]
