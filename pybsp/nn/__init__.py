"""Inference modules."""

from .linear import BlockSparseLinear

__all__ = ["BlockSparseLinear"]
