"""Where and how a result was measured, and its file."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pybsp.cli import environment

RESULTS = Path(__file__).parent / "results"


def save(name: str, data: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: the data beside machine, commit and command."""
    record = {
        "command": " ".join(["python", "-m", f"benchmarks.{module()}", *sys.argv[1:]]),
        "commit": commit(),
        "environment": environment.describe(),
        **data,
    }
    return write(name, json.dumps(record, indent=1) + "\n")


def keep(run: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Copy the results of a ``pybsp prune`` run, with DATA and RUNS for its folders."""
    text = (run / "results.json").read_text(encoding="utf-8")
    for folder, word in ((arguments.data, "DATA"), (arguments.runs, "RUNS")):
        text = text.replace(str(folder), word)
    write(name, text)
    found: dict[str, Any] = json.loads(text)
    return found


def write(name: str, text: str) -> Path:
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    return beside.replace(file)


def module() -> str:
    return Path(sys.argv[0]).stem


def commit() -> str:
    """The commit of the working tree, with ``+`` when it has uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--", "csrc", "pybsp")
    return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
