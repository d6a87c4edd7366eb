"""Packed layers in a model that is being loaded, and back into a dense state."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import ops
from ..blocks import BlockShape
from ..nn.linear import FIELDS, BlockSparseLinear
from ..pruning.record import layer_recorded
from .outdated import same_weights
from .packed_file import PACKED_FILE, PackedLayer, dense_files

logger = logging.getLogger(__name__)


def settle_files(files: list[str]) -> None:
    """Turn ``files``, in place, to the dense ones if the packed one cannot serve.

    It is missing when somebody without pybsp saved the model again, who keeps the
    record in ``config.json``; it is outdated when they did so in the same directory.
    """
    packed = Path(files[0])
    if packed.name != PACKED_FILE:
        return
    dense = dense_files(packed.parent)
    if not packed.is_file():
        if not dense:
            raise OSError(
                f"{packed.parent} has neither {PACKED_FILE} nor model.safetensors: "
                "copy one of them there"
            )
        logger.info("%s has no %s; loading dense weights", packed.parent, PACKED_FILE)
        files[:] = [str(file) for file in dense]
    elif dense and not same_weights(packed, dense):
        logger.warning(
            "%s holds other weights than %s beside it, which was changed without "
            "pybsp; loading the latter: pybsp.save_packed renews the former",
            packed,
            dense[0].name,
        )
        files[:] = [str(file) for file in dense]


def check_record(
    recorded: Mapping[str, BlockShape], layers: Mapping[str, PackedLayer], file: Path
) -> None:
    """``ValueError`` unless ``config.json`` records just the layers that are packed."""
    for name in sorted({*recorded, *layers}):
        expected = recorded.get(name)
        found = layers[name].block_shape if name in layers else None
        if recorded and expected != found:
            raise ValueError(
                f"config.json and {file} are not from the same save: '{name}' has "
                f"block shape {expected} in the one, {found} in the other; save the "
                "model again"
            )


def check_input_scales(scales: Any) -> dict[str, float]:
    """``ValueError`` unless these are numbers by name, as ``config.json`` has them."""
    if not isinstance(scales, dict) or not all(
        isinstance(scale, float) for scale in scales.values()
    ):
        raise ValueError(
            f"quantization_config.input_scales maps names to numbers; got {scales!r}"
        )
    for scale in scales.values():
        ops.check_input_scale(scale)
    return dict(scales)


def check_layer_names(names: Any) -> list[str]:
    """``ValueError`` unless these are texts."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"quantization_config.float32_modules lists names of layers; got {names!r}"
        )
    return list(names)


def name_in_model(model: nn.Module, name: str, names: Container[str]) -> str | None:
    """What a layer of that name in a checkpoint is called in ``model``, if anything."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    # A head model may load what a base model saved, and the other way round.
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((candidate for candidate in candidates if candidate in names), None)


def recorded_name(model: nn.Module, name: str, names: Collection[str]) -> str | None:
    """What a layer of that name in the record is called in ``model``, if anything.

    The record may be that of any model around this one or inside of it.
    """
    return name_in_model(model, name, names) or layer_recorded(name, names)


def prepare_layers(
    model: nn.Module, layers: dict[str, PackedLayer], file: Path
) -> None:
    """Put unloaded packed layers where ``layers`` of the checkpoint ``file`` belong."""
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = 0
    for layer in layers.values():
        name = name_in_model(model, layer.name, modules)
        if name is None:
            continue
        linear = modules[name]
        rows, cols = layer.block_shape
        if (
            not isinstance(linear, nn.Linear)
            or linear.out_features != layer.block_rows * rows
            or linear.in_features % cols
        ):
            raise ValueError(
                f"'{layer.name}' in {file} has {layer.block_rows} block rows of shape "
                f"{layer.block_shape}, which does not fit {linear} of this model: "
                "config.json and the file are not from the same save"
            )
        packed = BlockSparseLinear.on_meta(
            linear, layer.block_shape, layer.nnz, layer.column_major, layer.dtype,
            layer.static,
        )  # fmt: skip
        model.set_submodule(name, packed)
        replaced += 1
    if not replaced:
        raise ValueError(
            f"none of the {len(layers)} packed layers in {file} exists in "
            f"{type(model).__name__}: load it with the class it was saved from"
        )


def finish_layers(model: nn.Module, file: Path) -> None:
    """Check what was loaded into packed layers; ``ValueError`` names file and layer."""
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            # Values stay in the mapped file. The kernels rely on the indices being as
            # they were when checked, so those are copied (int16 ones by conversion).
            for field in FIELDS[1:]:
                if (indices := getattr(module, field)).dtype == torch.int32:
                    setattr(module, field, indices.clone())
            try:
                module.matrix  # noqa: B018 (built and checked on access)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}: '{name}': {error}") from error
            if not module.is_int8 and not ops.all_finite(module.weight_values):
                raise ValueError(f"{file}: '{name}' holds NaN or infinite weights")
