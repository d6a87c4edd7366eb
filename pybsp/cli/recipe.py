"""How an experiment trains, and what it prunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """What ``pybsp prune`` does where no option says otherwise: the fields of
    ``BlockPruningConfig`` in ``config``, those of ``Recipe`` beside it.

    ``learning_rate`` is in units of the dense run's. What was cut first takes a higher
    one the fewer weights are left, ``1 / density`` up to this.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    is_paper: bool = False
    reconstruct: bool = False
    error: str = "model"
    learning_rate: float = 2.0
    distill: float = 0.5
    distill_hidden: float = 0.0
    dropout: bool = True
    schedule: str = "hold"

    def learning_rate_at(self, sparsity: float) -> float:
        """In units of the dense run's."""
        if not self.reconstruct:
            return self.learning_rate
        return min(self.learning_rate, 1 / (1 - sparsity))


#: The first of several cuts leaves this fraction of the weights, and the next one half.
FIRST_DENSITY = 0.4


def first_cuts(sparsity: float) -> tuple[float, ...]:
    """Sparsities of the cuts before the last one: none down to two fifths of the
    weights, and then no cut that removes much more than half of what is left."""
    density, found = FIRST_DENSITY, []
    while 1 - sparsity < 0.75 * density - 1e-9:
        found.append(round(1 - density, 4))
        density /= 2
    return tuple(found)


RECIPES = {
    "reconstruct": Defaults(
        {"method": "magnitude", "phases": (0.0, 0.0, 1.0), "packed_retraining": True},
        reconstruct=True,
        learning_rate=2.5,
        distill_hidden=1.0,
        dropout=False,
    ),
    "ramp": Defaults(
        {
            "penalty": "proximal",
            "reg_lambda": "auto",
            "ramp": "cubic",
            "phases": (0.0, 0.4, 0.6),
        }
    ),
    "paper": Defaults(is_paper=True, distill=0.0, schedule="restart"),
}


@dataclass(frozen=True)
class Recipe:
    """How the two runs train and what is measured; the same optimizer for both.

    ``distill`` is the weight of the dense model's logits in the loss of the pruning
    run, ``distill_hidden`` that of its hidden states. With ``reconstruct`` the dense
    model is cut by reconstruction first, on training texts of ``calibration`` tokens,
    by the costs of an ``error`` (see ``prune_one_shot``), and the run trains what is
    left; with ``first_cuts`` it comes there in several cuts, and trains after each.
    ``dropout`` is that of the model, or none while pruning; ``bfloat16`` is for
    products of the dense run. ``schedule`` of the learning rate while pruning:
    ``"hold"`` keeps it up to the cut and then lets it fall to zero, ``"restart"`` plays
    the fall once up to the cut and once after it, as two separate runs would.
    ``checkpoints`` are written per run, for resuming; ``seconds`` is spent timing.
    """

    epochs_dense: float
    epochs: float
    dense_learning_rate: float
    learning_rate: float
    batch_size: int
    max_length: int
    seed: int
    distill: float
    distill_hidden: float = 0.0
    reconstruct: bool = False
    error: str = "model"
    dropout: bool = True
    bfloat16: bool = False
    calibration: int = 32768
    first_cuts: tuple[float, ...] = ()
    schedule: str = "hold"
    checkpoints: int = 6
    sequence: int = 128
    seconds: float = 6.0
    onnx: bool = True

    def epochs_after(self, sparsity: float) -> float:
        """The part of ``epochs`` that follows a cut: the last one has twice the share
        of each before it."""
        shares = len(self.first_cuts) + 2
        return self.epochs * (1 if sparsity in self.first_cuts else 2) / shares

    def learning_rate_after(self, sparsity: float) -> float:
        """Of a cut before the last one: what is left then takes no higher rate."""
        return min(self.learning_rate, self.dense_learning_rate / (1 - sparsity))


@dataclass(frozen=True)
class Subject:
    """What is pruned: its name for people, and how to get a fresh copy.

    ``dense`` names a checkpoint that is fine-tuned already.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]
    dense: Path | None = None
