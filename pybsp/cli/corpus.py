"""A text task that every CPython carries: which area of the library is documented here?

Passages are cut from the docstrings of the interpreter's own standard library; the
label is the area that the module belongs to. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .errors import WorkError
from .tasks import Split, Task, TaskData, Text

AREAS = {
    "network": (
        "email", "ftplib", "http", "imaplib", "ipaddress", "mailbox", "poplib",
        "smtplib", "socket", "socketserver", "ssl", "urllib", "wsgiref", "xmlrpc",
    ),
    "numbers": (
        "_pydatetime", "_pydecimal", "bisect", "calendar", "colorsys", "datetime",
        "decimal", "fractions", "heapq", "numbers", "random", "statistics", "zoneinfo",
    ),
    "graphics": ("curses", "tkinter", "turtle"),
    "files": (
        "_pyio", "bz2", "fileinput", "filecmp", "fnmatch", "genericpath", "glob",
        "gzip", "lzma", "mimetypes", "ntpath", "os", "pathlib", "posixpath", "shutil",
        "tarfile", "tempfile", "zipfile",
    ),
}  # fmt: skip
WORDS = 24
FEWEST_WORDS = 8
TASK = Task("stdlib", ("passage",), tuple(AREAS), ("accuracy",))


def load(train: int, dev: int, seed: int = 0, root: Path | None = None) -> TaskData:
    """``train`` and ``dev`` passages, as many of each area; fewer when they run out.

    ``root`` is the standard library to read, this interpreter's when None.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    passages = {
        area: sorted(_area_passages(root, names)) for area, names in AREAS.items()
    }
    smallest = min(len(found) for found in passages.values())
    dev_each = min(dev // len(AREAS), smallest // 4)
    train_each = min(train // len(AREAS), smallest - dev_each)
    if dev_each < 1:
        raise WorkError(
            f"no docstrings found in {root}: this Python carries no library sources"
        )
    parts: dict[str, list[tuple[Text, float]]] = {"train": [], "dev": []}
    generator = random.Random(seed)
    for label, found in enumerate(passages.values()):
        generator.shuffle(found)
        parts["dev"] += [((text,), float(label)) for text in found[:dev_each]]
        rest = found[dev_each : dev_each + train_each]
        parts["train"] += [((text,), float(label)) for text in rest]
    splits = {}
    for name, rows in parts.items():
        generator.shuffle(rows)
        splits[name] = Split([text for text, _ in rows], [label for _, label in rows])
    return TaskData(
        TASK,
        splits["train"],
        splits["dev"],
        source="docstrings of the standard library",
    )


def _area_passages(root: Path, modules: tuple[str, ...]) -> set[str]:
    return {
        passage
        for module in modules
        for path in _sources(root, module)
        for passage in _passages(path)
    }


def _sources(root: Path, module: str) -> Iterator[Path]:
    single, package = root / f"{module}.py", root / module
    if single.is_file():
        yield single
    if package.is_dir():
        found = sorted(package.rglob("*.py"))
        yield from (
            path for path in found if "test" not in path.relative_to(root).parts
        )


def _passages(path: Path) -> Iterator[str]:
    """Runs of words from the prose paragraphs of all docstrings in ``path``."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, documented):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            if ">>>" in paragraph:
                continue
            words = paragraph.split()
            for start in range(0, len(words), WORDS):
                passage = words[start : start + WORDS]
                if len(passage) >= FEWEST_WORDS:
                    yield " ".join(passage)
