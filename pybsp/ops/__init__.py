"""Native operations on torch tensors; the only importer of the compiled module.

Each has a few-line twin in ``pybsp.reference`` that defines it and that serves tensors
which are not on the CPU. Weights are float32 ``(out, in)``, in training bfloat16 too;
block shapes ``(r, c)`` divide them, per-block tensors are ``(out/r, in/c)``. The number
of threads is ``torch.get_num_threads()``.

``TypeError``: not a tensor of such a type. ``ValueError``: a shape that does not fit.
"""

try:
    from .. import _core as _core
except ImportError as error:
    raise ImportError(
        f"the compiled module pybsp._core cannot be imported ({error}); build it with "
        "'pip install .' in the source tree (a C++17 compiler and CMake are needed), "
        "and import the installed package from another directory"
    ) from error

from .arguments import check_activation
from .encoder import Encoder
from .encoder_spec import (
    AttentionSpec,
    EmbeddingsSpec,
    EncoderSpec,
    FeedForwardSpec,
    LayerSpec,
    LinearSpec,
    NormSpec,
)
from .fields import (
    all_finite,
    bind_int8,
    bind_pattern,
    column_major_blocks,
    int32_indices,
)
from .int8 import check_input_scale
from .linear import block_sparse_linear, block_sparse_linear_fields
from .runtime import (
    active_isa,
    available_isas,
    build_id,
    config,
    cpu_name,
    dot_peak,
    fma_peak,
    l2_cache_bytes,
    max_int8_inputs,
    read_bandwidth,
    set_active_isa,
    show_config,
    tile_peak,
    token_tile,
)
from .tiles import (
    TokenTiles,
    block_sparse_linear_tiles,
    block_sparse_linears,
    pack_tokens,
    unpack_tokens,
)
from .training import (
    TRAINED_DTYPES,
    apply_block_mask_,
    block_mask,
    block_norms,
    check_weight,
    group_lasso_grad_,
    group_lasso_prox_,
    reweight,
)

__all__ = [
    "TRAINED_DTYPES",
    "AttentionSpec",
    "EmbeddingsSpec",
    "Encoder",
    "EncoderSpec",
    "FeedForwardSpec",
    "LayerSpec",
    "LinearSpec",
    "NormSpec",
    "TokenTiles",
    "active_isa",
    "all_finite",
    "apply_block_mask_",
    "available_isas",
    "bind_int8",
    "bind_pattern",
    "block_mask",
    "block_norms",
    "block_sparse_linear",
    "block_sparse_linear_fields",
    "block_sparse_linear_tiles",
    "block_sparse_linears",
    "build_id",
    "check_activation",
    "check_input_scale",
    "check_weight",
    "column_major_blocks",
    "config",
    "cpu_name",
    "dot_peak",
    "fma_peak",
    "group_lasso_grad_",
    "group_lasso_prox_",
    "int32_indices",
    "l2_cache_bytes",
    "max_int8_inputs",
    "pack_tokens",
    "read_bandwidth",
    "reweight",
    "set_active_isa",
    "show_config",
    "tile_peak",
    "token_tile",
    "unpack_tokens",
]
