"""Inference modules."""

from .linear import BlockSparseLinear
from .pack import pack_, unpack_
from .report import LayerReport, PackReport

__all__ = ["BlockSparseLinear", "LayerReport", "PackReport", "pack_", "unpack_"]
