"""Every section in one command: tables, and what was to be reached beside what was.

A full run takes hours on one core, 40 minutes of them for the 8-bit encoders, and
writes ``results/<section>.json``; ``--quick`` takes few cases, five minutes for the
8-bit encoders, and writes nothing. Tables of the documentation and figures are made
from the files afterwards, by ``benchmarks.tables`` and ``benchmarks.figures``.

    python -m benchmarks [--quick] [--only NAME ...] [--deepsparse PYTHON] [--json]
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console

from benchmarks.section import console, numbers, options, parser, text_table
from benchmarks.sections import SECTIONS


def main() -> None:
    commands = parser(__doc__)
    names = [section.name for section in SECTIONS]
    commands.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME",
        help=", ".join(names),
    )  # fmt: skip
    arguments = commands.parse_args()
    progress = Console(stderr=True)
    screen = console()
    found: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        if section.name not in arguments.only:
            continue
        started = time.perf_counter()
        found[section.name] = section.run(options(arguments))
        seconds = time.perf_counter() - started
        progress.print(f"{section.name}: {seconds:.0f} s", style="dim")
        if not arguments.json:
            section.show(screen, found[section.name], targets=False)
    if arguments.json:
        json.dump(found, sys.stdout)
        print()
        return
    targets = [t for data in found.values() for t in data.get("targets", [])]
    screen.print(text_table("numbers to reach", *numbers(targets)))


if __name__ == "__main__":
    main()
