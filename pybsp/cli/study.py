"""Many prunings of one model: which, in which order, and what came of them.

Each is a process of its own, ``pybsp prune``, so that one that fails takes no other
along, and a study that was stopped goes on with what is missing.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import WorkError
from .workspace import RESULTS, RUN, read_json

#: A ramp without a penalty, after a tenth of the steps in which gradients are gathered.
_RAMP = (
    "--recipe", "ramp", "--method", "magnitude", "--phases", "0.1,0.4,0.5",
    "--distill-hidden", "1", "--no-dropout",
)  # fmt: skip

#: Name -> options of ``pybsp prune``.
VARIANTS: dict[str, tuple[str, ...]] = {
    "reconstruct": (),
    "layer-error": ("--error", "layer"),
    "high-rate": ("--prune-lr", "5e-4"),
    "norm-cut": (
        "--recipe", "ramp", "--method", "magnitude", "--ramp", "one_shot", "--phases",
        "0,0,1", "--distill-hidden", "1", "--no-dropout", "--prune-lr", "2.5e-4",
    ),
    "norms": _RAMP,
    "taylor": (*_RAMP, "--saliency", "taylor"),
    "one-cut": ("--first-cuts", "none"),
    "labels-alone": ("--distill", "0", "--distill-hidden", "0"),
    "logits-alone": ("--distill-hidden", "0"),
    "dropout": ("--dropout",),
    "per-layer": ("--scope", "layer"),
    "balanced": ("--scope", "balanced"),
    "reweighted": ("--recipe", "ramp"),
    "fixed": ("--recipe", "ramp", "--method", "group_lasso"),
    "no-penalty": ("--recipe", "ramp", "--method", "magnitude"),
    "paper": ("--recipe", "paper"),
}  # fmt: skip

#: Name -> variants and block shapes that are compared with each other.
ABLATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "block-size": (("reconstruct",), ("8,1", "16,1", "16,4", "32,32", "1,in/8")),
    "structure": (("reconstruct",), ("8,1", "1,1", "1,in", "out,1")),
    "ranking": (("reconstruct", "per-layer", "balanced"), ("8,1", "1,in/8")),
    "penalty": (("reweighted", "fixed", "no-penalty"), ("8,1",)),
    "saliency": (("norms", "taylor"), ("8,1",)),
    "cuts": (("reconstruct", "one-cut"), ("8,1",)),
    "error": (("reconstruct", "layer-error"), ("8,1",)),
    "rate": (("reconstruct", "high-rate"), ("8,1",)),
    "recipe": (
        ("reconstruct", "layer-error", "norm-cut", "logits-alone", "labels-alone",
         "dropout", "reweighted", "paper"),
        ("8,1",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One pruning of a study."""

    task: str
    variant: str
    sparsity: float
    block: str
    seed: int

    @property
    def name(self) -> str:
        block = self.block.replace(",", "x").replace("/", "over")
        return (
            f"{self.task}-{self.variant}-{100 * self.sparsity:g}-{block}"
            f"-seed{self.seed}"
        )

    @classmethod
    def from_name(cls, name: str) -> Cell:
        """The inverse of ``name``."""
        found = re.fullmatch(r"(\w+?)-(.+)-([\d.]+)-(\w+)x(\w+)-seed(\d+)", name)
        if found is None:
            raise ValueError(f"{name!r} is no name of a run of pybsp glue")
        task, variant, percent, rows, columns, seed = found.groups()
        block = f"{rows},{columns}".replace("over", "/")
        return cls(task, variant, float(percent) / 100, block, int(seed))

    @property
    def dense(self) -> str:
        """Name of the fine-tuned model that it starts from."""
        return f"{self.task}-seed{self.seed}"

    def options(self) -> list[str]:
        return [
            "--task", self.task, "--sparsity", f"{self.sparsity:g}",
            "--block-shape", self.block, "--seed", str(self.seed),
            *VARIANTS[self.variant],
        ]  # fmt: skip


def cells(
    tasks: Sequence[str],
    variants: Sequence[str],
    sparsities: Sequence[float],
    blocks: Sequence[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """All combinations: every task once before the next setting, and every setting
    once before the next seed, so that an unfinished study already compares."""
    found = (
        Cell(task, variant, sparsity, block, seed)
        for seed, sparsity, block, variant, task in itertools.product(
            seeds, sparsities, blocks, variants, tasks
        )
    )
    return list(dict.fromkeys(found))


class Runner:
    """Prunes the cells of a study in ``folder``, ``jobs`` at a time.

    ``command(cell)`` is the command line of one, as after ``pybsp``. The processes hold
    ``lock``, a file descriptor, open as long as they live.
    """

    def __init__(
        self,
        folder: Path,
        command: Callable[[Cell], list[str]],
        jobs: int,
        lock: int | None = None,
    ) -> None:
        self.folder = folder
        self.command = command
        self.jobs = jobs
        self.lock = lock
        self._running: dict[Cell, subprocess.Popen[bytes]] = {}
        self._started: dict[Cell, float] = {}

    def out(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.name

    def dense(self, cell: Cell) -> Path:
        return self.folder / "dense" / cell.dense

    def log(self, cell: Cell) -> Path:
        return self.folder / "logs" / f"{cell.name}.log"

    def run(self, todo: Iterable[Cell]) -> Iterator[tuple[Cell, int, float]]:
        """Yields each cell when it is done, with its exit status and seconds."""
        waiting = list(todo)
        try:
            while waiting or self._running:
                for cell in list(waiting):
                    if len(self._running) < self.jobs and self._may_start(cell):
                        waiting.remove(cell)
                        self._start(cell)
                yield from self._done()
                time.sleep(0.2)
        finally:
            self._stop()

    def _may_start(self, cell: Cell) -> bool:
        """Whether its dense model is there, or nothing is making it."""
        return self.dense(cell).exists() or all(
            other.dense != cell.dense for other in self._running
        )

    def _start(self, cell: Cell) -> None:
        dense = self.dense(cell)
        given = dense.exists() and not self._makes_dense(cell)
        option = "--dense-checkpoint" if given else "--save-dense"
        line = [
            *self.command(cell), option, str(dense), "--out", str(self.out(cell)),
            "--resume", "--json",
        ]  # fmt: skip
        log = self.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._running[cell] = _program(line, file, self.lock)
        self._started[cell] = time.monotonic()

    def _makes_dense(self, cell: Cell) -> bool:
        """Whether the run was started before, by fine-tuning the dense model."""
        out = self.out(cell)
        for file in (out / RESULTS, out.with_name(f"{out.name}.work") / RUN):
            if file.is_file():
                options: dict[str, Any] = read_json(file).get("options", {})
                return options.get("dense_checkpoint") is None
        return False

    def _done(self) -> Iterator[tuple[Cell, int, float]]:
        for cell, process in list(self._running.items()):
            status = process.poll()
            if status is not None:
                del self._running[cell]
                yield cell, status, time.monotonic() - self._started[cell]

    def _stop(self) -> None:
        for process in self._running.values():
            process.terminate()  # what it has done so far is on disk
        for process in self._running.values():
            process.wait()


#: ``pybsp`` as it is installed, whatever lies in the current folder.
PROGRAM = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from pybsp.cli.main import main; sys.exit(main())"
)


def _program(
    line: Sequence[str], log: IO[bytes], lock: int | None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, *line]
    # Pages that come and go with every step cost a tenth of it.
    kept = {
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
    }
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
        env={**kept, **os.environ}, start_new_session=True,
        pass_fds=() if lock is None else (lock,),
    )  # fmt: skip


def results_of(
    cell: Cell, runner: Runner, places: Mapping[str, Path]
) -> dict[str, Any]:
    """What ``results.json`` of a cell that is done holds, with words for absolute
    paths."""
    results = read_results(runner.out(cell) / RESULTS)
    return {key: _with_words(value, places) for key, value in results.items()}


def _with_words(value: Any, places: Mapping[str, Path]) -> Any:
    if isinstance(value, dict):
        return {key: _with_words(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_words(item, places) for item in value]
    if isinstance(value, str):
        for word, place in places.items():
            whole = rf"(?<![\w./-]){re.escape(str(place))}(?![\w.-])"
            value = word.join(re.split(whole, value))
    return value


def read_results(file: Path) -> dict[str, Any]:
    """Results of ``pybsp prune``; ``WorkError`` for anything else."""
    results = read_json(file)
    options, scores = results.get("options"), results.get("scores")
    if isinstance(options, dict) and isinstance(scores, dict):
        found = [scores.get(name) for name in ("dense", "packed")]
        if all(isinstance(part, dict) and part for part in found):
            return results
    raise WorkError(
        f"{file} holds no results of pybsp prune; remove it to do the run again"
    )


def score(scores: Mapping[str, float]) -> float:
    """One number for a task, in percent: the mean of its metrics, as GLUE counts."""
    return 100 * statistics.fmean(scores.values())


@dataclass(frozen=True)
class Summary:
    """What a setting gave on a task, over the seeds."""

    dense: list[float]
    final: list[float]

    @property
    def change(self) -> float:
        return statistics.fmean(self.final) - statistics.fmean(self.dense)

    def text(self) -> str:
        """Mean and, of several seeds, standard deviation; the change in brackets."""
        spread = ""
        if len(self.final) > 1:
            spread = f" +- {statistics.stdev(self.final):.1f}"
        return f"{statistics.fmean(self.final):.1f}{spread} ({self.change:+.1f})"


Setting = tuple[str, float, str]


def summaries(
    folder: Path, wanted: Iterable[Cell]
) -> dict[Setting, dict[str, Summary]]:
    """Setting -> task -> scores, of the cells whose results lie in ``folder``."""
    found: dict[Setting, dict[str, Summary]] = {}
    for cell in wanted:
        file = folder / f"{cell.name}.json"
        if not file.is_file():
            continue
        scores = read_results(file)["scores"]
        tasks = found.setdefault((cell.variant, cell.sparsity, cell.block), {})
        summary = tasks.setdefault(cell.task, Summary([], []))
        summary.dense.append(score(scores["dense"]))
        summary.final.append(score(scores["packed"]))
    return found


def mean_change(tasks: Mapping[str, Summary]) -> float:
    """Mean over tasks of what pruning changed."""
    return statistics.fmean(summary.change for summary in tasks.values())
