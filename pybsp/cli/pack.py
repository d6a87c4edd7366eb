"""``pybsp pack``: a checkpoint with blocks of zeros gets its packed file."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import checkpoints
from .arguments import block_shape
from .errors import UsageError, WorkError, one_line
from .main import Result

#: Written by ``save_packed`` itself; everything else beside and below them is copied.
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", checkpoints.CONFIG)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR",
        help="a transformers checkpoint whose linear layers hold blocks of zeros",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="new directory for a packed copy (default: add the packed file to DIR)",
    )  # fmt: skip
    parser.add_argument(
        "--block-shape", type=block_shape, metavar="OUT,IN",
        help="blocks of every layer (default: as recorded, else found in the zeros)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "int8"),
        help="of the packed weights (default: as recorded, else float32); bfloat16 and "
        "int8 round them, and the dense file then holds the rounded weights too",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Result:
    folder = checkpoints.checked_folder(arguments.folder)
    out = arguments.out or folder
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if arguments.out is not None and taken:
        raise UsageError(f"--out {out} exists and is not an empty directory")
    from ..integrations.save import save_packed
    from ..nn.pack import pack_

    model = checkpoints.load_dense(folder)
    try:
        options = _rounding_options(model, arguments)
        report = pack_(
            model,
            arguments.block_shape,
            **options,
            min_gain=0,
            fuse=False,
            shrink=False,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        file = save_packed(model, out)
    except ValueError as error:
        raise WorkError(f"{folder} cannot be packed: {one_line(error)}") from error
    if out != folder:
        shutil.copytree(
            folder, out, ignore=_not_copied(folder, out), dirs_exist_ok=True
        )
    dense = out / checkpoints.DENSE_FILE
    sizes = {
        name: path.stat().st_size
        for name, path in (("dense_file_bytes", dense), ("packed_file_bytes", file))
        if path.is_file()
    }
    data = {"folder": str(out), **sizes, "report": report.to_dict()}
    return Result(data, [report, f"Wrote {file}. Next: pybsp bench {out}"])


def _rounding_options(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of ``pack_``, as recorded; takes out of the record what is to be new."""
    from ..integrations.transformers import BlockSparseConfig

    record = getattr(model.config, "quantization_config", None)
    if isinstance(record, dict) and record.get("quant_method") == "pybsp":
        record.pop("sparsity", None)
        if arguments.block_shape is not None:
            record.pop("block_shape", None)
        config = BlockSparseConfig(**record)
    else:
        config = BlockSparseConfig()
    config.dtype = arguments.dtype or config.dtype
    return config.rounding_options(model)


def _not_copied(folder: Path, out: Path) -> Callable[[str, list[str]], set[str]]:
    """Weights and config of the model itself: modules beside it have such files too."""
    weights = shutil.ignore_patterns(*WEIGHTS)
    target = out.resolve()

    def names_in(visited: str, names: list[str]) -> set[str]:
        itself = {name for name in names if Path(visited, name).resolve() == target}
        return itself | (weights(visited, names) if Path(visited) == folder else set())

    return names_in
