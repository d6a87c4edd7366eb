"""Tables for the terminal and pictures of what was kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table
from torch import nn

from ..blocks import BlockShape, block_view
from ..pruning.sparsity import ModelSparsity

#: Pictures hold at most this many layers of a kind, so that they stay readable.
MOST_ROWS = 24


def results_table(results: Mapping[str, Any]) -> Table:
    """Dense against pruned: score, sparsity, size and latency."""
    metric, scores = results["metric"], results["scores"]
    sparsity, files, latency = (
        results[key] for key in ("sparsity", "files", "latency")
    )
    dense_ms, packed_ms = (
        latency["candidates"][name]["median_ms"] for name in ("dense", "packed")
    )
    table = Table(title=escape(results["title"]), title_justify="left")
    for heading in ("", "dense", "pruned, packed", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    before, after = scores["dense"][metric], scores["final"][metric]
    table.add_row(
        f"{metric} (dev)", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
    )
    table.add_row(
        "sparsity of the pruned layers", "0 %", f"{100 * sparsity['reached']:.1f} %", ""
    )
    table.add_row(
        "encoder file size",
        megabytes(files["dense_encoder_bytes"]),
        megabytes(files["packed_encoder_bytes"]),
        f"{files['encoder_ratio']:.2f}x",
    )
    table.add_row(
        f"latency ({latency['batch']} x {latency['sequence']} tokens, "
        f"{threads_text(latency['threads'])})",
        f"{dense_ms:.2f} ms",
        f"{packed_ms:.2f} ms",
        f"{latency['speedup']['median']:.2f}x faster",
    )
    return table


def counts(sparsity: ModelSparsity, target: float) -> dict[str, Any]:
    """The pruned layers and the sparsity over them, as plain data."""
    pruned = sparsity.pruned_layers
    weights = sum(layer.weights for layer in pruned)
    zeros = sum(layer.zeros for layer in pruned)
    return {
        "sparsity": {
            "target": target,
            "reached": round(zeros / weights, 6),
            "counted": f"the {weights:,} weights of {len(pruned)} linear layers",
            "weights": weights,
            "parameters": sparsity.parameters,
            "of_all_parameters": round(zeros / sparsity.parameters, 6),
        },
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "block_shape": list(layer.block_shape or ()),
                "density": round(1 - layer.zero_blocks / layer.blocks, 6),
            }
            for layer in pruned
        ],
    }


def layer_table(rows: list[dict[str, Any]]) -> Table:
    """Density of every pruned layer."""
    table = Table("layer")
    for heading in ("shape", "block", "density"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            "x".join(map(str, row["shape"])),
            "x".join(map(str, row["block_shape"])),
            f"{row['density']:.3f}",
        )
    return table


def kept_blocks(
    model: nn.Module, shapes: Mapping[str, BlockShape]
) -> dict[str, NDArray[np.bool_]]:
    """By module name, which blocks ``(out/r, in/c)`` of a dense model are not zero."""
    kept = {}
    for name, shape in shapes.items():
        weight = model.get_submodule(name).get_parameter("weight").detach()
        blocks = block_view(weight != 0, shape).any(3).any(2)
        kept[name] = blocks.cpu().numpy()
    return kept


def save_kept_blocks(
    kept: Mapping[str, NDArray[np.bool_]], path: Path, title: str
) -> None:
    """Draw every layer's block grid: dark where a block was kept.

    One row a layer, one column for each kind of matrix.
    """
    from matplotlib.figure import Figure

    places = {name: _row_and_column(name) for name in kept}
    columns = list(dict.fromkeys(column for _, column in places.values()))
    rows = sorted({row for row, _ in places.values()})[:MOST_ROWS]
    figure = Figure(
        figsize=(1.7 * len(columns) + 0.6, 1.15 * len(rows) + 0.9), layout="constrained"
    )
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for name, (row, column) in places.items():
        if row not in rows:
            continue
        axis = axes[rows.index(row)][columns.index(column)]
        axis.set_axis_on()
        axis.imshow(1.0 - kept[name], cmap="gray", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(f"{100 * kept[name].mean():.0f} % kept", fontsize=6, labelpad=2)
    for index, column in enumerate(columns):
        axes[0][index].set_title(column, fontsize=7)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def save_norm_histograms(
    histograms: Mapping[str, Mapping[str, list[float]]], path: Path
) -> None:
    """Draw block-norm histograms over one another; see ``norm_histogram``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, histogram in histograms.items():
        axis.stairs(
            histogram["counts"], histogram["log10_edges"], label=name.replace("_", " ")
        )
    axis.set_xlabel("log10 of the root mean square of a block")
    axis.set_ylabel("blocks")
    axis.legend()
    _save(figure, path)


def norm_histogram(
    norms: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Counts of the log10 root mean squares of all blocks; zeros fall in the first bin.

    ``norms`` are block norms by layer, ``sizes`` the number of weights in a block.
    """
    edges = np.linspace(-6.0, 0.5, 66)
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for name, value in norms.items():
        rms = value.detach().double().flatten().cpu().numpy() / sizes[name] ** 0.5
        logs = np.log10(np.clip(rms, 10.0 ** edges[0], 10.0 ** edges[-1]))
        counts += np.histogram(np.clip(logs, edges[0], edges[-1]), bins=edges)[0]
    return {
        "log10_edges": [round(float(edge), 4) for edge in edges],
        "counts": counts.tolist(),
    }


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def threads_text(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _row_and_column(name: str) -> tuple[int, str]:
    """``encoder.layer.3.output.dense`` -> ``(3, "output.dense")``."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (0, name)


def _save(figure: Any, path: Path) -> None:
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, format="png", dpi=160)
    beside.replace(path)
