"""Phases of a run in steps, and the steps at which something happens.

Steps are optimizer steps, counted from 0. With ``T`` steps in total and boundaries
``a <= b``: steps ``[0, a)`` warm up, ``[a, b)`` regularise, ``[b, T)`` retrain. The cut
to the target falls between step ``b - 1`` and step ``b``, so whatever is evaluated or
saved after step ``b - 1`` is pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .config import BlockPruningConfig


class Phase(IntEnum):
    """Where a step stands; the numbers are what is logged as ``pybsp/phase``."""

    WARMUP = 0
    REGULARISE = 1
    RETRAIN = 2


@dataclass(frozen=True)
class PruningSchedule:
    """Boundaries and event steps of one run."""

    total_steps: int
    warmup_end: int
    cut_step: int
    reweight_steps: tuple[int, ...]

    @classmethod
    def from_config(cls, cfg: BlockPruningConfig, total_steps: int) -> PruningSchedule:
        """Resolve ``cfg.phases`` and ``cfg.reweight_every`` for a run of this length.

        Every phase with a share above zero gets at least one step, and the factors are
        refreshed at least once when the regularise phase has two steps or more.

        Raises:
            ValueError: when the run is too short for its phases, phases in steps do
                not fit in it, ``reweight_every`` in steps would never fire, or the cut
                comes before any gradient that should rank the blocks.
        """
        warmup_end, cut_step = _boundaries(cfg, total_steps)
        if cut_step == 0 and cfg.saliency != "magnitude":
            raise ValueError(
                f"saliency={cfg.saliency!r} gathers gradients up to the cut, and "
                f"phases {cfg.phases!r} cut before the first step; give the warm-up or "
                "the regularise phase steps, or use saliency='magnitude'"
            )
        length = cut_step - warmup_end
        every = cfg.reweight_every
        if not isinstance(every, int):
            every = max(1, min(round(every * total_steps), length - 1))
        elif every >= length > 1 and cfg.refreshes:
            raise ValueError(
                f"reweight_every = {every} steps never fires within the {length} steps "
                "of the regularise phase; choose a smaller one or a fraction"
            )
        steps = tuple(range(warmup_end + every, cut_step, every))
        return cls(total_steps, warmup_end, cut_step, steps)

    def phase(self, step: int) -> Phase:
        """The phase of ``step``; steps beyond the end still retrain."""
        if step < self.warmup_end:
            return Phase.WARMUP
        return Phase.REGULARISE if step < self.cut_step else Phase.RETRAIN

    def ramp_level(self, step: int) -> float:
        """Share of the target to hold from ``step`` on, ``1 - (1 - t)^3`` with ``t``
        the elapsed share of the regularise phase (Zhu & Gupta 2017, eq. 1)."""
        if step <= self.warmup_end:
            return 0.0 if step < self.cut_step else 1.0
        elapsed = (step - self.warmup_end) / (self.cut_step - self.warmup_end)
        return 1.0 - (1.0 - min(elapsed, 1.0)) ** 3

    def stage_step(self, step: int) -> float:
        """``step`` mapped so that a learning-rate schedule over ``total_steps`` plays
        once before the cut and once again after it."""
        before, after = self.cut_step, self.total_steps - self.cut_step
        if step < before:
            return step * self.total_steps / before
        return (step - before) * self.total_steps / max(after, 1)


def _boundaries(cfg: BlockPruningConfig, total_steps: int) -> tuple[int, int]:
    if (
        not isinstance(total_steps, int)
        or isinstance(total_steps, bool)
        or total_steps < 1
    ):
        raise ValueError(
            "total_steps must be the number of optimizer steps of the run; got "
            f"{total_steps!r}"
        )
    warmup, regularise, _ = cfg.phases
    steps = [phase for phase in cfg.phases if isinstance(phase, int)]
    if len(steps) == 3:
        if sum(steps) > total_steps:
            raise ValueError(
                f"phases {cfg.phases!r} need {sum(steps)} steps, the run has "
                f"{total_steps}; shorten a phase or give fractions"
            )
        return steps[0], steps[0] + steps[1]
    used = [share > 0 for share in cfg.phases]
    if sum(used) > total_steps:
        raise ValueError(
            f"{sum(used)} phases do not fit in {total_steps} steps; train longer"
        )
    least_warmup, least_regularise, least_retrain = (int(u) for u in used)
    warmup_end = min(
        max(round(warmup * total_steps), least_warmup),
        total_steps - least_regularise - least_retrain,
    )
    cut_step = min(
        max(round((warmup + regularise) * total_steps), warmup_end + least_regularise),
        total_steps - least_retrain,
    )
    return warmup_end, cut_step
