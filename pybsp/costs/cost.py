"""The two times of one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call; ``measured`` is False for a prediction."""

    dense_us: float
    sparse_us: float
    measured: bool = True

    @property
    def gain(self) -> float:
        """How many times faster the block-sparse call is."""
        return self.dense_us / self.sparse_us
