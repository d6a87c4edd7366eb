"""Whether a packed file still belongs to the dense checkpoint beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..nn.linear import SCALES
from .packed_file import (
    SAMPLES_KEY,
    PackedLayer,
    open_checkpoint,
    read_packed_layers,
)


def sample_renamed(
    tensors: Mapping[str, torch.Tensor], dense: list[Path]
) -> dict[str, str]:
    """Digests of samples, by name, of what a dense checkpoint holds under names that
    ``tensors`` of the packed file have not.

    transformers saves some models, such as ViT, under the names of its older versions.
    """
    names = {key.removesuffix("_values") for key in tensors}
    found = {}
    for file in dense:
        with open_checkpoint(file) as checkpoint:
            for key in checkpoint.keys():  # noqa: SIM118 (no mapping)
                if key not in names:
                    found[key] = _digest(checkpoint, key)
    return found


def same_weights(packed_file: Path, dense: list[Path]) -> bool:
    """Whether the two hold the same model.

    Somebody without pybsp may have trained on and saved over the dense file. Compared
    are samples, which any training step changes: the first, middle and last row of
    every tensor or, for packed weights, block row. Where the dense file has other
    names than the packed one, these are digests in the header of the latter.
    """
    if any(file.suffix != ".safetensors" for file in dense):
        return True
    with open_checkpoint(packed_file) as packed:
        layers = read_packed_layers([packed_file])
        keys = set(packed.keys())
        samples = _read_samples(packed, packed_file)
        for file in dense:
            with open_checkpoint(file) as checkpoint:
                for key in checkpoint.keys():  # noqa: SIM118 (no mapping)
                    layer = layers.get(key.removesuffix(".weight"))
                    if layer is not None:
                        same = _same_block_rows(packed, layer, checkpoint, key)
                    elif key in keys:
                        same = _same_rows(packed, checkpoint, key)
                    else:
                        same = (
                            key not in samples
                            or _digest(checkpoint, key) == samples[key]
                        )
                    if not same:
                        return False
    return True


def _samples(size: int) -> set[int]:
    return {0, size // 2, size - 1} if size else set()


def _read_samples(packed: Any, file: Path) -> dict[str, str]:
    text = (packed.metadata() or {}).get(SAMPLES_KEY, "{}")
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: {SAMPLES_KEY} is damaged ({error}): save the model again"
        ) from error


def _digest(checkpoint: Any, key: str) -> str:
    """Of the shape of a tensor and the rows that are compared of others."""
    header = checkpoint.get_slice(key)
    shape = header.get_shape()
    digest = hashlib.sha256(str(shape).encode())
    if len(shape) < 2:
        rows = [checkpoint.get_tensor(key)]
    else:
        rows = [header[i : i + 1] for i in sorted(_samples(shape[0]))]
    for row in rows:
        # Adding makes the two zeros one, which compare equal.
        digest.update((row.double() + 0.0).numpy().tobytes())
    return digest.hexdigest()[:16]


def _same_rows(packed: Any, dense: Any, key: str) -> bool:
    left, right = packed.get_slice(key), dense.get_slice(key)
    shape = left.get_shape()
    if shape != right.get_shape():
        return False
    if len(shape) < 2:
        return torch.equal(packed.get_tensor(key), dense.get_tensor(key))
    rows = _samples(shape[0])
    return all(torch.equal(left[i : i + 1], right[i : i + 1]) for i in rows)


def _same_block_rows(packed: Any, layer: PackedLayer, dense: Any, key: str) -> bool:
    rows, cols = layer.block_shape
    weight = dense.get_slice(key)
    shape = weight.get_shape()
    if len(shape) != 2 or shape[0] != layer.block_rows * rows or shape[1] % cols:
        return False
    crow_indices = packed.get_tensor(f"{layer.name}.weight_crow_indices").long()
    values = packed.get_slice(f"{layer.name}.weight_values")
    columns = packed.get_slice(f"{layer.name}.weight_col_indices")
    for row in _samples(layer.block_rows):
        begin, end = crow_indices[row : row + 2].tolist()
        strip = torch.zeros(shape[1] // cols, rows, cols)
        if not 0 <= begin <= end <= layer.nnz:
            return True  # Damaged, not outdated: loading it says what is wrong.
        if end > begin:
            where = columns[begin:end].long()
            if not 0 <= int(where.min()) <= int(where.max()) < strip.shape[0]:
                return True
            blocks = values[begin:end]
            blocks = blocks.transpose(1, 2) if layer.column_major else blocks
            if layer.dtype == torch.int8:
                scales = packed.get_slice(f"{layer.name}.{SCALES}")
                of_row = scales[row * rows : (row + 1) * rows]
                blocks = blocks.float() * of_row[:, None]
            strip[where] = blocks.float()
        block_row = weight[row * rows : (row + 1) * rows].float()
        if not torch.equal(strip.transpose(0, 1).reshape(rows, shape[1]), block_row):
            return False
    return True
