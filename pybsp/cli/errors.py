"""How a command fails, and with which exit status."""

from __future__ import annotations

OK = 0
FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130


class WorkError(Exception):
    """The work could not be done: exit status 1, one line on stderr."""


class UsageError(Exception):
    """The command line asks for something that cannot be: exit status 2, one line."""


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line; its class name when it has none."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        name = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{name}"
    return text or type(error).__name__
