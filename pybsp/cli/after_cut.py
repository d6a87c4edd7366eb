"""What the model is worth between the cut and the first step of retraining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from .. import ops
from ..integrations.trainer import BlockPruningCallback
from ..pruning import BlockPruner
from .reporting import norm_histogram
from .workspace import Workspace

NORMS, AFTER_CUT = "norms", "after_cut"


class WatchCut(TrainerCallback):
    """Records, in ``workspace``, the scores right after the cut, and how the block
    norms were distributed in the fine-tuned model and just before the cut.

    ``score(model)`` evaluates; it stands between two optimizer steps.
    """

    def __init__(
        self,
        pruning: BlockPruningCallback,
        workspace: Workspace,
        score: Callable[[Any], dict[str, float]],
    ) -> None:
        self.pruning = pruning
        self.workspace = workspace
        self.score = score

    def on_train_begin(self, *event: Any, **details: Any) -> None:
        state, pruner = event[1], self.pruning.pruner
        if not pruner or state.global_step:
            return
        if not pruner.at_target:
            self._record_norms("fine_tuned")
        elif AFTER_CUT not in self.workspace.stages:
            # cut before the first step, by the callback that came before this one
            self._record_norms("after_the_cut")
            self._record_scores(details["model"], state)

    def on_step_begin(self, *event: Any, **_details: Any) -> None:
        pruner = self.pruning.pruner
        if pruner and event[1].global_step == pruner.schedule.cut_step - 1:
            self._record_norms("before_the_cut")

    def on_step_end(self, *event: Any, **kwargs: Any) -> None:
        state, pruner = event[1], self.pruning.pruner
        if pruner and state.global_step == pruner.schedule.cut_step:
            self._record_scores(kwargs["model"], state)

    def _record_scores(self, model: Any, state: Any) -> None:
        found = {
            "scores": self.score(model),
            "step": state.global_step,
            "steps": state.max_steps,
        }
        self.workspace.record(AFTER_CUT, found)

    def _record_norms(self, when: str) -> None:
        pruner = self.pruning.pruner
        assert pruner is not None
        record_norms(self.workspace, pruner, when)


def record_norms(workspace: Workspace, pruner: BlockPruner, when: str) -> None:
    """The histogram of the block norms that the pruner's model has now."""
    norms, sizes = {}, {}
    for name, target in pruner.targets.items():
        weight = pruner.model.get_parameter(f"{name}.weight").detach()
        norms[name] = ops.block_norms(weight, target.block_shape)
        sizes[name] = target.block_size
    known = workspace.stages.get(NORMS, {})
    workspace.record(NORMS, {**known, when: norm_histogram(norms, sizes)})
