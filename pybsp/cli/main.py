"""Entry point of the ``pybsp`` command: parses, runs one command, prints its result.

Numbers go to stdout, as tables or with ``--json`` as one JSON document and nothing
else; progress and messages go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import (
    FAILED,
    INTERRUPTED,
    OK,
    WRONG_USAGE,
    UsageError,
    WorkError,
    one_line,
)

#: Command -> what it does. The module of a command is imported only when it is run.
COMMANDS = {
    "quickstart": "prune a small transformer on built-in text and see what changes",
    "prune": "fine-tune, prune, retrain and pack a model on a task",
    "glue": "prune on several tasks, ways and seeds, and compare what comes of it",
    "pack": "pack a checkpoint whose weights hold blocks of zeros",
    "bench": "time a packed model against the dense one on this CPU",
    "check": "verify a pruned model and explain its speed on this CPU",
}
EPILOG = """exit status: 0 done, 1 the work failed, 2 wrong usage.
PYBSP_DEBUG=1 shows the traceback of an error."""


@dataclass
class Result:
    """What a command found: ``data`` for ``--json``, ``tables`` for people."""

    data: dict[str, Any]
    tables: list[Any] = field(default_factory=list)
    exit_status: int = OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pybsp`` with ``argv`` and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser(argv).parse_args(argv)
        arguments.line = shlex.join(["pybsp", *argv])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else WRONG_USAGE
    try:
        return run_command(arguments)
    except UsageError as error:
        return fail(arguments.command, error, WRONG_USAGE)
    except KeyboardInterrupt:
        hint = "; continue with --resume" if hasattr(arguments, "resume") else ""
        print(f"pybsp {arguments.command}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout went away; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (
        WorkError,
        ValueError,
        TypeError,
        OSError,
        MemoryError,
        ImportError,
    ) as error:
        return fail(arguments.command, error, FAILED)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command named in ``argv`` gets its options."""
    parser = argparse.ArgumentParser(
        prog="pybsp",
        description="Prune transformers in blocks and run them faster on the CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="print versions and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == wanted:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
            command.add_argument(
                "--json", action="store_true", help="print only JSON on stdout"
            )
    parser.set_defaults(show_help=parser.print_help)
    return parser


def run_command(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from .environment import version_line

        print(version_line())
        return OK
    if arguments.command is None:
        arguments.show_help(sys.stderr)
        return WRONG_USAGE
    module = importlib.import_module(f".{arguments.command}", __package__)
    # Libraries print where they like; stdout is kept for the result.
    with contextlib.redirect_stdout(sys.stderr):
        result: Result = module.run(arguments)
    show(result, as_json=arguments.json)
    return result.exit_status


def show(result: Result, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.data, indent=2, allow_nan=False), flush=True)
        return
    from rich.console import Console

    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 132)
    for table in result.tables:
        # Texts have names of folders in them, and a name may look like markup.
        console.print(table, markup=not isinstance(table, str))


def fail(command: str, error: BaseException, exit_status: int) -> int:
    if os.environ.get("PYBSP_DEBUG") == "1":
        raise error
    print(f"pybsp {command}: error: {one_line(error)}", file=sys.stderr)
    return exit_status


if __name__ == "__main__":
    sys.exit(main())
