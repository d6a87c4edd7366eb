"""``pybsp glue``: one pruning recipe, or several, over tasks, sparsities and seeds."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import prune, tasks
from .arguments import block_shape, fraction, positive_int
from .errors import FAILED, OK, UsageError, WorkError
from .main import Result, build_parser
from .recipe import first_cuts
from .study import (
    ABLATIONS,
    VARIANTS,
    Cell,
    Runner,
    Setting,
    Summary,
    cells,
    mean_change,
    read_results,
    results_of,
    score,
    summaries,
)
from .workspace import check_same_options, read_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

#: The tasks whose official splits have both labels and a fixed metric.
TASKS = ("mrpc", "stsb", "cola", "rte", "sst2")
#: Options of a run that say where things lie.
PLACES = ("data", "dense_checkpoint")
#: Options that a study gives to its runs.
SET_BY_STUDY = (
    "--task", "--sparsity", "--block-shape", "--seed", "--model", "--data", "--out",
    "--dense-checkpoint", "--save-dense", "--resume", "--json", "--help", "-h",
)  # fmt: skip
#: Those that decide what a dense model is.
DENSE_OPTIONS = (
    "model", "task", "seed", "epochs_dense", "lr", "bf16", "batch_size", "max_length",
    "max_train_samples",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="minilm",
        metavar="NAME_OR_DIR",
        help="as for pybsp prune (default: %(default)s)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="as for pybsp prune (default: the hub)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/glue"),
        metavar="DIR",
        help="where models, logs and results go; what lies there already is not done "
        "again (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="one JSON file for each finished run (default: OUT/results)",
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--tasks", nargs="+", default=TASKS, metavar="TASK",
        help=f"{', '.join(tasks.TASKS)} (default: {' '.join(TASKS)})",
    )  # fmt: skip
    what.add_argument("--sparsities", nargs="+", type=fraction, default=[0.8],
                      metavar="S", help="default: 0.8")  # fmt: skip
    what.add_argument("--block-shapes", nargs="+", type=block_text, metavar="OUT,IN",
                      help="default: 8,1")  # fmt: skip
    what.add_argument("--seeds", nargs="+", type=seed, default=[0], metavar="N",
                      help="each with its own dense model (default: 0)")  # fmt: skip
    what.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), metavar="NAME",
                      help=f"{', '.join(VARIANTS)} (default: reconstruct)")  # fmt: skip
    what.add_argument(
        "--ablation",
        choices=tuple(ABLATIONS),
        help="the variants and block shapes that answer one question",
    )
    parser.add_argument(
        "--jobs", type=positive_int, default=1, metavar="N",
        help="runs at a time, each with its share of the threads (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="name the runs in order, and do none"
    )
    parser.add_argument(
        "prune_options",
        nargs="*",
        metavar="-- OPTION",
        help="behind two dashes: options of pybsp prune for every run, such as "
        "-- --epochs 2",
    )


def block_text(text: str) -> str:
    """A block shape in the one way that names of runs have it."""
    return ",".join(map(str, block_shape(text)))


def seed(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 on; got {text!r}"
        )
    return int(text)


def run(arguments: argparse.Namespace) -> Result:
    find_places(arguments)
    chosen = choose(arguments)
    results = arguments.results
    todo = [cell for cell in chosen if not is_finished(cell, arguments)]
    if arguments.list:
        rows = [{"name": cell.name, "finished": cell not in todo} for cell in chosen]
        return Result({"runs": rows}, [list_table(rows)])
    with interruptible():
        failed = work(arguments, todo) if todo else []
    found = summaries(results, chosen)
    tables: list[Any] = [summary_table(found, arguments.tasks)] if found else []
    tables += [
        f"{cell.name} failed: see {arguments.out / 'logs' / cell.name}.log"
        for cell in failed
    ]
    data = {
        "settings": as_data(found),
        "failed": [cell.name for cell in failed],
        "results": str(results),
    }
    return Result(data, tables, FAILED if failed else OK)


def find_places(arguments: argparse.Namespace) -> None:
    """Make the paths absolute; ``UsageError`` for what is no folder."""
    arguments.out = arguments.out.absolute()
    arguments.results = (arguments.results or arguments.out / "results").absolute()
    for name in ("out", "results"):
        place = getattr(arguments, name)
        if place.exists() and not place.is_dir():
            raise UsageError(f"--{name} {place} is a file; name a directory")
    if arguments.data is not None:
        arguments.data = arguments.data.absolute()
        if not arguments.data.is_dir():
            raise UsageError(f"--data {arguments.data} is not a directory")
    if Path(arguments.model).is_dir():
        arguments.model = str(Path(arguments.model).absolute())


def choose(arguments: argparse.Namespace) -> list[Cell]:
    """The runs that the options name, in the order in which they are done."""
    variants, blocks = arguments.variants, arguments.block_shapes
    if arguments.ablation is not None:
        if variants or blocks:
            raise UsageError(
                "--ablation chooses variants and block shapes itself; leave --variants "
                "and --block-shapes out"
            )
        variants, blocks = ABLATIONS[arguments.ablation]
    for name in arguments.tasks:
        tasks.find_task(name)
    for sparsity in arguments.sparsities:
        if "one-cut" in (variants or ()) and not first_cuts(sparsity):
            raise UsageError(
                f"one-cut at {100 * sparsity:g} % is the default recipe, which cuts "
                "more than once only above 70 %; leave that sparsity out"
            )
    return cells(
        arguments.tasks, variants or ("reconstruct",), arguments.sparsities,
        blocks or ("8,1",), arguments.seeds,
    )  # fmt: skip


def command(cell: Cell, arguments: argparse.Namespace) -> list[str]:
    """The command line of one run, but for the places of its files."""
    line = ["prune", "--model", arguments.model]
    if arguments.data is not None:
        line += ["--data", str(arguments.data)]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    line += ["--threads", str(threads), "--no-onnx"]
    return [*line, *cell.options(), *arguments.prune_options]


def check_prune_options(variant: str, words: Sequence[str]) -> None:
    """``UsageError`` for options of all runs that the study or a variant sets."""
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    own = {word for word in VARIANTS[variant] if word.startswith("--")}
    own |= {word.replace("--no-", "--") for word in own}
    for option in sorted(given):
        if option in SET_BY_STUDY:
            raise UsageError(
                f"{option} behind -- is set for each run; use the options of pybsp glue"
            )
        if option.replace("--no-", "--") in own:
            raise UsageError(
                f"{option} behind -- is what the variant {variant} sets; leave one out"
            )
        if option == "--recipe":
            raise UsageError(
                f"--recipe behind -- would run as {variant}; choose --variants "
                "reweighted (the recipe ramp) or paper instead"
            )


def is_finished(cell: Cell, arguments: argparse.Namespace) -> bool:
    """Whether there are results of the same options; also checks the options."""
    options = run_options(cell, arguments)
    file = arguments.results / f"{cell.name}.json"
    if not file.is_file():
        return False
    known = read_results(file)["options"]
    options["model"] = model_name(arguments)
    check_same_options(
        {k: v for k, v in known.items() if k not in PLACES}, options, file
    )
    return True


def run_options(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the outcome of a run."""
    check_prune_options(cell.variant, arguments.prune_options)
    line = command(cell, arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = build_parser(line).parse_args(line)
    except SystemExit:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise UsageError(f"the options of pybsp prune, behind --: {reason}") from None
    options: dict[str, Any] = prune.run_options(parsed, prune.pruning_config(parsed))
    return options


def model_name(arguments: argparse.Namespace) -> str:
    """The model as results call it: of a directory, the last part."""
    path = Path(arguments.model)
    return path.name if path.is_dir() else str(arguments.model)


def check_dense(cell: Cell, arguments: argparse.Namespace, dense: Path) -> None:
    """``UsageError`` when the dense model that is there was made in another way; notes
    the way of one that will be."""
    every = run_options(cell, arguments)
    options = {name: every[name] for name in DENSE_OPTIONS}
    file = dense.with_name(f"{dense.name}.json")
    if not dense.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, options)
    elif file.is_file():
        check_same_options(read_json(file), options, dense)
    else:
        raise UsageError(
            f"{dense} is there, but not {file}, which says how it was made; remove it"
        )


def work(arguments: argparse.Namespace, todo: Sequence[Cell]) -> list[Cell]:
    """Does the runs and keeps their results; returns those that failed."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WorkError(
                f"another study, or a run that one left behind, works in "
                f"{arguments.out}"
            ) from None
        runner = Runner(
            arguments.out, lambda cell: command(cell, arguments), arguments.jobs,
            lock.fileno(),
        )  # fmt: skip
        for cell in todo:
            check_dense(cell, arguments, runner.dense(cell))
        failed = []
        for number, (cell, status, seconds) in enumerate(runner.run(todo), start=1):
            said = f"failed, see {runner.log(cell)}"
            if status == OK:
                said = keep(cell, runner, arguments)
            else:
                failed.append(cell)
            print(
                f"{number}/{len(todo)} {cell.name}: {said} ({seconds / 60:.0f} min)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return failed


def keep(cell: Cell, runner: Runner, arguments: argparse.Namespace) -> str:
    """Copy the results of a run that is done; returns what came of it, in words."""
    places = {"OUT": arguments.out}
    if arguments.data is not None:
        places["DATA"] = arguments.data
    if Path(arguments.model).is_dir():
        places[model_name(arguments)] = Path(arguments.model)
    arguments.results.mkdir(parents=True, exist_ok=True)
    results = results_of(cell, runner, places)
    write_json(arguments.results / f"{cell.name}.json", results)
    scores = results["scores"]
    before, after = score(scores["dense"]), score(scores["packed"])
    return f"{before:.1f} dense, {after:.1f} pruned"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What ends this process ends its children too; what nohup ignores does not."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def list_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("run", "finished")
    for row in rows:
        table.add_row(row["name"], "yes" if row["finished"] else "")
    return table


def summary_table(
    found: Mapping[Setting, Mapping[str, Summary]], columns: Sequence[str]
) -> Table:
    """Dev scores: mean of a task's metrics, over the seeds; the change from dense."""
    from rich.table import Table

    table = Table("variant", "sparsity", "block")
    table.title = "dev scores (change from the dense model)"
    table.title_justify = "left"
    names = [name for name in columns if any(name in row for row in found.values())]
    for name in (*names, "mean change"):
        table.add_column(name, justify="right")
    for (variant, sparsity, block), row in found.items():
        table.add_row(
            variant, f"{100 * sparsity:g} %", block,
            *(row[name].text() if name in row else "" for name in names),
            f"{mean_change(row):+.1f}",
        )  # fmt: skip
    return table


def as_data(found: Mapping[Setting, Mapping[str, Summary]]) -> list[dict[str, Any]]:
    return [
        {
            "variant": variant,
            "sparsity": sparsity,
            "block_shape": block,
            "mean_change": round(mean_change(row), 3),
            "tasks": {
                name: {"dense": summary.dense, "final": summary.final}
                for name, summary in row.items()
            },
        }
        for (variant, sparsity, block), row in found.items()
    ]
