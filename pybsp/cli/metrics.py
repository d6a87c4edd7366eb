"""Scores of predictions, by the names GLUE uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np
from numpy.typing import NDArray

Scorer = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


def _accuracy(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    from sklearn.metrics import accuracy_score  # type: ignore[import-untyped, unused-ignore]

    return float(accuracy_score(labels, predictions))


def _f1(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    from sklearn.metrics import f1_score  # type: ignore[import-untyped, unused-ignore]

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    from sklearn.metrics import matthews_corrcoef  # type: ignore[import-untyped, unused-ignore]

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    from scipy.stats import pearsonr  # type: ignore[import-untyped, unused-ignore]

    return float(pearsonr(labels, predictions).statistic)


def _spearman(labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr  # type: ignore[import-untyped, unused-ignore]

    return float(spearmanr(labels, predictions).statistic)


SCORERS: dict[str, Scorer] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def score(
    names: Sequence[str], labels: Sequence[float], logits: NDArray[np.float32]
) -> dict[str, float]:
    """Every metric in ``names`` of ``logits`` ``(examples, outputs)``.

    One output is a regression, more are classes. A correlation that is undefined
    because all predictions are equal counts as 0.
    """
    truth = np.asarray(labels, dtype=np.float64)
    if logits.shape[1] == 1:
        predictions = logits[:, 0].astype(np.float64)
    else:
        predictions = logits.argmax(1).astype(np.float64)
    scores = {}
    for name in names:
        with warnings.catch_warnings():
            # scipy warns of constant predictions; they are scored 0 below.
            warnings.simplefilter("ignore")
            value = SCORERS[name](truth, predictions)
        scores[name] = value if isfinite(value) else 0.0
    return scores
