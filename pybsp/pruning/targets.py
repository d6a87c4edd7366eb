"""Which linear layers and embeddings of a model are pruned, and in which blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .. import ops
from ..blocks import BlockShape, grid_shape, resolve_block_shape
from .config import BlockPruningConfig
from .names import DEFAULT_EXCLUDED, check_each_matches, is_named, is_selected, listed


@dataclass(frozen=True)
class Target:
    """One weight to prune.

    ``name`` is the module's name in the unwrapped model; ``shared_with`` are further
    modules that hold the same weight.
    """

    name: str
    weight_shape: tuple[int, int]
    block_shape: BlockShape
    own_sparsity: float | None = None
    shared_with: tuple[str, ...] = ()
    threshold: float | None = None
    is_embedding: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across."""
        return grid_shape(self.weight_shape, self.block_shape)

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return self.block_shape[0] * self.block_shape[1]


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` by name, those sharing a weight included."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }


def embedding_modules(model: nn.Module) -> dict[str, nn.Embedding]:
    """Every ``nn.Embedding`` by name, those sharing a table included."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
    }


def select_targets(model: nn.Module, cfg: BlockPruningConfig) -> list[Target]:
    """The weights that ``cfg`` prunes in ``model``, in the model's order.

    Raises:
        ValueError: when nothing matches, a name or an override that is given matches
            nothing, a layer that matches is packed or has an adapter, a block shape
            does not divide a weight, a named weight is tied to something that is not a
            linear layer, or a weight is sharded, of another type than float32 and
            bfloat16, or not finite.
    """
    linears = linear_modules(model)
    _check_exclusions_match(model, list(linears), cfg)
    check_not_packed(model, cfg)
    _check_not_adapted(model, cfg)
    tied = _weights_outside_linears(model)
    matched: dict[str, nn.Linear] = {}
    shared: dict[int, list[str]] = {}
    for name, module in linears.items():
        if not is_selected(name, cfg):
            continue
        if id(module.weight) in tied:
            if cfg.target_modules == "all-linear":
                continue
            raise ValueError(
                f"the weight of '{name}' is tied to {tied[id(module.weight)]!r}, which "
                "is not a linear layer; exclude the module or untie the weights"
            )
        _check_prunable(name, module.weight, cfg)
        shared.setdefault(id(module.weight), []).append(name)
        if module.weight.requires_grad and len(shared[id(module.weight)]) == 1:
            matched[name] = module
    if not matched:
        check_not_packed(model)
        raise ValueError(_nothing_matched(linears, cfg))
    if cfg.target_modules != "all-linear":
        check_each_matches(
            "target_modules", cfg.target_modules, list(linears), "linear layer",
            is_named,
        )  # fmt: skip
    chosen: dict[str, nn.Linear | nn.Embedding] = {
        **matched, **_embeddings(model, cfg, shared),
    }  # fmt: skip
    _check_overrides_match(chosen, cfg)
    return [
        _target(name, module, cfg, tuple(shared[id(module.weight)][1:]))
        for name, module in chosen.items()
    ]


def _embeddings(
    model: nn.Module, cfg: BlockPruningConfig, shared: dict[int, list[str]]
) -> dict[str, nn.Embedding]:
    """The embedding tables that ``cfg`` prunes, each once, by name. Adds all names of
    a table to ``shared``."""
    tables = embedding_modules(model)
    found = {n: m for n, m in tables.items() if is_named(n, cfg.embedding_modules)}
    check_each_matches(
        "embedding_modules", cfg.embedding_modules, list(tables), "embedding table",
        is_named,
    )  # fmt: skip
    for name, module in found.items():
        shared.setdefault(id(module.weight), []).append(name)
        _check_prunable(name, module.weight, cfg)
        if module.sparse or not module.weight.requires_grad:
            raise ValueError(
                f"the embedding '{name}' is frozen or has sparse gradients; set "
                "requires_grad_(True) and sparse=False, or leave it out"
            )
    return {n: m for n, m in found.items() if shared[id(m.weight)][0] == n}


def _weights_outside_linears(model: nn.Module) -> dict[int, str]:
    return {
        id(parameter): f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for key, parameter in module.named_parameters(recurse=False)
    }


def _check_prunable(name: str, weight: torch.Tensor, cfg: BlockPruningConfig) -> None:
    sharded = type(weight).__name__ in ("DTensor", "FlatParameter")
    sharded = sharded or getattr(weight, "_is_flat_param", False)
    if sharded or hasattr(weight, "ds_id") or weight.dim() != 2:
        raise ValueError(
            f"the weight of '{name}' is sharded or flattened (shape "
            f"{tuple(weight.shape)}), so its blocks cannot be seen; train with one "
            "process or with DistributedDataParallel instead of FSDP or DeepSpeed ZeRO"
        )
    if weight.dtype not in ops.TRAINED_DTYPES:
        raise ValueError(
            f"the weight of '{name}' is {weight.dtype}; pruning trains float32 or "
            "bfloat16 weights: load the model with dtype=torch.float32 (mixed "
            "precision may stay on)"
        )
    on_weights = cfg.penalised and cfg.penalty != "gradient"
    if on_weights and weight.dtype == torch.bfloat16:
        raise ValueError(
            f"the weight of '{name}' is bfloat16, and penalty={cfg.penalty!r} moves "
            "weights by less than bfloat16 resolves: use penalty='gradient', or load "
            "the model with dtype=torch.float32"
        )
    if weight.is_meta:
        raise ValueError(f"the weight of '{name}' is on the meta device; load it first")
    if not torch.isfinite(weight.detach()).all():
        raise ValueError(
            f"the weight of '{name}' has NaN or infinite values; blocks cannot be "
            "ranked: start from a sound checkpoint"
        )


def _override(name: str, cfg: BlockPruningConfig) -> Mapping[str, Any]:
    merged: dict[str, Any] = {}
    for pattern, settings in cfg.overrides.items():
        if fnmatchcase(name, pattern):
            # a layer has one of the two: the one that was set last
            if "target_sparsity" in settings:
                merged.pop("threshold", None)
            if "threshold" in settings:
                merged.pop("target_sparsity", None)
            merged.update(settings)
    return merged


def _target(
    name: str,
    module: nn.Linear | nn.Embedding,
    cfg: BlockPruningConfig,
    shared: tuple[str, ...],
) -> Target:
    settings = _override(name, cfg)
    shape = (module.weight.shape[0], module.weight.shape[1])
    try:
        block_shape = resolve_block_shape(
            settings.get("block_shape", cfg.block_shape), shape
        )
    except ValueError as error:
        raise ValueError(f"module '{name}': {error}") from None
    own_sparsity = settings.get("target_sparsity")
    threshold = settings.get("threshold", cfg.threshold)
    if own_sparsity is not None:
        threshold = None
    return Target(
        name, shape, block_shape, own_sparsity, shared, threshold,
        is_embedding=isinstance(module, nn.Embedding),
    )  # fmt: skip


def _check_exclusions_match(
    model: nn.Module, linears: list[str], cfg: BlockPruningConfig
) -> None:
    wanted = cfg.exclude_modules or ()
    if not isinstance(wanted, str):
        # no model has all of the default ones, which a user's list may repeat
        wanted = tuple(name for name in wanted if name not in DEFAULT_EXCLUDED)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    names = list(dict.fromkeys([*linears, *modules]))
    check_each_matches("exclude_modules", wanted, names, "module")


def _check_overrides_match(
    matched: Mapping[str, object], cfg: BlockPruningConfig
) -> None:
    for pattern in cfg.overrides:
        if not any(fnmatchcase(name, pattern) for name in matched):
            raise ValueError(
                f"overrides[{pattern!r}] matches none of the {len(matched)} targeted "
                f"modules, such as {next(iter(matched))!r}"
            )


def check_not_packed(model: nn.Module, cfg: BlockPruningConfig | None = None) -> None:
    """``ValueError`` for a model with packed layers, of those that ``cfg`` selects."""
    for name, module in model.named_modules(remove_duplicate=False):
        if "weight_crow_indices" not in module._buffers:
            continue
        if cfg is None or is_selected(name, cfg):
            raise ValueError(
                f"'{name}' is packed: only its kept blocks exist and train; call "
                "model.dequantize() or pybsp.nn.unpack_(model) first to work on dense "
                "weights"
            )


def _check_not_adapted(model: nn.Module, cfg: BlockPruningConfig) -> None:
    """``ValueError`` for layers that peft has wrapped, with their adapters inside."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not hasattr(module._modules.get("base_layer"), "weight"):
            continue
        inside = (f"{name}.{part}" for part in linear_modules(module))
        if any(is_selected(part.lstrip("."), cfg) for part in inside):
            raise ValueError(
                f"'{name}' has an adapter, which would fill zero blocks when it is "
                "merged; call model = model.merge_and_unload() first"
            )


def _nothing_matched(linears: Mapping[str, nn.Linear], cfg: BlockPruningConfig) -> str:
    if not linears:
        return "the model has no nn.Linear, so there is nothing to prune"
    names = list(linears)
    selected = [name for name in names if is_selected(name, cfg)]
    if selected and not any(linears[name].weight.requires_grad for name in selected):
        return (
            f"every matched module has a frozen weight ({', '.join(selected[:6])}); "
            "set requires_grad_(True) on what is to be pruned"
        )
    hint = (
        "; by default task heads and embeddings are left out, exclude_modules=() "
        "takes them in"
        if cfg.exclude_modules is None
        else f"; exclude_modules={cfg.exclude_modules!r}"
    )
    return (
        f"target_modules={cfg.target_modules!r} matches no prunable linear layer{hint}"
        f". The model's linear layers: {listed(names)}"
    )
