"""Memory from Python is checked by the binding itself, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pybsp import _core


def floats(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones(shape, np.float32)


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.setflags(write=False)
    return array


def pattern(**change: Any) -> Any:
    arguments: dict[str, Any] = {
        "crow_indices": np.array([0, 2, 3], np.int32),
        "col_indices": np.array([0, 2, 1], np.int32),
        "shape": (4, 6),
        "block_shape": (2, 2),
    }
    return _core.BlockSparsePattern(**{**arguments, **change})


W = floats(4, 6)
BLOCK = (2, 3)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weight float64": (
        lambda: _core.block_norms(W.astype(np.float64), BLOCK, floats(2, 2), 1),
        TypeError, "weight must be float32; got float64",
    ),
    "weight big endian": (
        lambda: _core.block_norms(W.astype(">f4"), BLOCK, floats(2, 2), 1),
        TypeError, "weight must be float32",
    ),
    "weight 1d": (
        lambda: _core.block_norms(floats(24), BLOCK, floats(2, 2), 1),
        ValueError, "weight must have 2 dimensions",
    ),
    "weight scattered": (
        lambda: _core.block_norms(floats(4, 12)[:, ::2], BLOCK, floats(2, 2), 1),
        ValueError, "contiguous rows",
    ),
    "weight backwards": (
        lambda: _core.block_norms(W[::-1], BLOCK, floats(2, 2), 1),
        ValueError, "contiguous rows",
    ),
    "weight overlaps itself": (
        lambda: _core.block_norms(
            np.lib.stride_tricks.as_strided(floats(20), (4, 6), (8, 4)),
            BLOCK, floats(2, 2), 1,
        ),
        ValueError, "contiguous rows",
    ),
    "block does not divide": (
        lambda: _core.block_norms(W, (3, 3), floats(2, 2), 1),
        ValueError, "does not divide weight",
    ),
    "block zero": (
        lambda: _core.block_norms(W, (0, 3), floats(2, 2), 1),
        ValueError, "does not divide weight",
    ),
    "norms shape": (
        lambda: _core.block_norms(W, BLOCK, floats(2, 3), 1),
        ValueError, "norms must have one entry a block",
    ),
    "norms float64": (
        lambda: _core.block_norms(W, BLOCK, np.ones((2, 2)), 1),
        TypeError, "norms must be float32",
    ),
    "norms scattered": (
        lambda: _core.block_norms(W, BLOCK, floats(2, 4)[:, ::2], 1),
        ValueError, "norms must be contiguous",
    ),
    "norms read-only": (
        lambda: _core.block_norms(W, BLOCK, frozen(floats(2, 2)), 1),
        ValueError, "not writeable",
    ),
    "reweight sizes": (
        lambda: _core.reweight(floats(3), 0.1, floats(4)), ValueError, "same size",
    ),
    "grad shape": (
        lambda: _core.group_lasso_grad(floats(6, 4), W, floats(2, 2), 0.1, BLOCK, 1),
        ValueError, "must have the weight's shape",
    ),
    "grad read-only": (
        lambda: _core.group_lasso_grad(
            frozen(floats(4, 6)), W, floats(2, 2), 0.1, BLOCK, 1
        ),
        ValueError, "not writeable",
    ),
    "grad of another type": (
        lambda: _core.group_lasso_grad(
            W.astype(np.uint16), W, floats(2, 2), 0.1, BLOCK, 1
        ),
        TypeError, "same element type",
    ),
    "weight int16": (
        lambda: _core.block_norms(W.astype(np.int16), BLOCK, floats(2, 2), 1),
        TypeError, "weight must be float32; got int16",
    ),
    "factors shape": (
        lambda: _core.group_lasso_grad(floats(4, 6), W, floats(4), 0.1, BLOCK, 1),
        ValueError, "factors must have one entry a block",
    ),
    "thresholds float64": (
        lambda: _core.group_lasso_prox(floats(4, 6), np.ones((2, 2)), 1.0, BLOCK, 1),
        TypeError, "thresholds must be float32",
    ),
    "prox read-only": (
        lambda: _core.group_lasso_prox(
            frozen(floats(4, 6)), floats(2, 2), 1.0, BLOCK, 1
        ),
        ValueError, "not writeable",
    ),
    "mask int": (
        lambda: _core.apply_block_mask(
            floats(4, 6), np.ones((2, 2), np.int8), BLOCK, 1
        ),
        TypeError, "mask must be bool",
    ),
    "mask sizes": (
        lambda: _core.block_mask(floats(3), 1, np.ones(4, bool)),
        ValueError, "keep = 1 of 3 blocks",
    ),
    "keep": (
        lambda: _core.block_mask(floats(3), 4, np.ones(3, bool)),
        ValueError, "keep = 4 of 3 blocks",
    ),
    "crow int64": (
        lambda: pattern(crow_indices=np.array([0, 2, 3])), TypeError,
        "crow_indices must be int32; got int64",
    ),
    "col strided": (
        lambda: pattern(col_indices=np.zeros(6, np.int32)[::2]), ValueError,
        "col_indices must be contiguous",
    ),
    "too many input features": (
        lambda: pattern(shape=(4, 2**26 + 2)), ValueError, "at most 67108864 input",
    ),
    "shape overflows": (
        lambda: pattern(shape=(2**63 - 2, 6)), ValueError, "one entry more",
    ),
    "shape too large": (lambda: pattern(shape=(2**64, 6)), TypeError, "incompatible"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    function, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function()


def test_accepted() -> None:
    norms = np.zeros((2, 2), np.float32)
    _core.block_norms(frozen(W.copy()), BLOCK, norms, 1)
    assert np.allclose(norms, 6**0.5)
    assert pattern().nnz == 3
    for threads in (0, -1, 1, 4):
        norms[:] = 0
        _core.block_norms(W, BLOCK, norms, threads)
        assert np.allclose(norms, 6**0.5), threads
