"""Interleaved timing: candidates take turns, so a busy neighbour hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over ``rounds`` interleaved rounds."""

    median: float
    best: float
    p95: float
    rounds: int

    def to_dict(self) -> dict[str, float | int]:
        return {
            "median_ms": round(self.median, 4),
            "best_ms": round(self.best, 4),
            "p95_ms": round(self.p95, 4),
            "rounds": self.rounds,
        }


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` torch threads, then restore the old number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 4.0,
    min_rounds: int = 10,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Time every call once a round, A B C A B C ..., for about ``seconds`` in all.

    Two rounds run first, untimed: they allocate, and they give the number of rounds.
    """
    started = time.perf_counter()
    for _ in range(2):
        for call in calls.values():
            call()
    one_round = (time.perf_counter() - started) / 2
    rounds = int(min(max(seconds / max(one_round, 1e-9), min_rounds), max_rounds))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - started) * 1e3)
    return {
        name: Timing(
            median=float(np.median(times)),
            best=min(times),
            p95=float(np.percentile(times, 95)),
            rounds=rounds,
        )
        for name, times in samples.items()
    }


def speedup(timings: Mapping[str, Timing], slow: str, fast: str) -> dict[str, float]:
    """How many times faster ``fast`` is, by median and by best time."""
    return {
        "median": round(timings[slow].median / timings[fast].median, 3),
        "best": round(timings[slow].best / timings[fast].best, 3),
    }
