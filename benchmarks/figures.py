"""Pictures of the results: time against sparsity and tokens, the roofline, and what
pruning costs.

Written to ``docs/``; one whose results are missing is left out.

    python -m benchmarks.figures
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import every_peer
from benchmarks.layers import family
from benchmarks.section import block_text
from benchmarks.tables import BEFORE, DEFAULT, ROOT, by_variant, latencies, load

#: Okabe and Ito's colours, which the colour-blind tell apart, each with a marker.
STYLES = {
    "(8, 1)": ("#0072B2", "o"),
    "(16, 1)": ("#56B4E9", "v"),
    "(16, 4)": ("#D55E00", "s"),
    "(32, 32)": ("#009E73", "^"),
    "(1, 96)": ("#CC79A7", "D"),
    "(1, 64)": ("#E69F00", "P"),
}
LAYER = "bert_base_ffn_up"
PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def rows(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of ``results/<name>.json`` with these values; none without the file."""
    return [
        row
        for data in load(f"{name}.json")
        for row in data["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def time_against_sparsity() -> Figure | None:
    found = rows("work", layer=LAYER)
    if not found:
        return None
    figure, axis = _axes(
        f"{_layer(found[0])}, {found[0]['M']} tokens, one thread, row-major"
    )
    for row in found:
        curve = {float(s): time for s, time in row["milliseconds"].items()}
        _line(axis, row, list(curve), list(curve.values()), "block ")
    tokens = found[0]["M"]
    reference = rows("block_sparse_linear", layer=LAYER, M=tokens)
    dense = [row["best_dense_ms"] for row in reference]
    _dense_peer(axis, "best dense float32 peer", dense)
    peers = rows("every_peer", layer=LAYER, M=tokens)
    _dense_peer(axis, "best dense 8-bit peer", [_best_int8(row) for row in peers])
    skipping = [
        row
        for row in peers
        if "DeepSparse" in row["times"] and block_text(row["block_shape"]) in STYLES
    ]
    axis.plot([row["sparsity"] for row in skipping],
              [row["times"]["DeepSparse"]["median_ms"] for row in skipping],
              linestyle="", color="black", marker="x", markersize=7, zorder=3,
              label="DeepSparse, same\nblocks")  # fmt: skip
    full = 2e-6 * tokens * found[0]["K"] * found[0]["N"]
    axis.plot([0, 1], [full / found[0]["peak_gflops"], 0], color="black", linewidth=1.2,
              linestyle=":", label="multiply-adds at peak")  # fmt: skip
    axis.set(xlabel="sparsity (removed weights)", ylabel="time (ms)", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(PERCENT)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _dense_peer(axis: Axes, name: str, times: Sequence[float]) -> None:
    """A line across: the time of a dense peer does not depend on the sparsity."""
    if not times:
        return
    middle = statistics.median(times)
    axis.axhline(middle, color="0.35", linestyle="--", linewidth=1.2)
    # Where no curve is: those of large times start high on the left.
    x, align = (0.99, "right") if middle > sum(axis.get_ylim()) / 2 else (0.01, "left")
    axis.annotate(name, (x, middle), xytext=(0, 4), textcoords="offset points",
                  fontsize=8, color="0.2", ha=align)  # fmt: skip


def _best_int8(row: dict[str, Any]) -> float:
    times = {n: t["median_ms"] for n, t in row["times"].items() if "int8" in n}
    return min(time for name, time in times.items()
               if "sparse" not in name and name != every_peer.INT8)  # fmt: skip


def time_against_tokens() -> Figure | None:
    found = rows("tokens", layer=LAYER)
    if not found:
        return None
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    figure.suptitle(
        f"{_layer(found[0])}, 80 % sparsity, one thread, row-major", fontsize=10
    )
    left, right = figure.subplots(1, 2)
    most = 0.0
    for row in found:
        curve = {int(m): t for m, t in row["milliseconds"].items() if int(m) <= 160}
        block, most = block_text(row["block_shape"]), max(most, *curve.values())
        colour, marker = STYLES[block]
        for axis in (left, right):
            axis.plot(list(curve), list(curve.values()), color=colour, linewidth=1.4,
                      marker=marker, markevery=(8, 16), markersize=4,
                      label=f"block {block}")  # fmt: skip
    reference = {
        row["M"]: row["best_dense_ms"]
        for row in rows("block_sparse_linear", layer=LAYER, sparsity=0.8)
        if row["M"] <= 160
    }
    left.plot(list(reference), list(reference.values()), color="black", linewidth=1,
              linestyle="--", marker=".", label="best dense float32 peer")  # fmt: skip
    left.set(xlabel="tokens M", ylim=(0, None))
    right.set(xlabel="tokens M (grey: full tiles with AVX-512)", ylim=(0, 1.1 * most))
    for axis in (left, right):
        axis.set(ylabel="time (ms)", xlim=(0, 162), xticks=range(0, 161, 16))
        axis.grid(color="0.92")
        axis.legend(fontsize=8, frameon=False, loc="upper left")
    for tile in range(48, 161, 48):
        right.axvline(tile, color="0.7", linewidth=1, zorder=0)
    return figure


def roofline() -> Figure | None:
    """Speed over arithmetic intensity, and the share of the peak over tokens."""
    found = rows("block_sparse_linear", sparsity=0.8)
    if not found:
        return None
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    peak = statistics.median(row["peak_gflops"] for row in found)
    for block, (colour, marker) in STYLES.items():
        of_block = [row for row in found if block_text(row["block_shape"]) == block]
        left.plot([_intensity(row) for row in of_block],
                  [row["of_peak"] * row["peak_gflops"] for row in of_block],
                  marker=marker, color=colour, linestyle="", markersize=4,
                  label=block)  # fmt: skip
        right.plot(*_of_peak(of_block), marker=marker, color=colour, markersize=5,
                   label=block)  # fmt: skip
        tiles = [
            row
            for row in rows("kernel", sparsity=0.8)
            if block_text(row["block_shape"]) == block
        ]
        right.plot(*_of_peak(tiles), marker=marker, color=colour, markersize=5,
                   markerfacecolor="white", linestyle=":")  # fmt: skip
    intensities = [_intensity(row) for row in found]
    reach = (min(intensities) / 1.5, max(intensities) * 1.5)
    left.axhline(peak, color="black", linewidth=1.2)
    left.annotate(f"multiply-add peak {peak:.0f} GFLOP/s", (reach[0], peak), fontsize=8,
                  xytext=(4, 4), textcoords="offset points")  # fmt: skip
    memory = [row["bandwidth_gb_s"] for row in rows("few_tokens", M=1)]
    if memory:
        speed = min(memory)
        left.plot([reach[0], peak / speed], [reach[0] * speed, peak], color="black",
                  linewidth=1.2, linestyle="--")  # fmt: skip
        left.annotate(f"dashed: largest weights read at {speed:.0f} GB/s",
                      (reach[0], peak), xytext=(4, 18), fontsize=8,
                      textcoords="offset points")  # fmt: skip
    left.set(
        xscale="log",
        yscale="log",
        xlim=reach,
        ylabel="GFLOP/s on kept weights",
        xlabel="operations per byte of packed weights, input and output",
    )
    left.set_ylim(top=peak * 2)
    right.set(
        xscale="log", xlabel="tokens M", ylabel="of the multiply-add peak, median"
    )
    right.set_ylim(0, 1)
    ticks = sorted({row["M"] for row in found})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.yaxis.set_major_formatter(PERCENT)
    right.axhline(0.75, color="0.5", linewidth=1, linestyle=":")
    right.annotate("to reach at M >= 96", (ticks[0], 0.75), xytext=(0, 3), fontsize=8,
                   color="0.35", textcoords="offset points")  # fmt: skip
    left.xaxis.set_major_formatter(NUMBER)
    left.yaxis.set_major_formatter(NUMBER)
    for axis, title in ((left, "block"), (right, "block (hollow: kernel on tiles)")):
        axis.grid(color="0.92")
        axis.legend(fontsize=8, frameon=False, loc="lower right", title=title,
                    title_fontsize=8, ncols=2)  # fmt: skip
    figure.suptitle("block_sparse_linear at 80 % sparsity, all layers, one thread",
                    fontsize=10)  # fmt: skip
    return figure


def _of_peak(found: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Numbers of tokens, and the median over the layers at each."""
    tokens = sorted({row["M"] for row in found})
    return tokens, [
        statistics.median(row["of_peak"] for row in found if row["M"] == count)
        for count in tokens
    ]


def _intensity(row: dict[str, Any]) -> float:
    kept = (1 - row["sparsity"]) * row["K"] * row["N"]
    blocks = kept / (row["block_shape"][0] * row["block_shape"][1])
    moved = kept + blocks + row["M"] * (row["K"] + row["N"])
    return float(2 * row["M"] * kept / (4 * moved))


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.8, 4), layout="constrained")
    axis = figure.subplots()
    axis.set_title(title, fontsize=10)
    axis.grid(color="0.92")
    return figure, axis


def _layer(row: dict[str, Any]) -> str:
    return f"{row['N']} x {row['K']} layer"


def _line(
    axis: Axes, row: dict[str, Any], x: Sequence[float], y: Sequence[float], label: str
) -> None:
    block = block_text(row["block_shape"])
    colour, marker = STYLES[block]
    line = "-" if family(row["block_shape"]) == "(r, c)" else "-."
    axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4,
              linestyle=line, label=label + block)  # fmt: skip


def accuracy() -> Figure | None:
    """What pruning costs, over sparsity and over measured latency."""
    whole = {**by_variant(DEFAULT), **by_variant(BEFORE)}
    most = max((len(row) for row in whole.values()), default=0)
    # Not what has only begun: its tasks would be the only ones that all have.
    found = {setting: row for setting, row in whole.items() if 2 * len(row) > most}
    tasks = set.intersection(*(set(row) for row in found.values())) if found else set()
    if not tasks:
        return None
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    over = "mean over " if len(tasks) > 1 else ""
    figure.suptitle(f"all-MiniLM-L6-v2, {over}{', '.join(sorted(tasks))}", fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    timed = latencies(DEFAULT)
    for variant, block in dict.fromkeys((key[0], key[2]) for key in found):
        text = f"({block.replace(',', ', ')})"
        colour, marker = STYLES.get(text.replace("in/8", "96"), ("black", "x"))
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4,
                 "label": text}  # fmt: skip
        if variant == BEFORE:
            style |= {"label": f"{text}, by layer", "mfc": "none", "linestyle": "--"}
        curve = [
            (sparsity, statistics.fmean(row[task].change for task in tasks))
            for (name, sparsity, of), row in found.items()
            if (name, of) == (variant, block)
        ]
        left.plot(*zip(*curve, strict=True), **style)
        if variant == BEFORE:  # timed on another CPU, and times of two do not compare
            continue
        against = [
            (timed[sparsity, block]["packed"]["median_ms"], change)
            for sparsity, change in curve
            if (sparsity, block) in timed
        ]
        if against:
            right.plot(*zip(*against, strict=True), **style)
    dense = [
        min(t["median_ms"] for name, t in times.items() if name != "packed")
        for times in timed.values()
    ]
    if dense:
        right.plot(statistics.median(dense), 0, color="black", marker="*", markersize=9,
                   linestyle="", label="best dense engine")  # fmt: skip
        right.set_xlim(left=0)
    left.set(xlabel="sparsity (removed weights)", ylabel="change from dense (points)")
    left.xaxis.set_major_formatter(PERCENT)
    right.set(xlabel="time (ms), 1 x 128 tokens, one thread")
    for axis in (left, right):
        axis.axhline(0, color="0.35", linestyle="--", linewidth=1)
        axis.grid(color="0.92")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False, title="block", title_fontsize=8)
    return figure


FIGURES: dict[str, Callable[[], Figure | None]] = {
    "time_against_sparsity": time_against_sparsity,
    "time_against_tokens": time_against_tokens,
    "roofline": roofline,
    "accuracy": accuracy,
}


def main() -> None:
    for name, draw in FIGURES.items():
        figure = draw()
        if figure is None:
            print(f"{name}: its results are missing")
            continue
        path = ROOT / "docs" / f"{name}.png"
        figure.savefig(path, dpi=150)
        print(path)


if __name__ == "__main__":
    main()
