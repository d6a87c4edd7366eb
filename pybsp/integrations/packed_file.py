"""The packed checkpoint ``model.pybsp.safetensors``.

Per packed layer it holds ``NAME.weight_values`` (float32, bfloat16 or int8
``(nnz, c, r)``: every block column by column, as the kernels read it, so that a loaded
layer computes on the mapped file), ``NAME.weight_crow_indices`` and
``NAME.weight_col_indices`` (int16 where the numbers fit, else int32). int8 values come
with ``NAME.weight_scales`` (float32 ``(out,)``) and, where the scale of the inputs is
known, ``NAME.input_scale`` (float32).
Everything else is stored as in ``model.safetensors``. The name is one that no loader
takes for an ordinary checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..blocks import BlockShape
from ..matrix import BlockSparseMatrix
from ..nn.linear import FIELDS, INPUT_SCALE, SCALES

PACKED_FILE = "model.pybsp.safetensors"
#: Of the record in ``config.json``.
FORMAT_VERSION = 1
#: Of the packed file: 3 where a layer is int8 or bfloat16, else 2. Version 1,
#: ``(nnz, r, c)``, is read too.
FILE_VERSION = 3
FLOAT32_VERSION = 2
#: Its key in the header of the file.
VERSION_KEY = "pybsp_format_version"
#: Beside it, where the dense file has other names: ``sample_renamed``, as JSON.
SAMPLES_KEY = "pybsp_dense_samples"
#: Where the tensors of a file begin is a multiple of this: no small block of a usual
#: layer then lies in two cache lines, which costs a call with one token a tenth.
ALIGNMENT = 64

#: In the order in which a file holds tensors of them.
_TYPES = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8",
    "BOOL",
)  # fmt: skip
#: Of ``weight_values``.
_VALUE_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}
_INDEX_TYPES = ("I8", "I16", "I32", "I64", "U8")


@dataclass(frozen=True)
class PackedLayer:
    """What the header of a checkpoint says about one packed weight."""

    name: str
    nnz: int
    block_shape: BlockShape
    block_rows: int
    #: Whether its values are ``(nnz, c, r)``.
    column_major: bool
    dtype: torch.dtype = torch.float32
    #: Whether it has an ``input_scale``.
    static: bool = False


def fields_for_file(matrix: BlockSparseMatrix) -> dict[str, torch.Tensor]:
    """``matrix`` as it is stored: the values themselves, indices of the least type."""
    scales = {} if matrix.scales is None else {SCALES: matrix.scales.contiguous()}
    return {
        "weight_values": matrix.values.detach().transpose(1, 2).contiguous(),
        "weight_crow_indices": _compact(matrix.crow_indices, matrix.nnz),
        "weight_col_indices": _compact(
            matrix.col_indices, matrix.shape[1] // matrix.block_shape[1]
        ),
        **scales,
    }


def _compact(indices: torch.Tensor, largest: int) -> torch.Tensor:
    dtype = torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32
    return indices.to(dtype)


def metadata_for_file(
    tensors: Mapping[str, torch.Tensor], samples: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What the header says beside ``tensors``, padded so that they begin aligned."""
    rounded = any(
        key.endswith(f".{FIELDS[0]}") and tensor.dtype != torch.float32
        for key, tensor in tensors.items()
    )
    version = FILE_VERSION if rounded else FLOAT32_VERSION
    metadata = {"format": "pt", VERSION_KEY: str(version), "padding": ""}
    if samples:
        metadata[SAMPLES_KEY] = json.dumps(samples, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    # As safetensors writes it. If it did otherwise, or with a type that is not in the
    # list, only the alignment would be lost.
    place = {name: number for number, name in enumerate(_TYPES)}
    types = {key: _dtype_name(tensors[key].dtype) for key in tensors}
    for key in sorted(tensors, key=lambda key: (place.get(types[key], -1), key)):
        begin, end = end, end + tensors[key].nbytes
        header[key] = {
            "dtype": types[key],
            "shape": list(tensors[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    metadata["padding"] = " " * (-(8 + len(text)) % ALIGNMENT)
    return metadata


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype in (torch.bool, torch.bfloat16):
        return {torch.bool: "BOOL", torch.bfloat16: "BF16"}[dtype]
    kind = "F" if dtype.is_floating_point else "I" if dtype.is_signed else "U"
    return f"{kind}{8 * dtype.itemsize}"


def read_packed_layers(files: Iterable[Path]) -> dict[str, PackedLayer]:
    """The packed weights in these checkpoint files, from their headers alone.

    ``ValueError`` when a file is damaged, made by a newer version, or incomplete.
    """
    layers = {}
    for file in files:
        with open_checkpoint(file) as checkpoint:
            version = (checkpoint.metadata() or {}).get(VERSION_KEY, "1")
            if version not in map(str, range(1, FILE_VERSION + 1)):
                raise ValueError(
                    f"{file} has packed format version {version}; this pybsp reads "
                    f"versions 1 to {FILE_VERSION}: upgrade pybsp"
                )
            keys = set(checkpoint.keys())
            names = {
                key[: -len(field) - 1]
                for key in keys
                for field in FIELDS
                if key.endswith(f".{field}")
            }
            for name in sorted(names):
                layers[name] = _read_layer(checkpoint, keys, name, file, version != "1")
    return layers


def _read_layer(
    checkpoint: Any, keys: set[str], name: str, file: Path, column_major: bool
) -> PackedLayer:
    missing = [field for field in FIELDS if f"{name}.{field}" not in keys]
    if missing:
        raise ValueError(
            f"{file} lacks {', '.join(missing)} of '{name}': the file is incomplete; "
            "save the model again"
        )
    headers = [checkpoint.get_slice(f"{name}.{field}") for field in FIELDS]
    values, crow_indices, col_indices = (header.get_shape() for header in headers)
    types = [header.get_dtype() for header in headers]
    dtype = _VALUE_TYPES.get(types[0] if column_major or types[0] == "F32" else "")
    if (
        (len(values), len(crow_indices), len(col_indices)) != (3, 1, 1)
        or col_indices[0] != values[0]
        or crow_indices[0] < 1
        or not (values[1] and values[2])
        or dtype is None
        or not set(types[1:]) <= set(_INDEX_TYPES)
    ):
        raise ValueError(
            f"{file}: '{name}' is no block-sparse weight: values {values} {types[0]}, "
            f"crow_indices {crow_indices} {types[1]}, col_indices {col_indices} "
            f"{types[2]}; save the model again"
        )
    nnz, *extents = values
    rows, cols = reversed(extents) if column_major else extents
    block_rows = crow_indices[0] - 1
    static = False
    if dtype == torch.int8:
        _check_float(checkpoint, keys, f"{name}.{SCALES}", [block_rows * rows], file)
        if static := f"{name}.{INPUT_SCALE}" in keys:
            _check_float(checkpoint, keys, f"{name}.{INPUT_SCALE}", [], file)
    return PackedLayer(name, nnz, (rows, cols), block_rows, column_major, dtype, static)


def _check_float(
    checkpoint: Any, keys: set[str], key: str, shape: list[int], file: Path
) -> None:
    if key not in keys:
        raise ValueError(
            f"{file} lacks {key}, which int8 values need: the file is incomplete; save "
            "the model again"
        )
    header = checkpoint.get_slice(key)
    if header.get_dtype() != "F32" or header.get_shape() != shape:
        raise ValueError(
            f"{file}: {key} must be F32 {shape}; got {header.get_dtype()} "
            f"{header.get_shape()}: save the model again"
        )


@contextmanager
def open_checkpoint(file: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` with a one-line ``ValueError`` for a damaged file."""
    try:
        with safe_open(file, framework="pt") as checkpoint:
            yield checkpoint
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or truncated ({error}): save or download it again"
        ) from error


def dense_files(directory: Path) -> list[Path]:
    """The dense checkpoint in ``directory``: its file, its shards, or nothing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = directory / name
        if file.is_file():
            return [file]
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            return [directory / shard for shard in sorted(set(weight_map.values()))]
    return []
