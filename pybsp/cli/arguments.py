"""Types of command-line options; a bad value is wrong usage, told in one line."""

from __future__ import annotations

import argparse
import math
from typing import Literal

from ..blocks import BlockShapeSpec, parse_block_shape


def positive_int(text: str) -> int:
    """A whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number above 0; got {text!r}"
        )
    return value


def positive_ints(text: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas; each is taken once."""
    return tuple(dict.fromkeys(positive_int(part) for part in text.split(",")))


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def nonnegative_number(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number >= 0; got {text!r}")
    return value


def fraction(text: str) -> float:
    """A number strictly between 0 and 1, or 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a fraction above 0 and at most 1, 0.8 for 80 %; got {text!r}"
        )
    return value


def cuts(text: str) -> tuple[float, ...]:
    """``none``, or fractions below 1 separated by commas."""
    if text == "none":
        return ()
    values = tuple(_number(part) for part in text.split(","))
    if not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"must be 'none' or fractions such as 0.8,0.9; got {text!r}"
        )
    return values


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1; got {text!r}")
    return value


def fractions(text: str) -> tuple[float, ...]:
    """Three comma-separated numbers; the configuration checks their sum."""
    values = tuple(_number(part) for part in text.split(","))
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(
            f"must be three numbers such as 0.1,0.5,0.4; got {text!r}"
        )
    return values


def lambda_value(text: str) -> float | Literal["auto"]:
    """``auto`` or a number of at least 0."""
    if text == "auto":
        return "auto"
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be 'auto' or at least 0; got {text!r}")
    return value


def block_shape(text: str) -> BlockShapeSpec:
    """``8,1``, ``16x4`` or ``1,in/8``."""
    try:
        return parse_block_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
