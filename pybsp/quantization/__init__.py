"""Int8: how weights and activations are rounded, and how a model gets used to it."""

from .activations import quantize_tokens
from .calibration import calibrate
from .sensitivity import sensitivity
from .training import QuantizationAwareTraining
from .weights import quantize_rows

__all__ = [
    "QuantizationAwareTraining",
    "calibrate",
    "quantize_rows",
    "quantize_tokens",
    "sensitivity",
]
