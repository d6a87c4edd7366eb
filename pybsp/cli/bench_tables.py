"""What ``pybsp bench`` found, for the terminal."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..nn.report import EncoderReport, LayerReport, PackReport
from .breakdown import PARTS
from .reporting import megabytes, threads_text

Row = Mapping[str, Any]

#: Candidate -> how a table calls it.
NAMES = {"dense": "torch dense"}


def tables(
    data: Mapping[str, Any], encoders: Sequence[EncoderReport]
) -> Iterator[Table | Text]:
    """Times, the floor, the parts, memory and what ran, in this order."""
    rows, host = data["measurements"], data["environment"]
    one = len(rows) == 1
    if one:
        yield candidates_table(rows[0])
    else:
        yield latency_table(rows)
        yield throughput_table(rows)
    yield from map(Text, dict.fromkeys(row["note"] for row in rows if "note" in row))
    if rows[0]["parts"]:
        if one and rows[0]["floor"]:
            yield Text(floor_line(rows[0]))
        yield parts_table(rows)
    else:
        reasons = [str(one) for one in encoders if not one.native]
        why = "; ".join(reasons or [rows[0]["no_parts"]])
        yield Text(f"No times by part and no arithmetic floor: {why}.")
    yield Text(memory_line(data["memory"]))
    yield Text(
        f"{host['cpu']}, {host['isa']}; times are medians of interleaved rounds."
    )


def candidates_table(row: Row) -> Table:
    """The candidates on one input."""
    padded = row["batch"] * row["sequence"] - row["tokens"]
    title = f"{_what(row)}, {_shape(row)} tokens"
    if padded:
        title += f", {padded} of them padding"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    _add_columns(
        table, "median ms", "p95 ms", "sequences/s", "tokens/s", "packed is"
    )  # fmt: skip
    packed = row["candidates"]["packed"]["median_ms"]
    for name, timing in row["candidates"].items():
        gain = f"{timing['median_ms'] / packed:.2f}x faster" if name != "packed" else ""
        table.add_row(
            NAMES.get(name, name),
            f"{timing['median_ms']:.2f}",
            f"{timing['p95_ms']:.2f}",
            _rate(timing["sequences_per_s"]),
            _rate(timing["tokens_per_s"]),
            gain,
        )
    return table


def latency_table(rows: Sequence[Row]) -> Table:
    """The candidates on several inputs."""
    names = list(dict.fromkeys(name for row in rows for name in row["candidates"]))
    names.sort(key=lambda name: name != "packed")
    table = Table(title=f"{_what(rows[0])}: median / p95 ms", title_justify="left")
    table.add_column("input", no_wrap=True)
    _add_columns(table, *(NAMES.get(name, name) for name in names))
    for row in rows:
        found = row["candidates"]
        table.add_row(
            _shape(row),
            *(_times(found[name]) if name in found else "-" for name in names),
        )
    return table


def throughput_table(rows: Sequence[Row]) -> Table:
    """The packed model on several inputs."""
    floors = [row["floor"] for row in rows]
    title = "packed"
    if floors[0]:
        title += f", floor at {_peaks(floors[0])}"
    table = Table(
        title=title,
        title_justify="left",
        caption="gain: over the fastest dense candidate",
        caption_justify="left",
    )
    table.add_column("input", no_wrap=True)
    _add_columns(table, "tokens", "sequences/s", "tokens/s", "gain", "floor ms")
    _add_columns(table, "time/floor")
    for row, floor in zip(rows, floors, strict=True):
        packed = row["candidates"]["packed"]
        table.add_row(
            _shape(row),
            f"{row['tokens']:,}",
            _rate(packed["sequences_per_s"]),
            _rate(packed["tokens_per_s"]),
            f"{row['speedup_over_best_dense']['median']:.2f}x",
            f"{floor['ms']:.2f}" if floor else "-",
            f"{floor['times_floor']:.2f}x" if floor else "-",
        )
    return table


def floor_line(row: Row) -> str:
    floor = row["floor"]
    return (
        f"arithmetic floor {floor['ms']:.2f} ms at {_peaks(floor)}: "
        f"{floor['times_floor']:.2f}x"
    )


def _peaks(floor: Row) -> str:
    text = f"{floor['peak_gflops']:.0f} GFLOP/s"
    if "int8_peak_gops" not in floor:
        return text
    return f"{text}, 8 bits at {floor['int8_peak_gops']:.0f} GOP/s"


def parts_table(rows: Sequence[Row]) -> Table:
    """The parts of a call of the packed model: milliseconds where there is one input,
    and the share of each."""
    one = len(rows) == 1
    table = Table(
        title="packed, share of the time by part",
        title_justify="left",
        show_footer=True,
    )
    totals = [sum(row["parts"]["ms"].values()) for row in rows]
    table.add_column("part", footer="all" if one else "all, ms")
    if one:
        table.add_column("ms", justify="right", footer=f"{totals[0]:.3f}")
    for row, total in zip(rows, totals, strict=True):
        title, footer = ("share", "") if one else (_shape(row), f"{total:.2f}")
        table.add_column(title, justify="right", footer=footer)
    for name, text in PARTS.items():
        shares = [f"{100 * row['parts']['share'][name]:.1f} %" for row in rows]
        times = [f"{rows[0]['parts']['ms'][name]:.3f}"] if one else []
        table.add_row(text, *times, *shares)
    return table


def layers_table(report: PackReport, dtype: str) -> Table:
    """The layers alone: those that differ in their numbers only are one row."""
    kinds: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in report.layers:
        name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", layer.name)
        key = (name, layer.shape, layer.block_shape, layer.packed, layer.reason)
        kinds.setdefault(key, []).append(layer)
    known = {"float32": "predicted", "bfloat16": "predicted as float32"}.get(
        dtype, f"{dtype}, measured"
    )
    table = Table(
        title=f"each layer alone, {report.tokens} tokens, {known}",
        title_justify="left",
        caption=report.summary(),
        caption_justify="left",
    )
    table.add_column("layers", overflow="fold")
    _add_columns(table, "", "shape", "density", "dense us", "packed us", "gain")
    for (name, shape, _, packed, reason), layers in kinds.items():
        values = [
            [getattr(layer, field) for layer in layers]
            for field in ("dense_us", "sparse_us", "gain")
        ]
        table.add_row(
            name if packed else f"{name} (dense: {reason})",
            f"{len(layers)} x" if len(layers) > 1 else "",
            "{}x{}".format(*shape),
            f"{statistics.mean(layer.density for layer in layers):.3f}",
            *(
                "-" if None in found else format(statistics.median(found), spec)
                for found, spec in zip(values, (".0f", ".0f", ".2f"), strict=True)
            ),
        )
    return table


def memory_line(memory: Mapping[str, int]) -> str:
    packed, dense = (memory[f"{form}_weight_bytes"] for form in ("packed", "dense"))
    return (
        f"weights in memory: packed {megabytes(packed)}, dense {megabytes(dense)} "
        f"({packed / dense:.2f}x)"
    )


def _what(row: Row) -> str:
    dtype = "" if row["dtype"] == "float32" else f" in {row['dtype']}"
    return f"{row['what']}{dtype}, {threads_text(row['threads'])}"


def _shape(row: Row) -> str:
    return f"{row['batch']} x {row['sequence']}"


def _times(timing: Mapping[str, float]) -> str:
    return f"{_three(timing['median_ms'])} / {_three(timing['p95_ms'])}"


def _three(value: float) -> str:
    """Three digits that matter, or all before the point."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _add_columns(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right")
