"""Activations by the number that the kernels know them by."""

from .. import reference

CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}
