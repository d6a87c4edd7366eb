"""How much the loss would change without a block, gathered from gradients.

With ``g`` the gradient of a weight, to first order the loss changes by ``w g`` when the
weight goes, so of a block and over the steps it is

    taylor      running mean of (sum_b w g)^2      Molchanov et al. 2019 (1906.10771)

in units of the loss, whatever the layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..blocks import block_view
from .config import BlockPruningConfig
from .targets import Target

#: Share of the running mean that a step replaces.
RATE = 0.05


class GradientSaliency:
    """Scores ``(out/r, in/c)`` by target name, from the gradients of every step so far;
    none with ``saliency="magnitude"``."""

    def __init__(self, cfg: BlockPruningConfig, targets: Mapping[str, Target]) -> None:
        self.kind = cfg.saliency
        self.targets = targets
        self.scores: dict[str, torch.Tensor] = {}

    def add(self, weights: Mapping[str, torch.Tensor], scale: float) -> None:
        """Take in the gradients of one step, which are scaled by ``scale``."""
        if self.kind == "magnitude":
            return
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            product = (weight.detach() * weight.grad).float() / scale
            sums = block_view(product, self.targets[name].block_shape).sum((2, 3))
            old = self.scores.get(name)
            squares = sums.square_()
            self.scores[name] = squares if old is None else old.lerp(squares, RATE)

    def block_scores(self) -> dict[str, torch.Tensor]:
        """The scores for a ranking of blocks of any size: per weight of a block."""
        return {
            name: score / self.targets[name].block_size
            for name, score in self.scores.items()
        }

    def stop(self) -> None:
        """Drop the scores: the blocks are chosen."""
        self.scores.clear()
