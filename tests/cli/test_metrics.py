import numpy as np
import pytest

from pybsp.cli.metrics import score

LOGITS = np.array([[2, 1], [0, 1], [1, 3], [5, 0]], dtype=np.float32)  # 0 1 1 0


def test_classification_scores():
    found = score(("accuracy", "f1", "matthews"), [0, 1, 0, 0], LOGITS)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["f1"] == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert found["matthews"] == pytest.approx(2 / (2 * 1 * 3 * 2) ** 0.5)


def test_correlations():
    predictions = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    found = score(("pearson", "spearman"), [0.0, 1.0, 5.0], predictions)
    assert found["spearman"] == pytest.approx(1.0)
    expected = np.corrcoef([0, 1, 5], [1, 2, 4])[0, 1]
    assert found["pearson"] == pytest.approx(expected)


def test_an_undefined_correlation_counts_as_zero():
    predictions = np.ones((3, 1), dtype=np.float32)
    found = score(("pearson", "spearman"), [0.0, 1.0, 5.0], predictions)
    assert found == {"pearson": 0.0, "spearman": 0.0}
    same = score(("f1", "matthews"), [0, 1], np.array([[1, 0], [1, 0]], np.float32))
    assert same == {"f1": 0.0, "matthews": 0.0}
