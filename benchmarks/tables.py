"""Writes the tables of README.md and docs/ from ``results/``.

A table stands between ``<!-- table:NAME -->`` and ``<!-- end -->``; the rest of a page
is left alone.

    python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import (
    quantization_accuracy,
    section,
    size,
    whole_encoder,
    whole_encoder_int8,
)
from benchmarks.result import RESULTS
from benchmarks.sections import SECTIONS
from pybsp.cli import study

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/speed.md", "docs/pruning.md",
         "docs/quantization.md", "docs/packing.md")  # fmt: skip
GLUE_TASKS = ("mrpc", "stsb", "cola", "rte", "sst2")
#: Variants of ``pybsp glue``: the default recipe, and what was the default when most of
#: the study was run, all of it with ``--prune-lr 5e-4`` at 80 % and above: no run at
#: today's rate belongs beside it.
DEFAULT, BEFORE = "reconstruct", "layer-error"
#: The results of ``benchmarks.encoder`` for their checkpoints, each of one CPU.
TIMED = {DEFAULT: "encoder_zen4", BEFORE: "encoder"}
USUAL_BLOCK = "8,1"
#: The sparsity with most tasks and seeds.
HEADLINE = 0.8
#: What follows the name of a section's results from the machines before, of Intel.
EARLIER = "_xeon"
METRICS = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation"}


def load(pattern: str) -> list[dict[str, Any]]:
    files = sorted(RESULTS.glob(pattern))
    return [{"run": f.stem, **json.loads(f.read_text())} for f in files]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score(run: dict[str, Any], stage: str) -> str:
    """The task's metrics in percent, all of them: F1 alone hides a constant answer."""
    found = run["scores"][stage]
    return " / ".join(f"{100 * found[metric]:.1f}" for metric in run["task"]["metrics"])


def studied(folder: str = "glue") -> list[study.Cell]:
    """The runs of ``pybsp glue`` in the order of blocks, sparsities and variants."""
    order = list(study.VARIANTS)
    return sorted(
        (study.Cell.from_name(f.stem) for f in (RESULTS / folder).glob("*.json")),
        key=lambda c: (
            c.block != USUAL_BLOCK,
            c.block,
            c.sparsity,
            order.index(c.variant),
            c.task,
            c.seed,
        ),
    )


def by_variant(variant: str) -> dict[study.Setting, dict[str, study.Summary]]:
    """What one variant gave: the default recipe, or what was the default before."""
    cells = (cell for cell in studied() if cell.variant == variant)
    return study.summaries(RESULTS / "glue", cells)


def cell_results(cell: study.Cell, folder: str = "glue") -> dict[str, Any]:
    return study.read_results(RESULTS / folder / f"{cell.name}.json")


def cell_score(cell: study.Cell, stage: str, folder: str = "glue") -> float:
    """In percent, of the ``"dense"`` or the ``"packed"`` model of a run."""
    return study.score(cell_results(cell, folder)["scores"][stage])


def latencies(variant: str) -> dict[tuple[float, str], dict[str, Any]]:
    """By sparsity and block, the latency of one of the checkpoints."""
    timed: dict[tuple[float, str], dict[str, Any]] = {}
    for run in load(f"{TIMED[variant]}.json"):
        for row in run["rows"]:
            cell = study.Cell.from_name(row["run"])
            if cell.variant == variant:
                timed.setdefault((cell.sparsity, cell.block), row["candidates"])
    return timed


def mean_dense(
    found: Mapping[study.Setting, Mapping[str, study.Summary]], task: str
) -> float:
    """Of the setting with most seeds, the headline's if there are several. Others may
    have dense models of their own: a seed gives another one on another CPU."""
    models = {s: row[task].dense for s, row in found.items() if task in row}
    setting = max(models, key=lambda s: (len(models[s]), s[1] == HEADLINE))
    return statistics.fmean(models[setting])


def score_rows(
    found: Mapping[study.Setting, Mapping[str, study.Summary]], tasks: Sequence[str]
) -> list[list[str]]:
    return [
        [
            *(row[task].text() if task in row else "" for task in tasks),
            f"{study.mean_change(row):+.1f}",
        ]
        for row in found.values()
    ]


def glue(variant: str = DEFAULT) -> str:
    """Dev scores by block and sparsity: the dense model's first."""
    found, timed = by_variant(variant), latencies(variant)
    tasks = [task for task in GLUE_TASKS if any(task in row for row in found.values())]
    dense = {task: mean_dense(found, task) for task in tasks}
    rows = [["", "dense", *(f"{dense[task]:.1f}" for task in tasks), "", "", ""]]
    for (_, sparsity, block), scores in zip(
        found, score_rows(found, tasks), strict=True
    ):
        times = timed.get((sparsity, block))
        speed = ["", ""]
        if times:
            packed = times["packed"]["median_ms"]
            best = min(t["median_ms"] for name, t in times.items() if name != "packed")
            speed = [f"{packed:.2f}", f"{best / packed:.1f}x"]
        rows.append(
            [f"({block.replace(',', ', ')})", f"{sparsity:.0%}", *scores, *speed]
        )
    return markdown(
        [
            "block",
            "sparsity",
            *tasks,
            "mean change",
            "ms",
            "faster than the best dense",
        ],
        rows,
    )


def whole_tasks() -> str:
    """All rows of every task, where ``glue`` has a part of sst2's: the default recipe
    and what was it before, each beside its own dense models."""
    whole = study.summaries(RESULTS / "glue_whole", studied("glue_whole"))
    whole = {s: {**by_variant(s[0])[s], **row} for s, row in whole.items()}
    tasks = [task for task in GLUE_TASKS if any(task in row for row in whole.values())]
    rows = []
    for setting, scores in zip(whole, score_rows(whole, tasks), strict=True):
        variant, sparsity, _ = setting
        dense = (
            f"{statistics.fmean(whole[setting][task].dense):.1f}"
            if task in whole[setting]
            else ""
            for task in tasks
        )
        rows += [[variant, "dense", *dense, ""], ["", f"{sparsity:.0%}", *scores]]
    return markdown(["variant", "sparsity", *tasks, "mean change"], rows)


def variants(
    folder: str = "glue", usual: str = BEFORE, names: Sequence[str] = ()
) -> str:
    """What changes when one thing of the ``usual`` variant does: the same tasks and
    seeds. ``names`` are the variants of the table; all by default."""
    cells = [c for c in studied(folder) if not names or c.variant in names]
    return compared(
        folder, cells, lambda cell: replace(cell, variant=usual), f"`{usual}`"
    )


def blocks() -> str:
    """What changes when the blocks do: the same tasks and seeds."""
    cells = [cell for cell in studied() if cell.variant == BEFORE]
    return compared(
        "glue", cells, lambda cell: replace(cell, block=USUAL_BLOCK), "(8, 1)"
    )


def compared(
    folder: str,
    cells: Sequence[study.Cell],
    usual: Callable[[study.Cell], study.Cell],
    name: str,
) -> str:
    """Cells beside those that ``usual`` makes of them, called ``name``."""
    pairs = {
        cell: other
        for cell in cells
        if (other := usual(cell)) in cells
        if cell != other
    }
    found = study.summaries(
        RESULTS / folder, (c for c in cells if c in pairs or c in pairs.values())
    )
    tasks = [task for task in GLUE_TASKS if any(task in row for row in found.values())]
    rows = []
    for setting, scores in zip(found, score_rows(found, tasks), strict=True):
        variant, sparsity, block = setting
        here = {
            cell: other
            for cell, other in pairs.items()
            if (cell.variant, cell.sparsity, cell.block) == setting
        }
        differences = [
            cell_score(cell, "packed", folder) - cell_score(other, "packed", folder)
            for cell, other in here.items()
        ]
        paired = ""
        if differences:
            paired = f"{statistics.fmean(differences):+.1f}"
            if len(differences) > 1:
                error = statistics.stdev(differences) / len(differences) ** 0.5
                paired += f" +- {error:.1f}"
        ratios = [
            changed / default
            for cell, other in here.items()
            if (changed := divergence(cell, folder))
            if (default := divergence(other, folder))
        ]
        ratio = f"{statistics.geometric_mean(ratios):.2f}x" if ratios else ""
        block = f"({block.replace(',', ', ')})"
        rows.append(
            [variant, block, f"{sparsity:.0%}", *scores[: len(tasks)], paired, ratio]
        )
    last = [f"against {name} +- standard error", "divergence"]
    return markdown(["variant", "block", "sparsity", *tasks, *last], rows)


def ablation(name: str, usual: str, *more: str) -> Callable[[], str]:
    """One of the ablations of ``pybsp glue`` and ``more`` variants, at fewer epochs."""
    return lambda: variants("ablation", usual, (*study.ABLATIONS[name][0], *more))


def divergence(cell: study.Cell, folder: str = "glue") -> float | None:
    """Of the logits from the dense model's; None for runs that did not record it."""
    found = cell_results(cell, folder).get("fidelity", {})
    return found.get("logits")  # type: ignore[no-any-return]


def linear() -> str:
    """One BERT-base layer at 80 %, by block shape and tokens."""
    rows = [
        [
            section.block_text(row["block_shape"]),
            str(row["M"]),
            f"{row['times']['pybsp']['median_ms']:.3f}",
            f"{row['speedup']:.1f}x",
            f"{row['of_peak']:.0%}",
        ]
        for run in load("block_sparse_linear.json")
        for row in run["rows"]
        if row["sparsity"] == 0.8 and row["layer"] == "bert_base_ffn_up"
    ]
    head = ["block", "tokens", "ms", "faster than the best dense peer", "of FMA peak"]
    return markdown(head, rows)


def measured() -> Iterator[tuple[section.Section, dict[str, Any]]]:
    """The saved runs of every section, the earlier one after the last."""
    for part in SECTIONS:
        for suffix in ("", EARLIER):
            for run in load(f"{part.name}{suffix}.json"):
                yield part, run


def numbers() -> str:
    """What every section was to reach, and the command that measures it."""
    head, rows = ("what", "target", "measured", "reached", "CPU", "command"), []
    for part, run in measured():
        where = run["environment"]
        cpu = f"{where['cpu'].split()[0].removesuffix('(R)')}, {where['isa']}"
        _, found = section.numbers(run.get("targets", []))
        rows += [[*row, cpu, f"`python -m benchmarks.{part.name}`"] for row in found]
    return markdown(head, rows)


def machine() -> str:
    """On what, and from which sources, the sections were measured."""
    found: dict[str, list[str]] = {}
    for _, run in measured():
        where = run["environment"]
        peers = ", ".join(f"{name} {v}" for name, v in where["peers"].items())
        text = f"{where['cpu']}, {where['isa']}, {peers}, commit {run['commit']}"
        found.setdefault(text, []).append(run["run"])
    return "\n".join(f"- {text}: {', '.join(names)}" for text, names in found.items())


def of_section(part: section.Section, suffix: str = "") -> Callable[[], str]:
    """The summary that the section's command prints, of the last run or ``EARLIER``."""

    def table() -> str:
        runs = load(f"{part.name}{suffix}.json")
        command = f"`python -m benchmarks.{part.name}`"
        return markdown(*part.summary(runs[0])) if runs else f"Run {command}."

    return table


def hook() -> str:
    """What the pruner adds to a training step."""
    rows = [
        [
            row["block_shape"],
            row["phase"],
            row["penalty"],
            f"{row['step_ms']:.0f}",
            f"{row['hooks_ms']:.1f}",
            f"{row['share']:.2%}",
            str(row.get("autograd_penalty_ms", "")),
        ]
        for run in load("training_hook.json")
        for row in run["rows"]
    ]
    head = ["block", "phase", "penalty", "step ms", "hooks ms", "share",
            "same penalty in autograd ms"]  # fmt: skip
    return markdown(head, rows)


def training_step() -> str:
    """A masked retraining step against a packed one."""
    rows = [
        [
            f"{run['batch']} x {run['tokens']}",
            f"{run['dropout']:g}",
            "({}, {})".format(*row["block_shape"]),
            f"{row['sparsity']:.0%}",
            f"{row['masked']['median_ms']:.0f}",
            f"{row['packed']['median_ms']:.0f}",
            f"{row['parts_ms']['masked']['linear backward']:.0f}",
            f"{row['parts_ms']['packed']['linear backward']:.0f}",
            f"{row['speedup']['median']:.2f}x",
        ]
        for run in load("training_step*.json")
        for row in run["rows"]
    ]
    head = ["batch", "dropout", "block", "sparsity", "masked ms", "packed ms",
            "linear backward, masked", "packed", "faster"]  # fmt: skip
    return markdown(head, rows)


def penalty() -> str:
    """The same run with and without the penalty, cut once."""
    rows = [
        [
            {"magnitude": "none"}.get(
                run["config"]["method"],
                f"{run['config']['method']}, {run['config']['penalty']}",
            ),
            score(run, "dense"),
            score(run, "magnitude_cut"),
            score(run, "after_cut"),
            score(run, "final"),
        ]
        for run in load("penalty/*.json")
    ]
    head = ["penalty", "dense", "cut untrained", "right after the cut",
            "after retraining"]  # fmt: skip
    return markdown(head, rows)


def quantization() -> str:
    """Int8 against float32 by the choice of scales, dense and pruned side by side."""
    rows: dict[str, list[str]] = {}
    for row in load("quantization.json")[0]["rows"]:
        rows.setdefault(row["scheme"], []).extend(
            [f"{100 * row['hidden']:.1f} %", f"{row['cosine']:.4f}",
             f"{row['worst_cosine']:.4f}"]
        )  # fmt: skip
    columns = ("hidden", "cosine", "worst")
    head = [f"{part}: {name}" for part in ("dense", "80 %") for name in columns]
    return markdown(["scales", *head], [[name, *row] for name, row in rows.items()])


def bfloat16() -> str:
    """Times of bfloat16 over those of float32, by what is multiplied."""
    run = load("bfloat16.json")[0]
    tokens = sorted({row["M"] for row in run["rows"]})
    ratios = {(row["what"], row["M"]): row["ratio"] for row in run["rows"]}
    names = dict.fromkeys(row["what"] for row in run["rows"])
    return markdown(
        ["", *(f"{count} tokens" if count > 1 else "1 token" for count in tokens)],
        [
            [name.replace("layers ", ""), *(f"{ratios[name, n]:.2f}" for n in tokens)]
            for name in names
        ],
    )


def quantized_accuracy() -> str:
    """Int8 against float32 of the same run."""
    return markdown(
        *quantization_accuracy.summary(load("quantization_accuracy/*.json"))
    )


def sizes() -> str:
    """Bytes of the encoder by sparsity and type, with accuracy and latency."""
    return markdown(*size.summary(load("size.json")[0]))


def one_shot() -> str:
    """Cuts without training: by norm, and by reconstruction."""
    rows = [
        [
            f"{run['task']} ({METRICS.get(run['metric'], run['metric'])})",
            f"{row['sparsity']:.0%}" if "sparsity" in row else "",
            row["cut"],
            row.get("charged", ""),
            str(row.get("texts", "")),
            f"{100 * row[run['metric']]:.1f}",
            f"{row['error']:.2f}",
        ]
        for run in load("accuracy/one_shot/*.json")
        for row in run["rows"]
    ]
    head = ["task", "sparsity", "cut", "by error of", "texts", "dev score", "error"]
    return markdown(head, rows)


def memory() -> str:
    """Megabytes of a process beyond its imports, dense and packed."""
    forms = load("memory.json")[0]["rows"]
    rows = [["file", *(f"{form['file_mb']:.1f}" for form in forms)]]
    for what, when, part in (
        ("after loading", "load", "total"),
        ("after the first answer, 128 tokens", "first answer", "total"),
        ("after 51 answers and reading every row of the embeddings", "all words",
         "total"),
        ("of these: pages of the file", "all words", "file"),
        ("of these: allocated", "all words", "anonymous"),
        ("of these: code of torch that was not needed before", "all words",
         "libraries"),
        ("allocated while loading", "load", "anonymous"),
    ):  # fmt: skip
        found = [form["memory_mb"][when][part] for form in forms]
        rows.append([what, *(f"{megabytes:.1f}" for megabytes in found)])
    held = [f"{form['held_over_file']:.2f}x" for form in forms]
    rows.append(["pages of the file and allocated while loading, over the file", *held])
    return markdown(["", *(form["form"] for form in forms)], rows)


def loading() -> str:
    """Seconds of ``from_pretrained``, dense and packed."""
    forms = load("memory.json")[0]["rows"]
    rows = [
        [what, *(f"{form[key]:.3f}" for form in forms)]
        for key, what in (
            ("load_s", "`from_pretrained`, first of a process"),
            ("load_again_s", "again in the same process"),
            ("load_and_answer_s", "first of a process, and the first answer"),
            ("from_disk_s", "the same with the file not in the system's cache"),
        )
    ]
    return markdown(["", *(form["form"] for form in forms)], rows)


def service() -> str:
    """Requests from several threads against one."""
    run = load("service.json")[0]
    first, last = (run["memory_mb"][tenth]["anonymous"] for tenth in (0, -1))
    return markdown(
        ["cores", "requests", "errors", "other answers", "one thread s",
         f"{run['threads']} threads s", "MB allocated after a tenth", "in the end"],
        [[f"{run['environment']['cores']}", f"{run['requests']:,}",
          f"{len(run['errors'])}", f"{len(run['wrong'])}", f"{run['serial_s']:.1f}",
          f"{run['seconds']:.1f}", f"{first:.1f}", f"{last:.1f}"]],
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory,
    "loading": loading,
    "service": service,
    "glue": glue,
    "glue_layer_error": lambda: glue(BEFORE),
    "glue_whole": whole_tasks,
    "glue_rate": lambda: variants(usual=DEFAULT, names=study.ABLATIONS["rate"][0]),
    "glue_variants": lambda: variants(names=(BEFORE, "one-cut", "per-layer")),
    "glue_blocks": blocks,
    "ablation_penalty": ablation("penalty", "no-penalty"),
    "ablation_saliency": ablation("saliency", "norms"),
    "ablation_recipe": ablation("recipe", BEFORE, "high-rate"),
    "linear": linear,
    "one_shot": one_shot,
    "bfloat16": bfloat16,
    "hook": hook,
    "penalty": penalty,
    "quantization": quantization,
    "quantization_accuracy": quantized_accuracy,
    "size": sizes,
    "training_step": training_step,
    "numbers": numbers,
    "machine": machine,
    **{part.name: of_section(part) for part in SECTIONS},
    **{
        f"{part.name}{EARLIER}": of_section(part, EARLIER)
        for part in (whole_encoder.SECTION, whole_encoder_int8.SECTION)
    },
}


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        text = re.sub(
            r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)",
            lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
            path.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
