"""The penalty over a run: its factors, its strength, and what it does to a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .. import ops
from . import penalty as penalties
from .config import BlockPruningConfig
from .masks import Pool, norm_scores, select_masks
from .targets import Target

Tensors = Mapping[str, torch.Tensor]


class Regulariser:
    """Factors ``R_b`` of every target, and the three forms of the penalty.

    ``weights`` are the targets' weights by name, as they are at the moment of the call.
    """

    def __init__(
        self,
        cfg: BlockPruningConfig,
        targets: Mapping[str, Target],
        pools: Sequence[Pool],
    ) -> None:
        self.cfg = cfg
        self.targets = targets
        self.pools = pools
        self.factors: dict[str, torch.Tensor] = {}
        #: shrinkage per step of an automatic lambda
        self.strengths: dict[str, float] = {}
        self._last_value = 0.0

    @property
    def in_gradient(self) -> bool:
        """Whether it acts through ``.grad`` rather than on the weights."""
        return self.cfg.penalised and self.cfg.penalty == "gradient"

    @property
    def on_weights(self) -> bool:
        """Whether it acts on the weights after the optimizer has."""
        return self.cfg.penalised and self.cfg.penalty != "gradient"

    def refresh(self, weights: Tensors, due: bool, steps_left: int) -> None:
        """Take the factors from the weights: the first time, and when ``due``."""
        if not self._is_due(due):
            return
        norms = self.norms(weights)
        if self.cfg.reg_lambda == "auto" and not self.strengths:
            self._size_strengths(norms, steps_left)
        self.factors = {
            name: ops.reweight(value, self.cfg.reweight_eps)
            for name, value in norms.items()
        }

    def add_gradients_(self, weights: Tensors, scale: float, due: bool) -> None:
        """Add the gradient to every ``.grad``; those are scaled by ``scale``.

        Factors that are to be taken are taken weight by weight, right before they are
        used: the weight is then still in a cache.
        """
        fresh = self._is_due(due)
        self._last_value = 0.0
        for name, weight in weights.items():
            target = self.targets[name]
            if fresh:
                norms = penalties.block_norms(weight.detach(), target.block_shape)
                self.factors[name] = ops.reweight(norms, self.cfg.reweight_eps)
            if weight.grad is None:
                continue
            self._last_value += penalties.add_gradient_(
                weight.grad,
                weight.detach(),
                self.factors[name],
                penalties.penalty_lambda(self.cfg, target) * scale,
                target.block_shape,
            )
        self._last_value /= scale

    def _is_due(self, due: bool) -> bool:
        return not self.factors or (due and self.cfg.method == "reweighted_group_lasso")

    def shrink_(self, weights: Tensors, rates: Mapping[int, float]) -> None:
        """Take the decoupled or proximal step; ``rates`` are learning rates by id."""
        proximal = self.cfg.penalty == "proximal"
        apply = penalties.proximal_step_ if proximal else penalties.gradient_step_
        for name, weight in weights.items():
            target = self.targets[name]
            step = self.strengths.get(name)
            if step is None:
                step = rates[id(weight)] * penalties.penalty_lambda(self.cfg, target)
            if weight.requires_grad and step > 0:
                apply(weight.detach(), self.factors[name], step, target.block_shape)

    def value(self, weights: Tensors) -> float:
        """The penalty: of the last step in the gradient form, else as of now."""
        if self.in_gradient or not self.factors:
            return self._last_value
        total = 0.0
        for name, norms in self.norms(weights).items():
            lam = self.strengths.get(name)
            if lam is None:
                lam = penalties.penalty_lambda(self.cfg, self.targets[name])
            total += penalties.penalty_value(norms, self.factors[name], lam)
        return total

    def strength(self) -> float:
        """``reg_lambda``, or the mean strength per step when it is automatic."""
        if self.cfg.reg_lambda != "auto":
            return float(self.cfg.reg_lambda)
        return sum(self.strengths.values()) / max(len(self.strengths), 1)

    def norms(self, weights: Tensors) -> dict[str, torch.Tensor]:
        """Block norms ``(out/r, in/c)`` of every target."""
        return {
            name: penalties.block_norms(weight.detach(), self.targets[name].block_shape)
            for name, weight in weights.items()
        }

    def stop(self) -> None:
        """Drop the factors: the penalty has done its work."""
        self.factors.clear()
        self._last_value = 0.0

    def _size_strengths(self, norms: Tensors, steps: int) -> None:
        scores = norm_scores(norms, self.targets, self.cfg.ranking)
        cap = self.cfg.max_layer_sparsity
        for pool in self.pools:
            for name, kept in select_masks(scores, pool, cap).items():
                weak = norms[name][~kept]
                largest = float(weak.max()) if weak.numel() else 0.0
                self.strengths[name] = penalties.automatic_strength(largest, steps)
