"""The fitted model on disk: one small JSON file for each CPU, build and thread count.

``$XDG_CACHE_HOME/pybsp``, else ``~/.cache/pybsp``. Nothing depends on the file: one
that is missing, damaged or of something else is measured again. Files are written
beside their place and moved there, so that processes may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import ops

#: Raised whenever the terms of the model or the calls it is fitted to change.
FORMAT = 3


def cache_key() -> dict[str, str | int]:
    """Everything the times depend on but the layers."""
    return {
        "format": FORMAT,
        "cpu": ops.cpu_name(),
        "isa": ops.active_isa(),
        "threads": torch.get_num_threads(),
        "pybsp": version("pybsp"),
        "build": ops.build_id(),
        "torch": torch.__version__,
    }


def cache_file() -> Path:
    """Where the model for this CPU and the current number of threads is kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification tells to ignore a relative path.
    folder = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    text = json.dumps(cache_key(), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / "pybsp" / f"costs-{name}.json"


def read() -> Any:
    """What ``write`` wrote for the same key; None when there is no such file."""
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
        return content["model"] if content["key"] == cache_key() else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def write(model: dict[str, Any]) -> None:
    """Keep ``model``; a folder that cannot be written to is a warning."""
    text = json.dumps({"key": cache_key(), "model": model})
    beside = None
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(beside).replace(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        if beside is not None:
            with suppress(OSError):
                Path(beside).unlink()
        warnings.warn(
            f"the measured costs of this CPU cannot be kept ({error}): every process "
            "will measure them again; set XDG_CACHE_HOME to a folder to write to",
            RuntimeWarning,
            stacklevel=2,
        )
