"""The time of a linear layer on this CPU, predicted from a short measurement."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks import BlockShape
from . import cache, measurement
from .cost import Cost
from .terms import Call, Machine, Terms, dense_terms, sparse_terms


@dataclass(frozen=True)
class Fit:
    """Coefficients by term; three of four calls are predicted within ``error``."""

    coefficients: dict[str, float]
    error: float

    def predict(self, terms: Terms) -> float:
        """The time of a call; terms that were never measured are taken to be free."""
        known = self.coefficients
        return sum(known.get(name, 0.0) * amount for name, amount in terms.items())


@dataclass(frozen=True)
class CostModel:
    """Predicts microseconds of linear layers, for the CPU and threads it was fitted on.

    ``machine`` has the tile of tokens of the instruction set in use.
    """

    sparse: Fit
    dense: Fit
    machine: Machine

    @classmethod
    def load_or_fit(cls) -> CostModel:
        """The model of this CPU, instruction set and ``torch.get_num_threads()``.

        Measured once, which takes some seconds, and kept: in this process, and in the
        user's cache folder for all others.
        """
        key = json.dumps(cache.cache_key(), sort_keys=True)
        with _lock:
            if key not in _models:
                _models[key] = cls._load() or cls._fit_and_keep()
            return _models[key]

    @classmethod
    def fit(cls, sweeps: int = 2, seconds: float = 4.0) -> CostModel:
        """Measure about fifteen hundred small calls now.

        No second sweep over them begins after ``seconds``.
        """
        machine = measurement.this_machine()
        calls = measurement.sparse_calls(machine)
        sparse = fit(
            [sparse_terms(call, machine) for call in calls],
            measurement.measure(calls, sweeps, 0.7 * seconds),
        )
        calls = measurement.dense_calls()
        times = measurement.measure(calls, sweeps, 0.3 * seconds)
        dense = fit([dense_terms(call) for call in calls], times)
        return cls(sparse, dense, machine)

    def predict_sparse(
        self,
        tokens: int,
        shape: tuple[int, int],
        block_shape: BlockShape,
        density: float,
    ) -> float:
        """Microseconds of ``pybsp.block_sparse_linear`` with a bias."""
        call = Call.sparse(tokens, shape, block_shape, density)
        return self.sparse.predict(sparse_terms(call, self.machine))

    def predict_dense(self, tokens: int, shape: tuple[int, int]) -> float:
        """Microseconds of ``torch.nn.functional.linear`` with a bias."""
        return self.dense.predict(dense_terms(Call(tokens, shape)))

    def predict(
        self,
        tokens: int,
        shape: tuple[int, int],
        block_shape: BlockShape,
        density: float,
    ) -> Cost:
        """Both, as for ``linear_cost``."""
        dense_us = self.predict_dense(tokens, shape)
        sparse_us = self.predict_sparse(tokens, shape, block_shape, density)
        return Cost(dense_us, sparse_us, measured=False)

    @property
    def error(self) -> float:
        """Relative error of a predicted gain that most layers stay within."""
        return math.hypot(self.sparse.error, self.dense.error)

    @classmethod
    def _load(cls) -> CostModel | None:
        found = cache.read()
        try:
            sparse, dense = (
                Fit(
                    {str(k): float(v) for k, v in found[kind]["coefficients"].items()},
                    float(found[kind]["error"]),
                )
                for kind in ("sparse", "dense")
            )
            model = cls(sparse, dense, Machine(**found["machine"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return model if model._is_sound() else None

    def _is_sound(self) -> bool:
        fits = (self.sparse, self.dense)
        numbers = [v for each in fits for v in each.coefficients.values()]
        numbers += [each.error for each in fits]
        return (
            self.machine == measurement.this_machine()
            and all(math.isfinite(v) and v >= 0 for v in numbers)
            and all(any(each.coefficients.values()) for each in fits)
        )

    @classmethod
    def _fit_and_keep(cls) -> CostModel:
        model = cls.fit()
        cache.write(asdict(model))
        return model


_models: dict[str, CostModel] = {}
_lock = threading.Lock()


def fit(terms: Sequence[Terms], times: Sequence[float]) -> Fit:
    """Nonnegative coefficients with the least relative error over ``times``.

    The error is that on every fifth call, predicted from the others.
    """
    coefficients: dict[str, float] = {}
    errors: list[float] = []
    for rows in _independent(terms):
        names = sorted({name for row in rows for name in terms[row]})
        position = {name: index for index, name in enumerate(names)}
        amounts = np.zeros((len(rows), len(names)))
        for index, row in enumerate(rows):
            for name, amount in terms[row].items():
                amounts[index, position[name]] = amount
        measured = np.array([times[row] for row in rows])
        left_out = np.arange(len(rows)) % 5 == 4
        partial = _solve(amounts[~left_out], measured[~left_out])
        relative = amounts[left_out] @ partial / measured[left_out]
        errors += np.abs(relative - 1).tolist()
        solved = _solve(amounts, measured).tolist()
        coefficients |= dict(zip(names, solved, strict=True))
    return Fit(coefficients, float(np.quantile(errors, 0.75)) if errors else 0.0)


def _independent(terms: Sequence[Terms]) -> list[list[int]]:
    """The calls in groups that have no term in common: problems of their own."""
    groups: list[tuple[set[str], list[int]]] = []
    for row, each in enumerate(terms):
        names, rows = set(each), [row]
        apart = []
        for group in groups:
            if names.isdisjoint(group[0]):
                apart.append(group)
            else:
                names |= group[0]
                rows = group[1] + rows
        groups = [*apart, (names, rows)]
    return [rows for _, rows in groups]


def _solve(amounts: NDArray[Any], times: NDArray[Any]) -> NDArray[Any]:
    # Imported here: scipy takes a quarter of a second and most programs never fit.
    from scipy.optimize import nnls

    relative = amounts / times[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    count = relative.shape[1]
    weights = np.ones(len(times))
    # A little weight on small coefficients settles what the calls leave open.
    settle = 1e-3 * np.eye(count)
    for _ in range(3):
        system = np.vstack([relative * weights[:, None], settle])
        wanted = np.concatenate([weights, np.zeros(count)])
        found, _ = nnls(system, wanted, maxiter=50 * count)
        # Towards the least absolute error: a disturbed measurement must not count
        # with its square.
        errors = np.abs(relative @ found - 1)
        weights = np.sqrt(0.04 / np.maximum(errors, 0.04))
    # Least squares of relative errors settle under the middle of noisy times.
    predicted = relative @ found
    middle = np.median(predicted[predicted > 0]) if predicted.any() else 1.0
    return np.asarray(found / scale / middle)
