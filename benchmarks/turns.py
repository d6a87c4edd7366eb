"""Candidates take turns, with warm weights, and are compared round by round.

A turn is one untimed call, which brings the candidate's weights and code back into the
caches, and then enough timed calls for a fifth of a millisecond. Calls longer than
``LONG`` go without the first: their weights exceed L2 or their time hides it. Where
warm calls are asked for, all have the first, and up to five for a tenth of a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

LONG = 2e-3
TURN = 2e-4
WARM_TURN, WARM_CALLS = 0.1, 5


@runtime_checkable
class TimesItself(Protocol):
    """A candidate in another process: its turn returns the seconds of a call."""

    def turn(self) -> float: ...


@dataclass(frozen=True)
class OneOperation:
    """The yardstick as a candidate: ``peak``, operations a second, in every round, for
    what slows the calls of a round slows the peak as well."""

    peak: Callable[[], float]

    def turn(self) -> float:
        return 1 / self.peak()


@dataclass(frozen=True)
class Rounds:
    """Seconds of a call, one value a round, by candidate."""

    seconds: Mapping[Any, NDArray[np.float64]]

    def median(self, name: Any) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, slow: Any, fast: Any) -> float:
        """How many times faster ``fast`` is: the median of the ratios of each round."""
        return float(np.median(self.seconds[slow] / self.seconds[fast]))

    def best(self, name: Any) -> float:
        return float(self.seconds[name].min())

    def over(self, name: Any, operations: Mapping[Any, float]) -> float:
        """How many times longer ``name`` takes than ``operations``, so many of each
        ``OneOperation``: the median of the ratios of each round."""
        least = sum(count * self.seconds[unit] for unit, count in operations.items())
        return float(np.median(self.seconds[name] / least))

    def to_dict(self, name: Any) -> dict[str, float | int]:
        milliseconds = self.seconds[name] * 1e3
        return {
            "median_ms": round(float(np.median(milliseconds)), 4),
            "best_ms": round(float(milliseconds.min()), 4),
            "p95_ms": round(float(np.percentile(milliseconds, 95)), 4),
            "rounds": len(milliseconds),
        }


def take_turns(
    calls: Mapping[Any, Callable[[], object] | TimesItself],
    *,
    seconds: float = 0.3,
    min_rounds: int = 5,
    max_rounds: int = 50,
    always_warm: bool = False,
) -> Rounds:
    """Rounds of one turn each, A B C A B C ..., for about ``seconds`` in all, at most
    ``max_rounds`` and in any case ``min_rounds``.

    Two rounds come first: they allocate, and they give the length of the turns and the
    number of rounds.
    """
    long = math.inf if always_warm else LONG
    first = {name: _turn(call, 0.0, long) for name, call in calls.items()}
    started = time.perf_counter()
    lengths = {name: _turn(call, first[name], long) for name, call in calls.items()}
    one_round = max(time.perf_counter() - started, 1e-9)
    rounds = int(max(min(seconds / one_round, max_rounds), min_rounds))
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_turn(call, lengths[name], long))
    return Rounds({name: np.array(found) for name, found in samples.items()})


def _turn(
    call: Callable[[], object] | TimesItself, expected: float, long: float
) -> float:
    """The median seconds of a call in one turn."""
    if isinstance(call, TimesItself):
        return call.turn()
    if expected < long:
        call()
    turn, most = (WARM_TURN, WARM_CALLS) if long == math.inf else (TURN, 20)
    times = []
    for _ in range(int(min(max(turn / max(expected, 1e-9), 1), most))):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
