"""Where and how a result was measured, and its file."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pybsp.cli import environment

RESULTS = Path(__file__).parent / "results"
PEERS = ("torch", "onnxruntime", "openvino", "nncf", "scipy")
SEPARATOR = ",\n  "


def save(name: str, data: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: the data beside machine, commit and command.

    Long lists are written an entry a line.
    """
    record = {
        "command": command(),
        "commit": commit(),
        "environment": {**environment.describe(), "peers": peers()},
        **data,
    }
    lists = {k: v for k, v in record.items() if isinstance(v, list)}
    head = json.dumps({k: v for k, v in record.items() if k not in lists}, indent=1)
    tail = [
        f" {json.dumps(key)}: [\n  {SEPARATOR.join(map(json.dumps, entries))}\n ]"
        for key, entries in lists.items()
    ]
    return write(name, ",\n".join([head.removesuffix("\n}"), *tail]) + "\n}\n")


def keep(run: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Copy the results of a ``pybsp prune`` run, with words for its folders."""
    text = (run / "results.json").read_text(encoding="utf-8")
    for word in ("dense", "data", "runs"):
        folder = getattr(arguments, word)
        text = text.replace(str(folder), word.upper())
    write(name, text)
    found: dict[str, Any] = json.loads(text)
    return found


def write(name: str, text: str) -> Path:
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    return beside.replace(file)


def command() -> str:
    """What was typed, but of absolute paths the last part: folders differ."""
    name = Path(sys.argv[0]).stem
    module = "benchmarks" if name == "__main__" else f"benchmarks.{name}"
    options = [
        Path(text).name if Path(text).is_absolute() else text for text in sys.argv[1:]
    ]
    return " ".join(["python", "-m", module, *options])


def peers() -> dict[str, str]:
    """The versions of what is compared with, as far as it is installed."""
    found = {}
    for name in PEERS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit of the working tree, with ``+`` when it has uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--", "csrc", "pybsp")
    return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
