"""``BlockPruner``: drives one pruning run from hooks on the optimizer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from . import penalty as penalties
from .config import BlockPruningConfig
from .hooks import StepHooks, gradient_scale, inner_optimizer, learning_rates
from .masks import check_feasible, norm_scores, pools, protected_blocks, select_masks
from .record import record_block_shapes
from .regulariser import Regulariser
from .saliency import GradientSaliency
from .schedule import Phase, PruningSchedule
from .state import STATE_FORMAT, check_state
from .targets import Target, select_targets, unwrap_model

_attached: weakref.WeakKeyDictionary[Optimizer, BlockPruner] = (
    weakref.WeakKeyDictionary()
)


def pruner_of(optimizer: Any) -> BlockPruner | None:
    """The pruner that is attached to ``optimizer``, wrapped or not."""
    return _attached.get(inner_optimizer(optimizer))


class BlockPruner:
    """Prunes ``model`` over ``total_steps`` optimizer steps.

    Warm-up leaves the training alone; the regularise phase adds the penalty of
    ``cfg``; after its last step the blocks are cut to exactly the target; from then on
    gradients and weights are masked. All of it happens around ``optimizer.step()``::

        pruner = BlockPruner(model, cfg, total_steps=N).attach(optimizer)
        ...                       # any training loop of N optimizer steps
        pruner.finalize()

    Weights are looked up by name at every step, so the model may be wrapped or moved
    after construction. Every process of a data-parallel run prunes its own copy; equal
    weights give equal masks. A weight that several linear layers share is pruned once.

    Raises:
        ValueError: for what ``select_targets`` refuses, a target that the cap or the
            block size puts out of reach, or a run too short for its phases. Nothing is
            changed before the checks have passed.
    """

    #: ``pybsp.nn.training``, which lies above this module and puts itself here.
    packing: ClassVar[Any] = None

    def __init__(
        self, model: nn.Module, cfg: BlockPruningConfig, *, total_steps: int
    ) -> None:
        self.model = unwrap_model(model)
        if cfg.packed_retraining:
            self.packing.check_model(model)
        self.cfg = cfg
        self.schedule = PruningSchedule.from_config(cfg, total_steps)
        self.targets: dict[str, Target] = {
            t.name: t for t in select_targets(self.model, cfg)
        }
        self.pools = pools(list(self.targets.values()), cfg)
        for pool in self.pools:
            check_feasible(pool, cfg.max_layer_sparsity)
        self.step = 0
        self.at_target = False
        self._cut_at = self.schedule.cut_step
        self.masks: dict[str, torch.Tensor] = {}
        self.regulariser = Regulariser(cfg, self.targets, self.pools)
        self.saliency = GradientSaliency(cfg, self.targets)
        self._hooks: StepHooks | None = None
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._packed: Any = None

    def attach(self, optimizer: Any) -> BlockPruner:
        """Hook ``optimizer`` (wrapped or not); attaching twice to the same is one.

        Raises:
            ValueError: when another pruner is attached to it, this pruner is attached
                elsewhere, or it does not hold every targeted weight.
        """
        inner = inner_optimizer(optimizer)
        current = _attached.get(inner)
        if current is self:
            return self
        if current is not None:
            raise ValueError(
                "another BlockPruner is attached to this optimizer; detach() it first "
                "(or pass a single BlockPruningCallback)"
            )
        if self._hooks is not None:
            raise ValueError(
                "this BlockPruner is attached to another optimizer; detach() it first"
            )
        held = learning_rates(inner)
        missing = [n for n, w in self._weights().items() if id(w) not in held]
        if missing:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} of the weights to prune, "
                f"such as that of '{missing[0]}'; build it from model.parameters() "
                "after the model has its final form, or exclude these modules"
            )
        if self.cfg.packed_retraining:
            self.packing.check_optimizer(inner)
            self.packing.check_layers(self.model, list(self.targets))
        self._hooks = StepHooks(inner, self._before_step, self._after_step)
        self._optimizer = weakref.ref(inner)
        _attached[inner] = self
        if self.step >= self.schedule.cut_step:
            self.cut()
        self._pack()
        return self

    def detach(self) -> None:
        """Remove the hooks, make packed layers dense; a second call does nothing."""
        if self._packed is not None:
            self._packed.unpack()
            self._packed = None
        if self._hooks is not None:
            self._hooks.remove()
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is not None and _attached.get(optimizer) is self:
            del _attached[optimizer]
        self._hooks = self._optimizer = None

    @property
    def phase(self) -> Phase:
        """The phase of the next step; the last one after a ``cut()`` ahead of time."""
        return Phase.RETRAIN if self.at_target else self.schedule.phase(self.step)

    @property
    def sparsity(self) -> float:
        """Removed fraction of the targeted weights, as the masks have it."""
        total = sum(
            t.weight_shape[0] * t.weight_shape[1] for t in self.targets.values()
        )
        removed = sum(
            (mask.numel() - int(mask.sum())) * self.targets[name].block_size
            for name, mask in self.masks.items()
        )
        return removed / total

    def metrics(self) -> dict[str, float]:
        """Numbers worth logging, with the keys ``pybsp/...``."""
        penalty = strength = 0.0
        if self.phase is Phase.REGULARISE and self.cfg.penalised:
            penalty = self.regulariser.value(self._weights())
            strength = self.regulariser.strength()
        masked_steps = self.step - self._cut_at if self.at_target else 0
        return {
            "pybsp/sparsity": self.sparsity,
            "pybsp/phase": float(self.phase),
            "pybsp/penalty": penalty,
            "pybsp/lambda": strength,
            "pybsp/masked_steps": float(masked_steps),
        }

    @torch.no_grad()
    def cut(self) -> None:
        """Remove blocks down to the target, now; done already, it does nothing.

        Raises:
            ValueError: when a weight became NaN or infinite, or blocks are ranked by
                gradients and no step has given any.
        """
        if not self.at_target:
            self._prune_to(1.0)
            self.at_target, self._cut_at = True, self.step
            self.regulariser.stop()
            self.saliency.stop()
            self._pack()
            self._warn_of_thresholds()

    @torch.no_grad()
    def finalize(self) -> dict[str, Any]:
        """Check the target, record the block shapes, remove the hooks.

        Sets ``pybsp_block_shape`` on every pruned module and, when the model has
        a ``config`` object, its ``quantization_config``. Returns that record. A second
        call returns the same.

        Raises:
            ValueError: when the run ended before the cut, or a block that should be
                zero is not (the weights were replaced or are NaN).
        """
        if not self.at_target:
            raise ValueError(
                f"the run stopped after {self.step} optimizer steps, before the cut at "
                f"step {self.schedule.cut_step}; train on, or call cut() to prune now"
            )
        if self._packed is not None:
            self._packed.unpack()
            self._packed = None
        for name, weight in self._weights().items():
            shape = self.targets[name].block_shape
            norms = penalties.block_norms(weight, shape)
            wrong = int(((norms != 0) & ~self.masks[name]).sum())
            if wrong or not bool(norms.isfinite().all()):
                raise ValueError(
                    f"'{name}' has {wrong or 'NaN'} blocks that should be zero: its "
                    "weight was replaced after the cut; restore a checkpoint of the run"
                )
        record = record_block_shapes(
            self.model, self.targets.values(), self.cfg.block_shape
        )
        self.detach()
        return record

    def state_dict(self) -> dict[str, Any]:
        """Progress, factors and masks; tensors are shared, not copied."""
        return {
            "format": STATE_FORMAT,
            "config": self.cfg.to_dict(),
            "total_steps": self.schedule.total_steps,
            "step": self.step,
            "at_target": self.at_target,
            "strengths": dict(self.regulariser.strengths),
            "factors": dict(self.regulariser.factors),
            "masks": dict(self.masks),
            "saliency": dict(self.saliency.scores),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; load the model's weights separately.

        Raises:
            ValueError: when the state is incomplete or of another configuration, run
                length or model. Nothing is changed then.
        """
        if self._packed is not None:
            raise ValueError(
                "the layers are packed for the retrain phase; detach() first, then "
                "load the weights and this state and attach() again"
            )
        check_state(state, self)
        self.step = int(state["step"])
        self.at_target = bool(state["at_target"])
        self._cut_at = min(self.step, self.schedule.cut_step)
        strengths = state["strengths"].items()
        self.regulariser.strengths = {k: float(v) for k, v in strengths}
        weights = self._weights()
        self.regulariser.factors = {
            name: value.to(weights[name].device, torch.float32)
            for name, value in state["factors"].items()
        }
        self.saliency.scores = {
            name: value.to(weights[name].device, torch.float32)
            for name, value in state["saliency"].items()
        }
        self.masks = {
            name: value.to(weights[name].device, torch.bool)
            for name, value in state["masks"].items()
        }
        self._pack()

    def _pack(self) -> None:
        """Train packed layers from here on, if that is wanted and possible already."""
        optimizer = self._optimizer() if self._optimizer is not None else None
        if not (self.cfg.packed_retraining and self.at_target and optimizer):
            return
        if self._packed is None:
            masks = {
                name: (mask, self.targets[name].block_shape)
                for name, mask in self.masks.items()
            }
            self._packed = self.packing.swap(self.model, optimizer, masks)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {
            name: self.model.get_parameter(f"{name}.weight") for name in self.targets
        }

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._packed is not None:
            return
        weights = self._weights()
        if not self.at_target:
            self.saliency.add(weights, gradient_scale(optimizer))
        if self.phase is Phase.REGULARISE and self.cfg.penalised:
            due = self.step in self.schedule.reweight_steps
            if self.regulariser.in_gradient:
                scale = gradient_scale(optimizer)
                self.regulariser.add_gradients_(weights, scale, due)
            else:
                steps_left = self.schedule.cut_step - self.step
                self.regulariser.refresh(weights, due, steps_left)
        for name, mask in self.masks.items():
            grad = weights[name].grad
            if grad is not None:
                penalties.mask_blocks_(grad, mask, self.targets[name].block_shape)

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.phase is Phase.REGULARISE and self.regulariser.on_weights:
            self.regulariser.shrink_(self._weights(), learning_rates(optimizer))
        if self._packed is None:
            self._mask_weights()
        self.step += 1
        if self.step >= self.schedule.cut_step:
            self.cut()
        elif self._ramps_now():
            self._prune_to(self.schedule.ramp_level(self.step))

    def _ramps_now(self) -> bool:
        due = self.step in self.schedule.reweight_steps
        return self.cfg.ramp == "cubic" and due and not self.at_target

    def _warn_of_thresholds(self) -> None:
        """Thresholds are easily in the wrong unit, and nothing else would tell."""
        kept = blocks = protected = 0
        for name, target in self.targets.items():
            if target.threshold is not None:
                mask = self.masks[name]
                kept += int(mask.sum())
                blocks += mask.numel()
                protected += protected_blocks(mask.numel(), self.cfg.max_layer_sparsity)
        if blocks and kept in (blocks, protected):
            what = "none" if kept == blocks else "all"
            but = f" but {protected}" if kept == protected else ""
            warnings.warn(
                f"the threshold removes {what} of {blocks} blocks{but}; it is in units "
                f"of ranking={self.cfg.ranking!r}",
                stacklevel=2,
            )

    def _mask_weights(self) -> None:
        weights = self._weights() if self.masks else {}
        for name, mask in self.masks.items():
            shape = self.targets[name].block_shape
            penalties.mask_blocks_(weights[name].detach(), mask, shape)

    def _prune_to(self, level: float) -> None:
        norms = self.regulariser.norms(self._weights())
        bad = [name for name, value in norms.items() if not value.isfinite().all()]
        if bad:
            raise ValueError(
                f"the weight of '{bad[0]}' became NaN or infinite in training, so its "
                "blocks cannot be ranked; lower the learning rate or reg_lambda"
            )
        scores = self.saliency.block_scores()
        if not scores and self.cfg.saliency != "magnitude":
            raise ValueError(
                f"saliency={self.cfg.saliency!r} ranks blocks by gradients, and there "
                "are no gradients yet; train before the cut, or use "
                "saliency='magnitude'"
            )
        # what is removed stays so: its score does not move while others fall
        for name, mask in self.masks.items() if scores else ():
            scores[name] = scores[name].masked_fill(~mask, -math.inf)
        scores = scores or norm_scores(norms, self.targets, self.cfg.ranking)
        cap = self.cfg.max_layer_sparsity
        for pool in self.pools:
            self.masks.update(select_masks(scores, pool, cap, level))
        self._mask_weights()
