"""Block-sparse transformers: prune in hardware-friendly blocks, run faster on CPUs."""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

# torch first: its OpenMP runtime is then the one the compiled module shares.
import torch as _torch  # noqa: F401

from . import nn, ops, quantization, reference
from .integrations import register_on_import as _register_on_import
from .matrix import BlockSparseMatrix
from .nn.pack import pack_
from .nn.report import PackReport
from .nn.suggest import BlockShapeReport, suggest_block_shape
from .ops import block_sparse_linear, show_config
from .pruning import (
    BlockPruner,
    BlockPruningConfig,
    preserve_sparsity,
    print_sparsity,
    prune_one_shot,
)
from .quantization import QuantizationAwareTraining

if TYPE_CHECKING:
    from .integrations.distillation import DistillationConfig, Distiller
    from .integrations.quantization import QuantizationCallback
    from .integrations.trainer import BlockPruningCallback
    from .integrations.transformers import save_packed

__version__ = _version("pybsp")

# These need transformers, which takes a second to import: loaded on first use.
_LAZY = {
    "BlockPruningCallback": "pybsp.integrations.trainer",
    "QuantizationCallback": "pybsp.integrations.quantization",
    "DistillationConfig": "pybsp.integrations.distillation",
    "Distiller": "pybsp.integrations.distillation",
    "save_packed": "pybsp.integrations.transformers",
}

__all__ = [
    "BlockPruner",
    "BlockPruningCallback",
    "BlockPruningConfig",
    "BlockShapeReport",
    "BlockSparseMatrix",
    "DistillationConfig",
    "Distiller",
    "PackReport",
    "QuantizationAwareTraining",
    "QuantizationCallback",
    "block_sparse_linear",
    "nn",
    "ops",
    "pack_",
    "preserve_sparsity",
    "print_sparsity",
    "prune_one_shot",
    "quantization",
    "reference",
    "save_packed",
    "show_config",
    "suggest_block_shape",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pybsp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_register_on_import()
