"""Resident memory of this process by what it is (Linux), in MB of 2**20 bytes."""

from __future__ import annotations

from pathlib import Path

MB = 2**20


def resident(file: Path | None = None) -> dict[str, float]:
    """``total``, and of it ``file`` (pages of that file as they are on disk),
    ``anonymous`` (everything that is not a page of some file) and ``libraries``."""
    found = {"total": 0, "file": 0, "anonymous": 0}
    name = ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            # ADDRESSES RIGHTS OFFSET DEVICE INODE [NAME]
            name = " ".join(line.split()[5:])
        elif word == "Rss:":
            pages = int(rest.split()[0])
            found["total"] += pages
            found["file"] += pages if file is not None and name == str(file) else 0
        elif word == "Anonymous:":
            written = int(rest.split()[0])
            found["anonymous"] += written
            found["file"] -= written if file is not None and name == str(file) else 0
    megabytes = {key: kib * 1024 / MB for key, kib in found.items()}
    named = megabytes["file"] + megabytes["anonymous"]
    return {**megabytes, "libraries": megabytes["total"] - named}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {key: round(after[key] - before[key], 1) for key in after}
