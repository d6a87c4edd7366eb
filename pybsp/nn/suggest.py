"""Which block shape makes a model fastest on this CPU."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks import BlockShapeSpec, check_block_shape_spec, resolve_block_shape
from ..costs import CostModel
from ..pruning.config import BlockPruningConfig
from ..pruning.targets import Target, select_targets, unwrap_model

if TYPE_CHECKING:
    from rich.table import Table

#: What ``suggest_block_shape`` compares unless told otherwise.
BLOCK_SHAPES: tuple[BlockShapeSpec, ...] = (
    (4, 1), (8, 1), (16, 1), (32, 1), (4, 4), (8, 4), (16, 4), (16, 16), (32, 32),
    (1, 32), (1, "in/8"),
)  # fmt: skip


@dataclass(frozen=True)
class BlockShapeCost:
    """One block shape for all layers: predicted time of one pass through them; bytes.

    ``refused`` says which layer the shape does not divide; it then has no time.
    """

    block_shape: BlockShapeSpec
    sparse_us: float | None = None
    packed_bytes: int | None = None
    refused: str = ""


@dataclass(frozen=True)
class BlockShapeReport:
    """Block shapes from the fastest to the slowest; ``str()`` gives a table.

    Refused shapes come last. Times are predictions, each within about ``error``.
    """

    candidates: tuple[BlockShapeCost, ...]
    layers: int
    tokens: int
    sparsity: float
    threads: int
    dense_us: float
    dense_bytes: int
    error: float

    @property
    def best(self) -> BlockShapeSpec:
        """The fastest block shape, as ``BlockPruningConfig`` takes it."""
        return self.candidates[0].block_shape

    def speedup(self, candidate: BlockShapeCost) -> float | None:
        """How many times faster than dense these layers are together."""
        if candidate.sparse_us is None:
            return None
        return self.dense_us / candidate.sparse_us

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, texts and lists, fit for JSON."""
        candidates = [
            {
                **asdict(candidate),
                "block_shape": list(candidate.block_shape),
                "speedup": self.speedup(candidate),
            }
            for candidate in self.candidates
        ]
        return {**asdict(self), "candidates": candidates, "best": list(self.best)}

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(caption=self._summary(), caption_justify="left")
        for heading in ("block", "packed us", "gain", "MB", "of dense"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("result", overflow="fold")
        for candidate in self.candidates:
            name = "x".join(map(str, candidate.block_shape))
            gain = self.speedup(candidate)
            if gain is None or candidate.packed_bytes is None:
                table.add_row(name, "-", "-", "-", "-", candidate.refused)
                continue
            table.add_row(
                name,
                f"{candidate.sparse_us:.0f}",
                f"{gain:.2f}",
                f"{candidate.packed_bytes / 1e6:.2f}",
                f"{candidate.packed_bytes / self.dense_bytes:.3f}",
                "slower than dense" if gain < 1 else "",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=140, no_color=True).print(self)
        return text.getvalue().rstrip()

    def _summary(self) -> str:
        return (
            f"{self.layers} linear layers at {self.sparsity:.0%} sparsity, "
            f"{self.tokens} tokens, threads: {self.threads}; dense "
            f"{self.dense_us:.0f} us, {self.dense_bytes / 1e6:.2f} MB; predicted, "
            f"+-{self.error:.0%}; speed only, not accuracy"
        )


def suggest_block_shape(
    model: nn.Module,
    tokens: int = 128,
    sparsity: float = 0.8,
    block_shapes: Iterable[BlockShapeSpec] | None = None,
    target_modules: str | tuple[str, ...] = "all-linear",
    exclude_modules: str | tuple[str, ...] | None = None,
) -> BlockShapeReport:
    """Rank block shapes by the predicted time of the pruned layers on this CPU.

    It ranks speed and says nothing of accuracy. Small blocks keep more of it: Lagunas
    et al. 2021 (block movement pruning, BERT-base on SQuAD v1) lose about 0.2 to 0.5 F1
    for each doubling of a square block's side at 35 % density, and 0.3 to 0.7 at 23 %.
    Of shapes that are about equally fast take the smallest.

    Parameters
    ----------
    model : any module with dense float32 ``nn.Linear`` layers, whatever their values.
    tokens : rows of the input, batch times sequence.
    sparsity : removed fraction of every layer's blocks.
    block_shapes : candidates such as ``(8, 1)`` or ``(1, "in/8")``; None: BLOCK_SHAPES.
    target_modules, exclude_modules : the layers, as for ``BlockPruningConfig``.

    Threads are ``torch.get_num_threads()``. The first call on a CPU measures for some
    seconds; see ``pybsp.costs``. Raises ``ValueError`` when no layer is targeted or no
    candidate divides all of them.
    """
    _check(model, tokens, sparsity)
    candidates = _candidates(block_shapes)
    cfg = BlockPruningConfig(
        block_shape=(1, 1),
        target_modules=target_modules,
        exclude_modules=exclude_modules,
    )
    targets = select_targets(unwrap_model(model), cfg)
    refusals = [_refusal(targets, spec) for spec in candidates]
    if all(refusals):
        raise ValueError(
            f"none of the {len(candidates)} block shapes divides all {len(targets)} "
            f"layers ({refusals[0]}); give block_shapes that do or exclude layers"
        )
    costs = CostModel.load_or_fit()
    found = [
        BlockShapeCost(spec, refused=refusal)
        if refusal
        else _cost(costs, targets, spec, tokens, sparsity)
        for spec, refusal in zip(candidates, refusals, strict=True)
    ]
    found.sort(key=lambda each: math.inf if each.refused else each.sparse_us or 0.0)
    dense_us = sum(
        _uses(target) * costs.predict_dense(tokens, target.weight_shape)
        for target in targets
    )
    weights = sum(math.prod(target.weight_shape) for target in targets)
    return BlockShapeReport(
        tuple(found), sum(map(_uses, targets)), tokens, sparsity,
        torch.get_num_threads(), dense_us, 4 * weights, costs.error,
    )  # fmt: skip


def _check(model: nn.Module, tokens: int, sparsity: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer; got {tokens!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"0 <= sparsity < 1 must hold; got {sparsity!r}; 80 % is written as 0.8"
        )


def _candidates(
    block_shapes: Iterable[BlockShapeSpec] | None,
) -> list[BlockShapeSpec]:
    given = BLOCK_SHAPES if block_shapes is None else block_shapes
    candidates = list(dict.fromkeys(check_block_shape_spec(spec) for spec in given))
    if not candidates:
        raise ValueError("block_shapes is empty; give at least one, such as (8, 1)")
    return candidates


def _refusal(targets: Sequence[Target], spec: BlockShapeSpec) -> str:
    for target in targets:
        try:
            resolve_block_shape(spec, target.weight_shape)
        except ValueError as error:
            return f"'{target.name}': {error}"
    return ""


def _uses(target: Target) -> int:
    """How often the weight is multiplied in one pass."""
    return 1 + len(target.shared_with)


def _cost(
    costs: CostModel,
    targets: Sequence[Target],
    spec: BlockShapeSpec,
    tokens: int,
    sparsity: float,
) -> BlockShapeCost:
    time, size = 0.0, 0
    for target in targets:
        shape = target.weight_shape
        block = resolve_block_shape(spec, shape)
        density = 1 - sparsity
        time += _uses(target) * costs.predict_sparse(tokens, shape, block, density)
        grid_rows = shape[0] // block[0]
        kept = round(density * grid_rows * (shape[1] // block[1]))
        size += 4 * (kept * block[0] * block[1] + kept + grid_rows + 1)
    return BlockShapeCost(spec, time, size)
