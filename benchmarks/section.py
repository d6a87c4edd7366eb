"""A section of the benchmarks: what it measures, shows and must reach."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import result
from benchmarks.layers import BLOCKS, FEW_SHAPES, SHAPES
from pybsp.blocks import BlockShape, check_block_shape, parse_block_shape
from pybsp.cli.timing import torch_threads

#: Headings, and rows of as many texts.
Summary = tuple[Sequence[str], list[list[str]]]


@dataclass(frozen=True)
class Options:
    """What to measure; an empty tuple means what the section measures by itself."""

    quick: bool = False
    threads: int = 1
    #: The Python of an environment that has DeepSparse.
    deepsparse: str | None = None
    layers: tuple[str, ...] = ()
    blocks: tuple[BlockShape, ...] = ()
    tokens: tuple[int, ...] = ()
    sparsities: tuple[float, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the result may replace the published one."""
        narrowed = (self.layers, self.blocks, self.tokens, self.sparsities)
        return not self.quick and self.threads == 1 and not any(narrowed)

    def shapes(self, names: Sequence[str] = tuple(SHAPES)) -> dict[str, Any]:
        """The layers ``(out, in)`` of a section that has these by itself."""
        few = [name for name in names if name in FEW_SHAPES] or names[:1]
        return {n: SHAPES[n] for n in self.layers or (few if self.quick else names)}

    def divisors(
        self, shape: tuple[int, int], blocks: Sequence[BlockShape] = BLOCKS
    ) -> list[BlockShape]:
        """The block shapes that divide a weight of this shape."""
        return [
            (r, c)
            for r, c in self.blocks or blocks
            if shape[0] % r == 0 and shape[1] % c == 0
        ]


@dataclass(frozen=True)
class Section:
    """``measure`` returns ``rows``, and ``targets`` made by ``reach``."""

    name: str
    measure: Callable[[Options], dict[str, Any]]
    summary: Callable[[dict[str, Any]], Summary]

    def run(self, options: Options) -> dict[str, Any]:
        # no_grad: torch's BSR product fails under inference_mode.
        with torch.no_grad(), torch_threads(options.threads):
            data = {"quick": options.quick, **self.measure(options)}
            if options.complete and "missing" not in data:
                result.save(self.name, data)
            return data

    def show(self, screen: Console, data: dict[str, Any], targets: bool = True) -> None:
        if "missing" in data:
            screen.print(f"{self.name}: not measured, missing: {data['missing']}")
            return
        head, rows = self.summary(data)
        screen.print(text_table(self.name, head, rows))
        if targets and data.get("targets"):
            screen.print(text_table("", *numbers(data["targets"])))


def every_column(data: dict[str, Any]) -> Summary:
    """The summary of a section without one of its own: what the rows say."""
    rows = data["rows"]
    head = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    return head, [[str(row.get(key, "")) for key in head] for row in rows]


def numbers(targets: list[dict[str, Any]]) -> Summary:
    """Targets beside what was measured."""
    return ("what", "target", "measured", "reached"), [
        [t["what"], t["target"], t["measured"], "yes" if t["reached"] else "**no**"]
        for t in targets
    ]


def reach(
    what: str,
    values: Sequence[float],
    *,
    median: float | None = None,
    every: float | None = None,
    at_most: bool = False,
    form: str = "{:.2f}",
) -> list[dict[str, Any]]:
    """One target, or none without values: for the median, for every value, or both."""
    if not values:
        return []
    middle, worst = statistics.median(values), (max if at_most else min)(values)
    relation, word = ("<=", "most") if at_most else (">=", "least")
    wanted = [(median, middle, "median"), (every, worst, "every case")]
    pairs = [(bound, found, of) for bound, found, of in wanted if bound is not None]
    single = len(values) == 1
    return [
        {
            "what": what,
            "target": ", ".join(
                f"{relation} {form.format(bound)}" + ("" if single else f" ({of})")
                for bound, _, of in pairs
            ),
            "measured": form.format(middle)
            + ("" if single else f" ({word} {form.format(worst)})"),
            "reached": all(
                found <= bound if at_most else found >= bound
                for bound, found, _ in pairs
            ),
        }
    ]


def console() -> Console:
    """As wide as the terminal; wide enough for every table where there is none."""
    return Console(width=None if sys.stdout.isatty() else 180)


def text_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for index, heading in enumerate(head):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(text.replace("**", "") for text in row))
    return table


def block_text(block_shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, block_shape)) + ")"


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="few cases, nothing saved")
    made.add_argument("--json", action="store_true", help="print JSON, no tables")
    made.add_argument(
        "--threads", type=int, default=1, help="with more than 1 nothing is saved"
    )
    made.add_argument(
        "--deepsparse", metavar="PYTHON", help="of an environment that has DeepSparse"
    )
    narrow = made.add_argument_group("only these cases; nothing is saved then")
    narrow.add_argument(
        "--layers", nargs="+", choices=SHAPES, default=[], metavar="NAME"
    )
    narrow.add_argument("--blocks", nargs="+", type=numeric_block_shape, default=[])
    narrow.add_argument("--tokens", nargs="+", type=int, default=[])
    narrow.add_argument("--sparsity", nargs="+", type=float, default=[])
    return made


def numeric_block_shape(text: str) -> BlockShape:
    return check_block_shape(parse_block_shape(text))


def options(arguments: argparse.Namespace) -> Options:
    return Options(
        quick=arguments.quick,
        threads=arguments.threads,
        deepsparse=arguments.deepsparse,
        layers=tuple(arguments.layers),
        blocks=tuple(arguments.blocks),
        tokens=tuple(arguments.tokens),
        sparsities=tuple(arguments.sparsity),
    )


def main(section: Section, description: str | None) -> None:
    """The command line of one section."""
    arguments = parser(description).parse_args()
    data = section.run(options(arguments))
    if arguments.json:
        print(json.dumps(data))
    else:
        section.show(console(), data)
