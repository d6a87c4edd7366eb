"""``save_packed``: a checkpoint that is small and loads packed."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..matrix import BlockSparseMatrix
from ..nn.linear import FIELDS, INPUT_SCALE, BlockSparseLinear
from ..nn.plan import plan_packing
from ..nn.shrink import stock_shapes, unshrunk
from .outdated import sample_renamed
from .packed_file import (
    FORMAT_VERSION,
    PACKED_FILE,
    dense_files,
    fields_for_file,
    metadata_for_file,
)

_DENSE_FILES = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)


def save_packed(model: nn.Module, path: str | Path, dense: bool = True) -> Path:
    """Write a transformers model with zero blocks so that it loads packed.

    Parameters
    ----------
    model : a pruned dense model, or one that ``pack_`` or ``from_pretrained`` packed.
        Its weights are not changed. Of a dense model every layer with zero blocks is
        packed in the file if that makes it smaller.
    path : directory; made when missing. A checkpoint in it is replaced, other files
        stay.
    dense : also write ``model.safetensors``, dense with its zeros, which is what loads
        without pybsp. False leaves it out: loading without pybsp is then an error, and
        an earlier dense checkpoint in ``path`` is removed because it is another model.

    Everything is written beside ``path`` first and then moved. Returns the path of
    ``model.pybsp.safetensors``.

    Before anything is written: ``TypeError`` for other than transformers models,
    ``ValueError`` when there are no zero blocks.
    """
    from transformers import PreTrainedModel

    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "save_packed writes checkpoints of transformers and needs its "
            f"PreTrainedModel; got {type(model).__name__}: use torch.save for others"
        )
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a directory; {path} is a file")
    model = unshrunk(model)
    matrices = packed_matrices(model)
    tensors = packed_state_dict(model, matrices)
    record = packing_record(model, matrices)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        model.save_pretrained(beside)
        if not dense:
            for file in _dense_files(beside):
                file.unlink()
        samples = sample_renamed(tensors, dense_files(beside))
        save_file(tensors, beside / PACKED_FILE, metadata_for_file(tensors, samples))
        config = json.loads((beside / "config.json").read_text("utf-8"))
        config["quantization_config"] = {**record, "format": "packed"}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (beside / "config.json").write_text(text, "utf-8")
        _publish(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path / PACKED_FILE


def packed_matrices(model: nn.Module) -> dict[str, BlockSparseMatrix]:
    """The weights that are stored packed, by layer name."""
    matrices: dict[str, BlockSparseMatrix] = {}
    for plan in plan_packing(model):
        report = plan.report
        if plan.linear is None or (
            report.packed and report.packed_bytes < report.dense_bytes
        ):
            matrix = plan.matrix()
            matrices.update(dict.fromkeys(plan.names, matrix))
    if not matrices:
        raise ValueError(
            f"{type(model).__name__} has too few zero blocks for packing to save "
            "space: prune more, or use model.save_pretrained"
        )
    return matrices


def packed_state_dict(
    model: nn.Module, matrices: Mapping[str, BlockSparseMatrix]
) -> dict[str, torch.Tensor]:
    """The tensors of the packed file: contiguous, none sharing memory with another."""
    skipped = {f"{name}.{field}" for name in matrices for field in (*FIELDS, "weight")}
    skipped.update(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in skipped or (id(tensor) in seen and key in tied):
            continue
        shared = id(tensor) in seen
        seen.add(id(tensor))
        tensor = tensor.detach().contiguous()
        tensors[key] = tensor.clone() if shared else tensor
    for name, matrix in matrices.items():
        shared = id(matrix) in seen
        seen.add(id(matrix))
        fields = fields_for_file(matrix)
        input_scale = getattr(model.get_submodule(name), INPUT_SCALE, None)
        if input_scale is not None:
            fields[INPUT_SCALE] = input_scale.clone()
        for field, tensor in fields.items():
            tensors[f"{name}.{field}"] = tensor.clone() if shared else tensor
    return tensors


def packing_record(
    model: nn.Module, matrices: Mapping[str, BlockSparseMatrix] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of a model with packed layers, in the dense format.

    Notes in an earlier record of the model are kept. ``matrices`` default to the packed
    layers of ``model`` and are then added to the modules of the earlier record.
    """
    record = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    record = dict(record if isinstance(record, Mapping) else record.to_dict())
    if record.get("quant_method", "pybsp") != "pybsp":
        raise ValueError(
            f"the model is quantized by {record['quant_method']!r}: dequantize it first"
        )
    modules = {} if matrices is not None else dict(record.get("modules") or {})
    if matrices is None:
        matrices = {
            name: module.matrix
            for name, module in model.named_modules()
            if isinstance(module, BlockSparseLinear)
        }
    shapes = {name: matrix.block_shape for name, matrix in matrices.items()}
    modules.update({name: list(shape) for name, shape in shapes.items()})
    stock = stock_shapes(model)
    sizes = [stock.get(name, matrix.shape) for name, matrix in matrices.items()]
    total = sum(rows * cols for rows, cols in sizes)
    kept = sum(matrix.values.numel() for matrix in matrices.values())
    usual = Counter(shapes.values()).most_common(1)[0][0]
    rounded = [
        kind
        for kind in (torch.int8, torch.bfloat16)
        if any(matrix.dtype == kind for matrix in matrices.values())
    ]
    dtype = str(rounded[0]).removeprefix("torch.") if rounded else "float32"
    scales = {
        name: module.static_scale
        for name, module in model.named_modules()
        if isinstance(module, BlockSparseLinear) and module.static_scale
    }
    # Of a model with both, a dense file loads int8 alone: it holds the other numbers.
    float32 = [
        name for name, matrix in matrices.items() if matrix.dtype not in rounded[:1]
    ]
    for entry in ("dtype", "input_scales", "float32_modules"):
        record.pop(entry, None)
    return {
        "block_shape": list(usual),
        "sparsity": round(1 - kept / total, 6),
        **record,
        "quant_method": "pybsp",
        "format": "dense",
        "format_version": FORMAT_VERSION,
        "modules": modules,
        **({"dtype": dtype} if rounded else {}),
        **({"input_scales": scales} if scales else {}),
        **({"float32_modules": float32} if rounded and float32 else {}),
        "pybsp_version": version("pybsp"),
    }


def _dense_files(directory: Path) -> list[Path]:
    return [file for file in directory.iterdir() if _DENSE_FILES.fullmatch(file.name)]


def _publish(beside: Path, path: Path) -> None:
    """Move a complete checkpoint into place, the file that names the others last."""
    if not path.exists():
        beside.rename(path)
        return
    files = sorted(beside.iterdir(), key=lambda file: file.name == "config.json")
    names = {file.name for file in files}
    for file in files:
        file.replace(path / file.name)
    for file in _dense_files(path):
        if file.name not in names:
            file.unlink()
