"""Block masks of an exact size, for one layer or for many ranked together.

The blocks of a pool of layers are ranked by score and the lowest are removed until the
pool's sparsity is met. With blocks of one size the number removed is exactly
``round(sparsity * blocks)``; with mixed sizes the removed weights are within half a
block of the target. Of equal scores the first stay, so every process that holds the
same weights arrives at the same masks. A layer with a threshold loses all blocks that
score no more than that, but for those that the cap protects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import ops
from .config import BlockPruningConfig, Ranking
from .targets import Target


@dataclass(frozen=True)
class Pool:
    """Layers whose blocks are ranked together, and the sparsity they reach.

    A ``balanced`` pool is one layer, which keeps equally many blocks in every line of
    its grid: in every row of blocks, or in every column where these are longer.
    """

    targets: tuple[Target, ...]
    sparsity: float
    balanced: bool = False

    @property
    def threshold(self) -> float | None:
        """Of a layer that is cut at one; such a layer is alone."""
        return self.targets[0].threshold


def pools(targets: Sequence[Target], cfg: BlockPruningConfig) -> list[Pool]:
    """One pool per layer, or one for all linear layers without a target of their
    own."""

    def is_alone(target: Target) -> bool:
        own = target.own_sparsity is not None or target.threshold is not None
        return own or target.is_embedding or cfg.scope != "global"

    single = [
        Pool(
            (t,),
            cfg.target_sparsity if t.own_sparsity is None else t.own_sparsity,
            balanced=cfg.scope == "balanced",
        )
        for t in targets
        if is_alone(t)
    ]
    rest = tuple(t for t in targets if not is_alone(t))
    return [Pool(rest, cfg.target_sparsity), *single] if rest else single


def block_scores(
    norms: torch.Tensor, block_size: int, ranking: Ranking
) -> torch.Tensor:
    """Scores of blocks from their norms; see ``ranking`` in the config."""
    if ranking == "norm":
        return norms
    rms = norms / math.sqrt(block_size)
    if ranking == "rms":
        return rms
    mean = rms.mean()
    return rms / mean if mean > 0 else rms


def norm_scores(
    norms: Mapping[str, torch.Tensor], targets: Mapping[str, Target], ranking: Ranking
) -> dict[str, torch.Tensor]:
    """``block_scores`` of every target."""
    return {
        name: block_scores(value, targets[name].block_size, ranking)
        for name, value in norms.items()
    }


def check_feasible(pool: Pool, max_layer_sparsity: float) -> None:
    """``ValueError`` when the cap leaves a pool more blocks than its target allows."""
    if pool.threshold is not None:
        return
    sizes = [t.block_size for t in pool.targets]
    blocks = [t.grid[0] * t.grid[1] for t in pool.targets]
    removable = sum(
        (n - protected_blocks(n, max_layer_sparsity)) * size
        for n, size in zip(blocks, sizes, strict=True)
    )
    total = sum(n * size for n, size in zip(blocks, sizes, strict=True))
    short = pool.sparsity * total - removable
    if short > max(sizes) / 2 or removable == 0:
        where = f"'{pool.targets[0].name}'"
        if len(pool.targets) > 1:
            where += f" and {len(pool.targets) - 1} more layers"
        raise ValueError(
            f"a sparsity of {pool.sparsity:g} cannot be reached in {where}: with "
            f"blocks of {max(sizes)} weights and max_layer_sparsity = "
            f"{max_layer_sparsity:g} at most {removable / total:.3g} can go; use "
            "smaller blocks or raise it"
        )


def select_masks(
    by_name: Mapping[str, torch.Tensor],
    pool: Pool,
    max_layer_sparsity: float,
    level: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Masks (True = kept) of ``level * pool.sparsity`` over the pool.

    ``by_name`` holds scores of blocks ``(out/r, in/c)`` by target name, comparable
    between layers. In each layer the best blocks that ``max_layer_sparsity`` protects
    are ranked above all others.
    """
    scores = []
    protected = 0
    for target in pool.targets:
        score = by_name[target.name]
        least = protected_blocks(score.numel(), max_layer_sparsity)
        protected += least
        if len(pool.targets) > 1 and least:
            score = score.masked_fill(ops.block_mask(score, least), math.inf)
        scores.append(score.flatten())
    flat = torch.cat(scores)
    if pool.threshold is not None:
        kept = flat > pool.threshold
        if int(kept.sum()) < protected:
            kept = ops.block_mask(flat, protected)
        return {pool.targets[0].name: kept.view(pool.targets[0].grid)}
    sizes = [t.block_size for t in pool.targets]
    keep = _blocks_to_keep(flat, scores, sizes, level * pool.sparsity)
    keep = max(keep, protected)
    if pool.balanced:
        return {
            pool.targets[0].name: balanced_mask(
                scores[0].view(pool.targets[0].grid), keep
            )
        }
    kept = ops.block_mask(flat, keep)
    parts = torch.split(kept, [score.numel() for score in scores])
    return {
        target.name: part.reshape(target.grid).clone()
        for target, part in zip(pool.targets, parts, strict=True)
    }


def balanced_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Mask of the ``keep`` best blocks under equal shares of all lines of the grid.

    Lines are the rows of ``scores``, or the columns where these hold more blocks. Where
    the shares are no whole number, the lines with the best next block keep one more.
    """
    rows, columns = scores.shape
    lines = scores if columns >= rows else scores.T
    share, more = divmod(keep, lines.shape[0])
    order = torch.sort(lines, dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(lines, dtype=torch.bool)
    kept.scatter_(1, order[:, :share], True)
    if more:
        following = order[:, share : share + 1]
        chosen = ops.block_mask(lines.gather(1, following).flatten().contiguous(), more)
        kept.scatter_(1, following, chosen[:, None])
    return (kept if columns >= rows else kept.T).contiguous()


def protected_blocks(blocks: int, max_layer_sparsity: float) -> int:
    """Of a layer's blocks, those that the cap keeps."""
    # the slack absorbs products such as 0.95 * 20 that fall just below an integer
    return blocks - math.floor(max_layer_sparsity * blocks + 1e-9)


def _blocks_to_keep(
    flat: torch.Tensor,
    scores: Sequence[torch.Tensor],
    sizes: Sequence[int],
    sparsity: float,
) -> int:
    if len(set(sizes)) == 1:
        return flat.numel() - math.floor(sparsity * flat.numel() + 0.5)
    counts = torch.tensor([score.numel() for score in scores])
    weights = torch.repeat_interleave(torch.tensor(sizes), counts).to(flat.device)
    order = torch.sort(flat, descending=True, stable=True).indices
    kept_weights = weights[order].cumsum(0)
    wanted = (1.0 - sparsity) * float(kept_weights[-1])
    return int((kept_weights - wanted).abs().argmin()) + 1
