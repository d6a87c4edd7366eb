"""Inference modules."""

from .linear import BlockSparseLinear
from .pack import LayerReport, PackReport, pack_, unpack_

__all__ = ["BlockSparseLinear", "LayerReport", "PackReport", "pack_", "unpack_"]
