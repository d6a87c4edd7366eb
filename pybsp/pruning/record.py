"""The record of a pruned model: which modules have which blocks.

It is what ``config.json`` carries as ``quantization_config``, so that a checkpoint that
is dense with zero blocks says how to pack itself, and loads anywhere without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import nn

from ..blocks import BlockShape, BlockShapeSpec, block_view, check_block_shape
from .targets import Target, embedding_modules, linear_modules, unwrap_model

FORMAT_VERSION = 1

T = TypeVar("T")


def recorded_block_shape(module: nn.Module) -> BlockShape | None:
    """``module.pybsp_block_shape`` when a pruner has set it."""
    shape = getattr(module, "pybsp_block_shape", None)
    return None if shape is None else check_block_shape(shape)


def layer_recorded(recorded: str, names: Collection[str]) -> str | None:
    """Which of ``names`` a recorded one means, maybe as a model around theirs or inside
    of it calls that; None where it is none of them or might be several."""
    if recorded in names:
        return recorded
    if inner := [name for name in names if recorded.endswith(f".{name}")]:
        return max(inner, key=len)
    outer = [name for name in names if name.endswith(f".{recorded}")]
    return outer[0] if len(outer) == 1 else None


def by_layer(recorded: Mapping[str, T], names: Collection[str]) -> dict[str, T]:
    """``recorded`` by ``names``. What is recorded by its own name is not taken for
    another."""
    found = {}
    for key, value in recorded.items():
        name = layer_recorded(key, names)
        if name is not None and (name == key or name not in recorded):
            found[name] = value
    return found


def zero_blocks(weight: torch.Tensor, block_shape: BlockShape) -> torch.Tensor:
    """Which blocks ``(out/r, in/c)`` have weights that are all exactly zero."""
    return (block_view(weight.detach(), block_shape) == 0).flatten(2).all(2)


def count_zero_blocks(weight: torch.Tensor, block_shape: BlockShape) -> int:
    """How many ``zero_blocks`` there are."""
    return int(zero_blocks(weight, block_shape).sum())


def pruned_embeddings(model: nn.Module) -> dict[str, BlockShape]:
    """Name -> block shape of the embedding tables that carry one."""
    shapes = {n: recorded_block_shape(m) for n, m in embedding_modules(model).items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def record_block_shapes(
    model: nn.Module, targets: Iterable[Target], block_shape: BlockShapeSpec
) -> dict[str, Any]:
    """Set ``pybsp_block_shape`` on every pruned module and, when the model has a
    ``config`` object, its ``quantization_config``. Returns that record; the config of
    a module inside of ``model`` gets one of what lies in it, by its own names."""
    for target in targets:
        for name in (target.name, *target.shared_with):
            module = model.get_submodule(name)
            module.pybsp_block_shape = target.block_shape  # type: ignore[assignment]
    record = sparsity_record(model, block_shape)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return record
    model = unwrap_model(model)
    # A SentenceTransformer hands out the config of the model inside of it.
    owner = next((m for m in model.modules() if vars(m).get("config") is config), model)
    if owner is model:
        config.quantization_config = record
    elif any(recorded_block_shape(m) for m in linear_modules(owner).values()):
        config.quantization_config = sparsity_record(owner, block_shape)
    return record


def sparsity_record(
    model: nn.Module, block_shape: BlockShapeSpec | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of a pruned model, dense with zero blocks.

    ``modules`` maps the name of every linear layer with a recorded block shape to
    ``[r, c]``; ``sparsity`` is the share of their weights that lies in zero blocks.
    ``embeddings`` does the same for tables, if any were pruned.
    ``block_shape`` is noted as given, for example ``(1, "in/8")``; by default it is the
    most frequent shape of the modules.

    Raises:
        ValueError: when no module carries ``pybsp_block_shape``.
    """
    modules: dict[str, list[int]] = {}
    weights = removed = 0
    seen: set[int] = set()
    for name, linear in linear_modules(unwrap_model(model)).items():
        shape = recorded_block_shape(linear)
        if shape is None:
            continue
        modules[name] = list(shape)
        if id(linear.weight) in seen:
            continue
        seen.add(id(linear.weight))
        weights += linear.weight.numel()
        removed += count_zero_blocks(linear.weight, shape) * shape[0] * shape[1]
    if not modules:
        raise ValueError(
            "no linear layer carries a block shape; prune the model first or set "
            "linear.pybsp_block_shape = (r, c) where it has zero blocks"
        )
    if block_shape is None:
        counts = Counter((shape[0], shape[1]) for shape in modules.values())
        block_shape = counts.most_common(1)[0][0]
    record: dict[str, Any] = {
        "quant_method": "pybsp",
        "format": "dense",
        "format_version": FORMAT_VERSION,
        "block_shape": list(block_shape),
        "modules": modules,
        "sparsity": round(removed / max(weights, 1), 6),
        "pybsp_version": version("pybsp"),
    }
    embeddings = pruned_embeddings(unwrap_model(model))
    if embeddings:
        record["embeddings"] = {name: list(shape) for name, shape in embeddings.items()}
    return record
