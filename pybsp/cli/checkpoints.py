"""Opening a pruned checkpoint folder, dense or packed, of any transformers class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..blocks import BlockShape, check_block_shape
from .errors import UsageError, WorkError, one_line
from .models import quiet
from .workspace import read_json

CONFIG = "config.json"
DENSE_FILE = "model.safetensors"
PACKED_FILE = "model.pybsp.safetensors"


def checked_folder(folder: Path) -> Path:
    """``folder`` when it can be a checkpoint, else ``UsageError``."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a directory")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} has no {CONFIG}: no transformers model lies there")
    return folder


def sparsity_record(folder: Path) -> dict[str, Any] | None:
    """pybsp's entry in ``config.json``; None when there is none."""
    record = read_json(folder / CONFIG).get("quantization_config")
    if not isinstance(record, dict) or record.get("quant_method") != "pybsp":
        return None
    return record


def recorded_modules(
    record: Mapping[str, Any] | None, entry: str = "modules"
) -> dict[str, BlockShape]:
    """Block shape by module name; ``WorkError`` when the record is malformed."""
    modules = (record or {}).get(entry) or {}
    try:
        return {name: check_block_shape(shape) for name, shape in modules.items()}
    except (ValueError, AttributeError) as error:
        raise WorkError(
            f"the pybsp record in {CONFIG} is damaged: {one_line(error)}"
        ) from None


def load(folder: Path) -> Any:
    """The model as users get it: packed when the folder says so."""
    return _load(folder)


def load_dense(folder: Path) -> Any:
    """The model with dense layers, whose recorded block shapes are set.

    Its config has the record, by the names of this model. Raises ``WorkError`` when the
    folder has only packed weights, or the record is damaged.
    """
    from transformers import AutoConfig

    record = sparsity_record(folder)
    if record is not None and not has_dense_file(folder):
        raise WorkError(f"{folder} has no dense weights ({DENSE_FILE})")
    quiet()
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WorkError(f"cannot read {folder / CONFIG}: {one_line(error)}") from error
    if record is not None:
        del config.quantization_config
    model = _load(folder, config=config)
    if record is not None:
        model.config.quantization_config = _settle_record(record, model)
    return model


def _settle_record(record: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """``record`` by the names of ``model``, where its block shapes are set."""
    from ..integrations.loading import recorded_name

    names = dict(model.named_modules(remove_duplicate=False))
    settled: dict[str, Any] = {**record, "modules": {}}
    modules = recorded_modules(record)
    found = {key: recorded_name(model, key, names) for key in modules}
    # Of a model around this one, other parts may be recorded as well.
    around = any(name not in (None, key) for key, name in found.items())
    for key, shape in modules.items():
        name = found[key]
        if name is None and around:
            settled.pop("sparsity", None)  # of those parts too
            continue
        if name is None:
            raise WorkError(
                f"the pybsp record names '{key}', which {type(model).__name__} has not"
            )
        names[name].pybsp_block_shape = shape
        settled["modules"][name] = list(shape)
    if "embeddings" in record:
        settled["embeddings"] = {
            recorded_name(model, key, names) or key: list(shape)
            for key, shape in recorded_modules(record, "embeddings").items()
        }
    return settled


def has_dense_file(folder: Path) -> bool:
    """Whether weights that load without pybsp lie in ``folder``."""
    from ..integrations.packed_file import dense_files

    return bool(dense_files(folder))


def _load(folder: Path, **options: Any) -> Any:
    quiet()
    import torch
    import transformers
    from safetensors import SafetensorError

    names = read_json(folder / CONFIG).get("architectures") or ["AutoModel"]
    model_class = getattr(transformers, str(names[0]), transformers.AutoModel)
    try:
        return model_class.from_pretrained(
            folder, dtype=torch.float32, **options
        ).eval()
    except (
        OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise WorkError(f"cannot load {folder}: {one_line(error)}") from error
