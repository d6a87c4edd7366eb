"""Phases in steps; refreshes that fire in runs of every length."""

from __future__ import annotations

from typing import Any

import pytest

from pybsp import BlockPruningConfig
from pybsp.pruning.schedule import Phase, PruningSchedule

LENGTHS = [*range(3, 60), 100, 345, 999, 1000, 10_000]


@pytest.mark.parametrize("total", LENGTHS)
@pytest.mark.parametrize(
    "phases", [(0.1, 0.5, 0.4), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.9, 0.1), (0.3, 0.7, 0.0)]
)
def test_every_phase_happens_and_the_factors_are_refreshed(
    total: int, phases: tuple[float, float, float]
) -> None:
    cfg = BlockPruningConfig(phases=phases)
    schedule = PruningSchedule.from_config(cfg, total)
    seen = [schedule.phase(step) for step in range(total)]
    assert seen == sorted(seen)
    expected = {phase for phase, share in zip(Phase, phases, strict=True) if share > 0}
    assert set(seen) == expected
    length = seen.count(Phase.REGULARISE)
    for phase, share in zip(Phase, phases, strict=True):
        assert abs(seen.count(phase) - share * total) <= 2
    refreshes = schedule.reweight_steps
    assert all(seen[step] is Phase.REGULARISE for step in refreshes)
    assert bool(refreshes) == (length > 1)


def test_refreshes_keep_their_distance() -> None:
    schedule = PruningSchedule.from_config(BlockPruningConfig(), 1000)
    assert (schedule.warmup_end, schedule.cut_step) == (100, 600)
    assert schedule.reweight_steps == tuple(range(150, 600, 50))


def test_phases_and_refreshes_in_steps() -> None:
    cfg = BlockPruningConfig(phases=(5, 10, 5), reweight_every=4)
    schedule = PruningSchedule.from_config(cfg, 25)
    assert (schedule.warmup_end, schedule.cut_step) == (5, 15)
    assert schedule.reweight_steps == (9, 13)
    assert schedule.phase(24) is Phase.RETRAIN


@pytest.mark.parametrize("phases", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.0, 1, 0)])
def test_whole_numbers_that_sum_to_one_are_fractions(
    phases: tuple[float, float, float],
) -> None:
    cfg = BlockPruningConfig(phases=phases, method="magnitude")
    schedule = PruningSchedule.from_config(cfg, 20)
    seen = [schedule.phase(step) for step in range(20)]
    assert seen == [Phase(phases.index(1))] * 20


def test_a_share_is_not_compared_with_steps() -> None:
    cfg = BlockPruningConfig(phases=(0, 1, 0.0), reweight_every=5)
    assert PruningSchedule.from_config(cfg, 20).reweight_steps == (5, 10, 15)


def test_ramp_is_cubic() -> None:
    schedule = PruningSchedule.from_config(BlockPruningConfig(), 1000)
    assert schedule.ramp_level(100) == 0.0
    assert schedule.ramp_level(350) == pytest.approx(1 - 0.5**3)
    assert schedule.ramp_level(600) == 1.0
    assert schedule.ramp_level(900) == 1.0
    levels = [schedule.ramp_level(step) for step in range(1000)]
    assert levels == sorted(levels)


def test_two_stages_play_the_schedule_twice() -> None:
    schedule = PruningSchedule.from_config(BlockPruningConfig(), 1000)
    assert schedule.stage_step(0) == 0
    assert schedule.stage_step(300) == 500
    assert schedule.stage_step(600) == 0
    assert schedule.stage_step(800) == 500
    assert schedule.stage_step(1000) == 1000


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "ten"])
def test_total_steps_must_be_a_number_of_steps(total: object) -> None:
    with pytest.raises(ValueError, match="total_steps must be the number"):
        PruningSchedule.from_config(BlockPruningConfig(), total)  # type: ignore[arg-type]


def test_a_run_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="3 phases do not fit in 2 steps"):
        PruningSchedule.from_config(BlockPruningConfig(), 2)
    cfg = BlockPruningConfig(phases=(5, 10, 5))
    with pytest.raises(ValueError, match="need 20 steps, the run has 19"):
        PruningSchedule.from_config(cfg, 19)


@pytest.mark.parametrize("method", ["reweighted_group_lasso", "magnitude"])
def test_refresh_in_steps_that_never_fires_is_refused(method: str) -> None:
    cfg = BlockPruningConfig(reweight_every=50, method=method, ramp="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="never fires within the 50 steps"):
        PruningSchedule.from_config(cfg, 100)


@pytest.mark.parametrize("saliency", ["taylor"])
@pytest.mark.parametrize("phases", [(0.0, 0.0, 1.0), (0, 0, 20)])
def test_gradients_need_steps_before_the_cut(
    saliency: Any, phases: tuple[float, float, float]
) -> None:
    cfg = BlockPruningConfig(method="magnitude", saliency=saliency, phases=phases)
    with pytest.raises(ValueError, match=r"gathers gradients .* before the first step"):
        PruningSchedule.from_config(cfg, 20)
    cfg = BlockPruningConfig(method="magnitude", saliency=saliency, phases=(1, 0, 19))
    assert PruningSchedule.from_config(cfg, 20).cut_step == 1
