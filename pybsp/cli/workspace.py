"""Where a long run keeps its state, so that it can be stopped and continued.

The work of ``OUT`` lies beside it in ``OUT.work``: ``run.json`` holds the options and
the results of finished stages. ``OUT`` appears in one rename when all is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .errors import UsageError, WorkError

RUN = "run.json"
RESULTS = "results.json"


def write_json(path: Path, data: Any) -> None:
    """Write beside ``path``, then rename: the file is either old or new, never half."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(
        json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise WorkError(f"{path} is not JSON: it is damaged or not pybsp's") from None
    if not isinstance(data, dict):
        raise WorkError(f"{path} holds no JSON object: it is damaged or not pybsp's")
    return data


def finished_results(out: Path, options: dict[str, Any], *, resume: bool) -> Any:
    """Results of a finished run of the same options, or None when ``out`` is free.

    Raises ``UsageError`` when ``out`` holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a directory")
    if resume and (out / RESULTS).is_file():
        results = read_json(out / RESULTS)
        check_same_options(results.get("options", {}), options, out)
        return results
    raise UsageError(
        f"--out {out} exists and is not empty; remove it or choose another directory"
    )


#: What versions did that had no option for it yet, where the default is another now.
BEFORE: dict[str, Any] = {"first_cuts": []}
#: The same, of runs that began with a cut by reconstruction.
BEFORE_RECONSTRUCTED: dict[str, Any] = {**BEFORE, "error": "layer"}


def check_same_options(old: dict[str, Any], new: dict[str, Any], place: Path) -> None:
    # An older version may not have known an option yet.
    cut_first = old.get("recipe") == "reconstruct"
    old = {**(BEFORE_RECONSTRUCTED if cut_first else BEFORE), **old}
    changed = [key for key in new if key in old and old[key] != new[key]]
    if changed:
        key = changed[0]
        raise UsageError(
            f"{place} belongs to a run with other options ({key}: "
            f"{old.get(key)!r} there, {new[key]!r} here); use the same options or "
            "another --out"
        )


def is_of_another_run(out: Path, options: dict[str, Any]) -> bool:
    """Whether an unfinished run of other options wants to become ``out``."""
    run = work_folder(out) / RUN
    if not run.is_file():
        return False
    try:
        check_same_options(read_json(run).get("options", {}), options, out)
    except (UsageError, WorkError):
        return True
    return False


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".work")


class Workspace:
    """The folder of a run in progress; a context manager that holds its lock."""

    def __init__(self, out: Path, options: dict[str, Any], *, resume: bool) -> None:
        self.out = out
        self.folder = work_folder(out)
        self.options = options
        self.resume = resume
        self.stages: dict[str, dict[str, Any]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> Workspace:
        run = self.folder / RUN
        if self.folder.exists() and not self.resume and run.exists():
            raise UsageError(
                f"an unfinished run lies in {self.folder}: continue it with --resume, "
                "or remove it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / "lock"
        self._lock = lock.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise WorkError(f"another process is working in {self.folder}") from None
        try:
            self._check_unfinished(lock)
            if run.exists():
                state = read_json(run)
                check_same_options(state.get("options", {}), self.options, self.folder)
                self.stages = state.get("stages", {})
            self._save()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _check_unfinished(self, lock: Path) -> None:
        """``WorkError`` when another process was here since this one looked at OUT."""
        assert self._lock is not None
        try:
            held = os.path.samestat(os.fstat(self._lock.fileno()), lock.stat())
        except FileNotFoundError:
            held = False
        if held and not (self.out / RESULTS).exists():
            return
        if held and not (self.folder / RUN).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        raise WorkError(f"another process has just finished {self.out}")

    def record(self, stage: str, data: dict[str, Any]) -> None:
        """Keep what ``stage`` found, on disk at once."""
        self.stages[stage] = data
        self._save()

    def once(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The recorded data of ``stage``; does the work when there is none yet."""
        if stage not in self.stages:
            self.record(stage, work())
        return self.stages[stage]

    def write_folder(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let ``write`` fill a folder, which gets its name only when it is whole."""
        part = self.folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write(part)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        return final

    def publish(self, folder: Path) -> None:
        """Turn ``folder`` into ``OUT`` and remove the rest of the work."""
        if self.out.is_dir():
            self.out.rmdir()
        folder.rename(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _save(self) -> None:
        write_json(self.folder / RUN, {"options": self.options, "stages": self.stages})


def copy_folder(source: Path, target: Path) -> None:
    """Copy beside ``target``, then rename; a target that exists is left alone."""
    if target.exists():
        return
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, part)
    part.rename(target)
