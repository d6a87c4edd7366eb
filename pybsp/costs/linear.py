"""One layer: measured, or predicted where the prediction is clear."""

from __future__ import annotations

import functools
import math

import torch

from .. import ops
from ..blocks import BlockShape
from .cost import Cost
from .measurement import Layers, best_times
from .model import CostModel
from .terms import Call

#: Densities are rounded to this step before measuring: layers that differ less share
#: one measurement.
DENSITY_STEP = 0.025


def linear_cost(
    shape: tuple[int, int],
    block_shape: BlockShape,
    density: float,
    tokens: int = 128,
    activation: str | None = None,
    dtype: str = "float32",
) -> Cost:
    """Time ``x @ W.T + bias`` for one layer, dense and packed, in turn.

    Parameters
    ----------
    shape : ``(out, in)`` of the weight.
    density : kept fraction of the blocks, 0 to 1; rounded to ``DENSITY_STEP``.
    tokens : rows of ``x`` ``(tokens, in)``, at least 1.
    activation : computed by both calls when given.
    dtype : of the packed weights, ``"float32"`` or ``"int8"``; dense ones are float32.

    Measured once per process for each set of arguments and each thread count
    (``torch.get_num_threads()``).
    """
    ops.check_activation(activation)
    call = Call.sparse(tokens, shape, block_shape, density)
    rounded = round(density / DENSITY_STEP) * DENSITY_STEP
    if rounded > 0:
        call = Call.sparse(tokens, shape, block_shape, rounded)
    return _measure(call, activation, dtype, torch.get_num_threads(), ops.active_isa())


def expected_cost(
    shape: tuple[int, int],
    block_shape: BlockShape,
    density: float,
    tokens: int = 128,
    threshold: float = 1.0,
) -> Cost:
    """The cost as ``CostModel`` predicts it, or as ``linear_cost`` measures it.

    It is measured when the predicted gain is so near ``threshold`` that the error of
    the model could put it on the other side.
    """
    model = CostModel.load_or_fit()
    cost = model.predict(tokens, shape, block_shape, density)
    if abs(math.log(cost.gain / threshold)) > math.log1p(model.error):
        return cost
    return linear_cost(shape, block_shape, density, tokens)


@functools.cache
def _measure(
    call: Call,
    activation: str | None,
    dtype: str,
    threads: int,  # noqa: ARG001 (part of the key)
    isa: str,  # noqa: ARG001 (likewise)
) -> Cost:
    layers = Layers()
    dense = Call(call.tokens, call.shape)
    with torch.inference_mode():
        calls = [
            layers.runnable(dense, activation),
            layers.runnable(call, activation, dtype),
        ]
        dense_us, sparse_us = best_times(calls, sweeps=5)
    return Cost(dense_us, sparse_us)
