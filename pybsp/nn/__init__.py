"""Packed modules, for inference and for training on the kept blocks."""

from .linear import BlockSparseLinear
from .pack import pack_, unpack_
from .report import EncoderReport, LayerReport, PackReport
from .shrink import Removed
from .training import PackedTraining, pack_for_training_

__all__ = [
    "BlockSparseLinear",
    "EncoderReport",
    "LayerReport",
    "PackReport",
    "PackedTraining",
    "Removed",
    "pack_",
    "pack_for_training_",
    "unpack_",
]
