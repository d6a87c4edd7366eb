"""The training operations against what memory allows, and against torch autograd.

On the weights of BERT-base's encoder: ``all`` is its 72 matrices one after the other,
which come from memory; ``one`` is a single 768 x 768 matrix ten times in a row. One
thread. ``gb_per_s`` counts every byte that is read once, and once that is written. The
bound of an operation is taken in the same run:

- ``block_norms`` and ``apply_block_mask_`` (on a weight that is zero already where it
  is masked, as it is once training has settled) read: ``pybsp.ops.read_bandwidth`` of
  as many bytes as the weights have;
- ``group_lasso_grad_`` reads the weight and the gradient and writes the gradient: the
  time of torch's ``grad.add_(weight, alpha=...)``, which does the same;
- ``group_lasso_prox_`` reads and writes the weight: the time of ``weight.mul_(...)``.

The autograd formulation is the penalty as a loss term, forward and backward.

    python -m benchmarks.training_ops [--dtype float32 bfloat16] [--seconds 0.5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pybsp
from benchmarks import result
from pybsp.blocks import BlockShape, block_view, grid_shape
from pybsp.cli.timing import Timing, interleaved, torch_threads

LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
FOOTPRINTS = {"all": LAYER * 12, "one": LAYER[:1]}
REPEATS = {"all": 1, "one": 10}
BLOCKS: list[BlockShape] = [
    (8, 1), (16, 1), (16, 4), (32, 32), (64, 64), (4, 4), (1, 96), (1, 4), (1, 1),
    (768, 1),
]  # fmt: skip
LAM = 1e-9  # thousands of calls must leave the weights as they are


class Weights:
    """The matrices of a footprint, their gradients, and what there is per block."""

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        def random(shape: tuple[int, int]) -> torch.Tensor:
            return torch.randn(shape).to(dtype)

        self.weights = [random(shape).requires_grad_() for shape in shapes]
        self.grads = [random(shape) for shape in shapes]
        for weight, grad in zip(self.weights, self.grads, strict=True):
            weight.grad = grad

    @torch.no_grad()
    def partition(self, block: BlockShape) -> None:
        """Fill what there is per block; a fifth of the blocks survives the mask."""
        self.block = block
        self.factors = [torch.rand(grid_shape(w.shape, block)) for w in self.weights]
        self.zeros = [torch.zeros_like(f) for f in self.factors]
        self.masks = [f > 0.8 for f in self.factors]
        self.masked = [w.detach().clone() for w in self.weights]
        self.mask()

    def nbytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights)

    def blocks(self) -> int:
        return sum(f.numel() for f in self.factors)

    @torch.no_grad()
    def norms(self) -> None:
        for weight in self.weights:
            pybsp.ops.block_norms(weight, self.block)

    @torch.no_grad()
    def grad(self) -> None:
        for g, w, f in zip(self.grads, self.weights, self.factors, strict=True):
            pybsp.ops.group_lasso_grad_(g, w, f, LAM, self.block)

    @torch.no_grad()
    def prox(self) -> None:
        for weight, zero in zip(self.weights, self.zeros, strict=True):
            pybsp.ops.group_lasso_prox_(weight, zero, self.block)

    @torch.no_grad()
    def mask(self) -> None:
        for weight, mask in zip(self.masked, self.masks, strict=True):
            pybsp.ops.apply_block_mask_(weight, mask, self.block)

    @torch.no_grad()
    def add(self) -> None:
        for grad, weight in zip(self.grads, self.weights, strict=True):
            grad.add_(weight, alpha=LAM)

    @torch.no_grad()
    def mul(self) -> None:
        for weight in self.weights:
            weight.mul_(1.0)

    def autograd(self) -> None:
        for weight, factors in zip(self.weights, self.factors, strict=True):
            blocks = block_view(weight.float(), self.block)
            norms = blocks.square().sum((2, 3)).sqrt()
            (LAM * (factors * norms).sum()).backward()

    def check(self) -> None:
        """The operation and autograd add the same gradient, on a copy."""
        weight, factors = self.weights[0].detach().clone(), self.factors[0]
        leaf = weight.float().requires_grad_()
        norms = block_view(leaf, self.block).square().sum((2, 3)).sqrt()
        (factors * norms).sum().backward()
        grad = torch.zeros_like(weight)
        pybsp.ops.group_lasso_grad_(grad, weight, factors, 1.0, self.block)
        # Autograd divides by the norm of a block of zeros; its subgradient is zero.
        expected = leaf.grad.nan_to_num(0.0).to(grad.dtype)  # type: ignore[union-attr]
        torch.testing.assert_close(grad, expected)


def measure(
    data: Weights, footprint: str, block: BlockShape, seconds: float
) -> list[dict[str, Any]]:
    data.partition(block)
    data.check()
    dtype = data.weights[0].dtype
    weights, blocks = data.nbytes(), data.blocks()
    repeats = REPEATS[footprint]
    operations: dict[str, Callable[[], None]] = {
        "block_norms": data.norms,
        "group_lasso_grad_": data.grad,
        "group_lasso_prox_": data.prox,
        "apply_block_mask_": data.mask,
        "add": data.add,
        "mul": data.mul,
        "autograd": data.autograd,
    }
    calls = {name: _repeated(call, repeats) for name, call in operations.items()}
    read = pybsp.ops.read_bandwidth(weights)
    times = interleaved(calls, seconds=seconds, min_rounds=3, max_rounds=300)
    read = max(read, pybsp.ops.read_bandwidth(weights))
    # Bytes moved by a call, and the milliseconds of its bound.
    moved = {
        "block_norms": repeats * (weights + 4 * blocks),
        "group_lasso_grad_": repeats * (3 * weights + 4 * blocks),
        "group_lasso_prox_": repeats * (2 * weights + 4 * blocks),
        "apply_block_mask_": repeats * (weights + blocks),
    }
    bound = {
        "block_norms": moved["block_norms"] / read * 1e3,
        "group_lasso_grad_": times["add"].median,
        "group_lasso_prox_": times["mul"].median,
        "apply_block_mask_": moved["apply_block_mask_"] / read * 1e3,
    }
    rows = []
    for op in moved:
        row: dict[str, Any] = {
            "footprint": footprint,
            "dtype": str(dtype).removeprefix("torch."),
            "block_shape": list(block),
            "operation": op,
            "calls": repeats,
            **times[op].to_dict(),
            "gb_per_s": round(moved[op] / times[op].median / 1e6, 2),
            "of_read": round(repeats * weights / times[op].median / read * 1e3, 3),
            "read_gb_per_s": round(read / 1e9, 2),
            "of_bound": round(bound[op] / times[op].median, 3),
        }
        if op == "group_lasso_grad_":
            row["over_autograd"] = _ratio(times["autograd"], times[op])
        rows.append(row)
    return rows


def _repeated(call: Callable[[], None], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def _ratio(slow: Timing, fast: Timing) -> float:
    return round(slow.median / fast.median, 2)


def measure_all(
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    seconds: float = 0.5,
    blocks: Sequence[BlockShape] = tuple(BLOCKS),
) -> list[dict[str, Any]]:
    """One row for every operation, block shape, dtype and footprint; one thread."""
    rows = []
    with torch_threads(1), torch.enable_grad():
        for dtype in dtypes:
            for footprint, shapes in FOOTPRINTS.items():
                data = Weights(shapes, dtype)
                for block in blocks:
                    rows += measure(data, footprint, block, seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    rows = measure_all(dtypes, arguments.seconds)
    table = Table(
        "weights", "dtype", "block", "operation", "ms", "GB/s", "of bound", "autograd"
    )
    for row in rows:
        table.add_row(
            row["footprint"], row["dtype"], "x".join(map(str, row["block_shape"])),
            row["operation"], f"{row['median_ms']:.3f}", f"{row['gb_per_s']:.1f}",
            f"{row['of_bound']:.0%}",
            f"{row['over_autograd']:.1f}x" if "over_autograd" in row else "",
        )  # fmt: skip
    Console().print(table)
    print(result.save("training_ops", {"threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
