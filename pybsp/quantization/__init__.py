"""Int8: how weights and activations are rounded, and how a model gets used to it."""

from .weights import quantize_rows

__all__ = ["quantize_rows"]
