"""Accuracy of all-MiniLM-L6-v2 at 80 % in int8, against its own float32 form.

The float32 models are those of one variant that ``pybsp glue`` left in STUDY, of every
task and seed. Their int8 forms: quantised as they are (``post_training``), and trained
in int8 for some more steps (``aware``), beside as many steps in float32 (``longer``),
since training on changes a model by itself. Scores are those of the whole development
set after the last step, by the packed models. Finished parts are skipped and
interrupted ones resumed.

    python -m benchmarks.quantization_accuracy --data DIR --study DIR \\
        [--variant layer-error] [--tasks sst2]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import result
from benchmarks.section import console, text_table
from benchmarks.studied import AS_PRUNED, UNSEEN, UNSEEN_METRIC, Studied
from pybsp.cli.models import quiet
from pybsp.cli.study import VARIANTS, Cell
from pybsp.cli.timing import torch_threads
from pybsp.cli.workspace import RESULTS

#: Epochs of training on.
EPOCHS = {"mrpc": 0.5, "stsb": 0.5, "cola": 0.25, "rte": 0.5, "sst2": 0.125}

#: Heading of a difference, and the two forms.
DIFFERENCES = {
    "quantised": ("post_training", "float32"),
    "trained on in float32": ("longer", "float32"),
    "trained on in int8": ("aware", "float32"),
    "in int8 - in float32": ("aware", "longer"),
}


def cells(study: Path, variant: str, tasks: Sequence[str]) -> list[Cell]:
    """The finished runs at 80 % of a variant, all seeds."""
    files = (study / "runs").glob(f"*-{variant}-80-8x1-*/{RESULTS}")
    found = [Cell.from_name(file.parent.name) for file in files]
    return sorted(
        (cell for cell in found if cell.task in tasks),
        key=lambda cell: (tasks.index(cell.task), cell.seed),
    )


def complete(run: Studied) -> None:
    if "dense" not in run.scores:
        run.keep("dense", run.results["scores"]["dense"])
    if AS_PRUNED not in run.scores:
        run.score(AS_PRUNED)
    if "post_training" not in run.scores:
        run.save_form(run.pruned(), "post_training", "int8")
    for form, dtype in (("longer", "float32"), ("aware", "int8")):
        if form not in run.scores:
            model = run.train_on(EPOCHS[run.cell.task], aware=form == "aware")
            run.save_form(model, form, dtype)
    if "changed" not in run.scores:
        run.keep("changed", {
            "/".join(forms): run.changed(*forms) for forms in DIFFERENCES.values()
        })  # fmt: skip


def record(run: Studied) -> dict[str, Any]:
    return {
        "task": run.cell.task,
        "metrics": list(run.scores[AS_PRUNED]),
        "seed": run.cell.seed,
        "dev_examples": len(run.data.dev),
        "unseen_examples": UNSEEN if UNSEEN_METRIC in run.scores[AS_PRUNED] else 0,
        "train_examples": len(run.data.train),
        "epochs": EPOCHS[run.cell.task],
        "scores": {
            k: v for k, v in run.scores.items() if k not in ("changed", "origin")
        },
        "changed": run.scores["changed"],
    }


def summary(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Scores of the float32 form, and in points what others have more: the mean over
    the seeds, its standard error as far as changed answers tell it, and every seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for metric in run["metrics"]:
            found.setdefault((run["task"], metric), []).append(run)
    rows = []
    for (task, metric), seeds in found.items():
        percent = [
            {form: 100 * s.get(metric, nan) for form, s in run["scores"].items()}
            for run in seeds
        ]
        dense = mean(scores["dense"] for scores in percent)
        row = [f"{task} ({metric})", f"{dense:.1f}" if isfinite(dense) else ""]
        float32 = [scores["float32"] for scores in percent]
        row.append(f"{mean(float32):.1f} ({', '.join(f'{x:.1f}' for x in float32)})")
        for form, other in DIFFERENCES.values():
            points = [round(s[form] - s[other], 2) + 0.0 for s in percent]
            each = ", ".join(f"{x:+.2f}" for x in points)
            error = standard_error(seeds, metric, f"{form}/{other}")
            row.append(f"{round(mean(points), 2) + 0.0:+.2f}{error} ({each})")
        rows.append(row)
    return ["task", "dense", "float32", *DIFFERENCES], rows


def standard_error(seeds: Sequence[dict[str, Any]], metric: str, forms: str) -> str:
    """Of a mean difference of accuracy, if every changed answer were a coin's toss."""
    split = {"accuracy": "dev", UNSEEN_METRIC: "unseen"}.get(metric)
    changed = [run["changed"][forms].get(split) for run in seeds]
    if split is None or None in changed:
        return ""
    count = len(seeds) * seeds[0][f"{split}_examples"]
    return f" ± {100 * sqrt(sum(changed)) / count:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="reconstruct")
    parser.add_argument("--tasks", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    records = []
    with torch_threads(arguments.threads):
        for cell in cells(arguments.study, arguments.variant, arguments.tasks):
            run = Studied(arguments.data, arguments.study, cell)
            complete(run)
            records.append(record(run))
            result.save(f"quantization_accuracy/{cell.name}", records[-1])
    console().print(text_table("", *summary(records)))


if __name__ == "__main__":
    main()
