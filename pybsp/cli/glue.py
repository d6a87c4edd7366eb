"""``pybsp glue``: one pruning recipe, or several, over tasks, sparsities and seeds."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import prune, tasks
from .arguments import block_shape, fraction, positive_int
from .errors import FAILED, OK, UsageError
from .main import Result, build_parser
from .study import (
    ABLATIONS,
    VARIANTS,
    Cell,
    Runner,
    Setting,
    Summary,
    cells,
    keep_results,
    mean_change,
    score,
    summaries,
)
from .workspace import check_same_options, read_json, write_text

if TYPE_CHECKING:
    from rich.table import Table

#: The tasks whose official splits have both labels and a fixed metric.
TASKS = ("mrpc", "stsb", "cola", "rte", "sst2")
#: Options of a run that say where things lie.
PLACES = ("data", "dense_checkpoint", "model")


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
    what.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK",
                      help=", ".join(tasks.TASKS))  # fmt: skip
    what.add_argument("--sparsities", nargs="+", type=fraction, default=[0.8],
                      metavar="S", help="default: 0.8")  # fmt: skip
    what.add_argument("--block-shapes", nargs="+", type=block_text, metavar="OUT,IN",
                      help="default: 8,1")  # fmt: skip
    what.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N",
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
    """A block shape as it was given, once it is known to be one."""
    block_shape(text)
    return text


def run(arguments: argparse.Namespace) -> Result:
    chosen = choose(arguments)
    results = arguments.results or arguments.out / "results"
    todo = [
        cell
        for cell in chosen
        if not is_finished(cell, results, command(cell, arguments))
    ]
    if arguments.list:
        rows = [{"name": cell.name, "finished": cell not in todo} for cell in chosen]
        return Result({"runs": rows}, [list_table(rows)])
    signal.signal(signal.SIGTERM, interrupt)
    failed = work(arguments, todo, results)
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


def is_finished(cell: Cell, results: Path, line: Sequence[str]) -> bool:
    """Whether there are results of the same options; also checks the options."""
    options = parsed_options(cell, line)
    file = results / f"{cell.name}.json"
    if not file.is_file():
        return False
    known = read_json(file).get("options", {})
    check_same_options(
        {k: v for k, v in known.items() if k not in PLACES}, options, file
    )
    return True


def parsed_options(cell: Cell, line: Sequence[str]) -> dict[str, Any]:
    try:
        parsed = build_parser(line).parse_args(line)
    except SystemExit:
        raise UsageError(
            f"the options behind -- do not suit pybsp prune ({cell.variant})"
        ) from None
    config = prune.pruning_config(parsed)
    options: dict[str, Any] = prune.run_options(parsed, config)
    return options


def work(
    arguments: argparse.Namespace, todo: Sequence[Cell], results: Path
) -> list[Cell]:
    """Does the runs and keeps their results; returns those that failed."""
    runner = Runner(
        arguments.out, lambda cell: command(cell, arguments), arguments.jobs
    )
    places = {"OUT": arguments.out}
    if arguments.data is not None:
        places["DATA"] = arguments.data
    failed = []
    for number, (cell, status, seconds) in enumerate(runner.run(todo), start=1):
        said = f"failed, see {runner.log(cell)}"
        if status == OK:
            results.mkdir(parents=True, exist_ok=True)
            text = keep_results(cell, runner, places)
            write_text(results / f"{cell.name}.json", text)
            scores = read_json(results / f"{cell.name}.json")["scores"]
            before, after = score(scores["dense"]), score(scores["packed"])
            said = f"{before:.1f} dense, {after:.1f} pruned"
        else:
            failed.append(cell)
        print(
            f"{number}/{len(todo)} {cell.name}: {said} ({seconds / 60:.0f} min)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return failed


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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
