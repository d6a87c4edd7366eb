"""Feed-forward neurons, put into the order of how much they matter.

The order of the neurons between two linear layers is free, but those that are
neighbours share blocks. With neurons of a kind side by side a block is needed by all of
its rows or by none, and what matters least gathers in blocks that go as a whole: groups
of neurons that ``pack_`` then leaves out.

A neuron matters as its column of the second layer does, alone: the squares of its
weights, each times the gain of its output (see ``sensitivity``), times the variance of
the neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .reconstruction import InputMoments
from .record import count_zero_blocks
from .targets import Target


@dataclass(frozen=True)
class FeedForward:
    """The names of two linear layers with neurons between them, each of ``rows`` rows
    of the first, ``width / rows`` apart, and one column of the second."""

    first: str
    second: str
    rows: int = 1


def _unknown(model: nn.Module) -> Iterable[FeedForward]:
    raise NotImplementedError(f"nothing finds the neurons of {type(model).__name__}")


#: Finds the feed-forward parts into which nothing else sees. ``pybsp.nn.chains``, which
#: lies above this module, puts its own here.
find_feed_forward: Callable[[nn.Module], Iterable[FeedForward]] = _unknown


def order_neurons_(
    model: nn.Module,
    targets: Mapping[str, Target],
    gains: dict[str, torch.Tensor],
    moments: Mapping[str, InputMoments],
) -> None:
    """Put the most important neurons first, in place, in ``model`` and in what is known
    of it: ``gains`` of outputs and ``moments`` of inputs by layer.

    Parts that lost blocks before stay as they are, and so do those of which one layer
    is no target, or whose blocks hold one neuron.
    """
    for part in find_feed_forward(model):
        if not {part.first, part.second} <= targets.keys():
            continue
        first, second = targets[part.first], targets[part.second]
        if first.block_shape[0] == second.block_shape[1] == 1:
            continue
        up, down = model.get_submodule(part.first), model.get_submodule(part.second)
        weights: list[torch.Tensor] = [up.weight, down.weight]  # type: ignore[list-item]
        if any(
            count_zero_blocks(weight, target.block_shape)
            for weight, target in zip(weights, (first, second), strict=True)
        ):
            continue
        seen = moments[part.second]
        variances = seen.covariance(centred=down.bias is not None).diagonal()
        squares = weights[1].detach().double().square()
        importance = (gains[part.second] @ squares) * variances
        order = importance.argsort(descending=True, stable=True)
        rows = torch.cat([order + row * len(order) for row in range(part.rows)])
        with torch.no_grad():
            weights[0].copy_(weights[0][rows])
            if up.bias is not None:
                up.bias.copy_(up.bias[rows])  # type: ignore[operator, index]
            weights[1].copy_(weights[1][:, order])
        gains[part.first] = gains[part.first][rows]
        seen.reorder_(order)
