"""Text tasks: what their columns, labels and metrics are, and where to read them.

A task lies in ``DIR/<task>/{train,dev}.tsv``: UTF-8, one header row, tab-separated,
no quoting. Without a directory it is fetched from the Hugging Face hub.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from .errors import UsageError, WorkError

#: One sentence or a pair of sentences.
Text: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A text classification or regression task.

    ``labels`` names the classes in order; it is empty for a regression, whose labels
    are numbers in ``label_range``. The first of ``metrics`` is the one tables show.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    label_range: tuple[float, float] = (0.0, 0.0)
    hub_name: str | None = None

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Number of logits of a model for this task."""
        return max(1, len(self.labels))


@dataclass(frozen=True)
class Split:
    """Examples of one split: ``texts[i]`` has the label ``labels[i]``."""

    texts: list[Text]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskData:
    """A task with its two splits and a word on where they come from."""

    task: Task
    train: Split
    dev: Split
    source: str


_ONE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
_F1 = ("f1", "accuracy")
TASKS = {
    task.name: task
    for task in (
        Task("sst2", _ONE, ("negative", "positive"), ("accuracy",), hub_name="sst2"),
        Task("mrpc", _PAIR, ("different", "paraphrase"), _F1, hub_name="mrpc"),
        Task("rte", _PAIR, ("entailment", "not_entailment"), ("accuracy",),
             hub_name="rte"),
        Task("cola", _ONE, ("unacceptable", "acceptable"), ("matthews",),
             hub_name="cola"),
        Task("stsb", _PAIR, (), ("spearman", "pearson"), (0.0, 5.0), hub_name="stsb"),
        Task("mnli_subset", ("premise", "hypothesis"),
             ("entailment", "neutral", "contradiction"), ("accuracy",)),
        Task("qqp_subset", ("question1", "question2"), ("different", "duplicate"), _F1),
    )
}  # fmt: skip


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name]


def load(name: str, directory: Path | None) -> TaskData:
    """Both splits of the task ``name`` from ``directory``, or from the hub."""
    task = find_task(name)
    if directory is None:
        return _load_from_hub(task)
    if not directory.is_dir():
        raise UsageError(f"--data {directory} is not a directory")
    folder = directory / task.name
    splits = {}
    for split in ("train", "dev"):
        path = folder / f"{split}.tsv"
        if not path.is_file():
            raise UsageError(
                f"{path} does not exist: task '{task.name}' needs train.tsv and "
                f"dev.tsv in {folder}"
            )
        splits[split] = read_tsv(path, task)
    return TaskData(task, splits["train"], splits["dev"], source=str(folder))


def read_tsv(path: Path, task: Task) -> Split:
    """Read one split; ``WorkError`` names the line of the first bad row."""
    texts: list[Text] = []
    labels: list[float] = []
    try:
        for place, row in _rows(path, task):
            texts.append(tuple(row[column] for column in task.columns))
            labels.append(_label(row["label"], task, place))
    except UnicodeDecodeError as error:
        raise WorkError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except csv.Error as error:
        raise WorkError(f"{path} is not tab-separated text: {error}") from None
    if not labels:
        raise WorkError(f"{path} has no rows below its header")
    return Split(texts, labels)


def subsample(data: TaskData, limit: int | None, seed: int) -> TaskData:
    """Keep ``limit`` training rows drawn without replacement; all when it is None."""
    if limit is None or limit >= len(data.train):
        return data
    rows = sorted(random.Random(seed).sample(range(len(data.train)), limit))
    train = Split(
        [data.train.texts[row] for row in rows],
        [data.train.labels[row] for row in rows],
    )
    return replace(data, train=train)


def _rows(path: Path, task: Task) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Each data row by column name, with ``path:line`` for messages."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(reader, None)
        if header is None:
            raise WorkError(f"{path} is empty")
        missing = [name for name in (*task.columns, "label") if name not in header]
        if missing:
            raise WorkError(
                f"{path} lacks the column {_quoted(missing)} of task '{task.name}'; "
                f"its header has {_quoted(header)}"
            )
        for fields in reader:
            place = f"{path}:{reader.line_num}"
            if len(fields) != len(header):
                raise WorkError(
                    f"{place}: {len(fields)} columns where the header has {len(header)}"
                )
            yield place, dict(zip(header, fields, strict=True))


def _label(text: str, task: Task, place: str) -> float:
    low, high = task.label_range if task.is_regression else (0, len(task.labels) - 1)
    try:
        value = float(text) if task.is_regression else int(text)
    except ValueError:
        kind = "a number" if task.is_regression else "an integer"
        raise WorkError(f"{place}: the label {text!r} is not {kind}") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise WorkError(
            f"{place}: the label {text} is out of range for task '{task.name}' "
            f"({low:g} to {high:g})"
        )
    return value


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _load_from_hub(task: Task) -> TaskData:
    if task.hub_name is None:
        raise UsageError(
            f"task '{task.name}' is a sample that lies only in files: "
            "give its directory with --data"
        )
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UsageError(
            "reading a task from the Hugging Face hub needs the package 'datasets': "
            "pip install 'datasets>=3', or give a directory with --data"
        ) from None
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", task.hub_name)
    except Exception as error:
        raise WorkError(
            f"the task '{task.name}' could not be fetched from the hub "
            f"({type(error).__name__}); give a directory with --data"
        ) from error
    return TaskData(
        task,
        _hub_split(loaded["train"], task),
        _hub_split(loaded["validation"], task),
        source=f"hub:nyu-mll/glue/{task.hub_name}",
    )


def _hub_split(rows: Iterable[Mapping[str, Any]], task: Task) -> Split:
    texts: list[Text] = []
    labels: list[float] = []
    for number, row in enumerate(rows):
        texts.append(tuple(str(row[column]) for column in task.columns))
        labels.append(_label(str(row["label"]), task, f"{task.name} row {number}"))
    return Split(texts, labels)
