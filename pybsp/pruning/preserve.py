"""Keep the zeros of a sparse model while it is fine-tuned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..blocks import BlockShape, BlockShapeSpec, grid_shape, resolve_block_shape
from .hooks import StepHooks, inner_optimizer, learning_rates
from .penalty import block_norms, mask_blocks_
from .record import by_layer, pruned_embeddings, recorded_block_shape
from .targets import check_not_packed, linear_modules, unwrap_model


@dataclass(frozen=True)
class _Kept:
    """One weight, the blocks of it that live, and their shape ((1, 1): elements)."""

    name: str
    mask: torch.Tensor
    block_shape: BlockShape


class PreservedSparsity:
    """Handle of ``preserve_sparsity``; ``remove()`` (or leaving ``with``) ends it."""

    def __init__(
        self, model: nn.Module, kept: list[_Kept], optimizer: Optimizer
    ) -> None:
        self._model = model
        self._kept = kept
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the layers whose zeros are kept."""
        return tuple(entry.name for entry in self._kept)

    def remove(self) -> None:
        """Let the weights move freely again; a second call does nothing."""
        self._hooks.remove()

    def __enter__(self) -> PreservedSparsity:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _before_step(self, _: Optimizer) -> None:
        for entry in self._kept:
            grad = self._model.get_parameter(f"{entry.name}.weight").grad
            if grad is not None:
                _mask_(grad, entry)

    def _after_step(self, _: Optimizer) -> None:
        for entry in self._kept:
            _mask_(self._model.get_parameter(f"{entry.name}.weight").detach(), entry)


def preserve_sparsity(
    model: nn.Module,
    optimizer: Any,
    block_shape: BlockShapeSpec | None = None,
) -> PreservedSparsity:
    """Keep what is zero now at zero through every step of ``optimizer``.

    Gradients are masked before a step and weights zeroed after it, so momentum and
    weight decay cannot revive anything. Blocks are those of ``block_shape``, else those
    recorded by the pruner (on the modules or in ``model.config``); a layer with neither
    keeps its single zero elements. Layers without zeros are left alone, and so is one
    that is zero throughout with no recorded block shape: that is an initialisation.
    Embeddings count only where the pruner has recorded it.

    Raises:
        ValueError: when no linear layer has zeros to keep, or ``block_shape`` does not
            divide a layer that has zeros.
    """
    inner = inner_optimizer(optimizer)
    model = unwrap_model(model)
    held = learning_rates(inner)
    kept: list[_Kept] = []
    seen: set[int] = set()
    linears = linear_modules(model)
    in_config = _in_config(model, linears)
    for name, module in linears.items():
        if id(module.weight) in seen or id(module.weight) not in held:
            continue
        seen.add(id(module.weight))
        entry = _entry(name, module, block_shape, in_config)
        if entry is not None:
            kept.append(entry)
    for name, shape in pruned_embeddings(model).items():
        table = model.get_parameter(f"{name}.weight")
        if id(table) in held and id(table) not in seen:
            seen.add(id(table))
            mask = block_norms(table.detach(), shape) != 0
            kept.append(_Kept(name, mask, shape))
    if not kept:
        check_not_packed(model)
        raise ValueError(
            "no linear layer that the optimizer trains has zeros to preserve; load the "
            "pruned checkpoint first, or check block_shape"
        )
    return PreservedSparsity(model, kept, inner)


def _entry(
    name: str,
    module: nn.Linear,
    given: BlockShapeSpec | None,
    in_config: Mapping[str, Sequence[int]],
) -> _Kept | None:
    weight = module.weight.detach()
    zeros = weight.numel() - int(weight.count_nonzero())
    if zeros == 0:
        return None
    shape = _block_shape(name, module, given, in_config)
    if shape is None:
        if zeros == weight.numel():
            return None
        return _Kept(name, weight != 0, (1, 1))
    mask = block_norms(weight, shape) != 0
    return None if bool(mask.all()) else _Kept(name, mask, shape)


def _block_shape(
    name: str,
    module: nn.Linear,
    given: BlockShapeSpec | None,
    in_config: Mapping[str, Sequence[int]],
) -> BlockShape | None:
    if given is not None:
        try:
            return resolve_block_shape(given, module.weight.shape)
        except ValueError as error:
            raise ValueError(f"module '{name}' has zeros, but {error}") from None
    recorded = recorded_block_shape(module)
    if recorded is not None:
        return recorded
    listed = in_config.get(name)
    if listed is None:
        return None
    shape = (int(listed[0]), int(listed[1]))
    try:
        grid_shape(module.weight.shape, shape)
    except ValueError as error:
        raise ValueError(f"module '{name}' is recorded, but {error}") from None
    return shape


def _in_config(model: nn.Module, names: Collection[str]) -> dict[str, Sequence[int]]:
    """Block shapes that the record in ``model.config`` has, by ``names``."""
    record = getattr(getattr(model, "config", None), "quantization_config", None)
    modules = record.get("modules", {}) if isinstance(record, dict) else {}
    return by_layer(modules, names)


def _mask_(tensor: torch.Tensor, entry: _Kept) -> None:
    if entry.block_shape == (1, 1):
        tensor.mul_(entry.mask)
    else:
        mask_blocks_(tensor, entry.mask, entry.block_shape)
