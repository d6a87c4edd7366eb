"""What the penalty does to the blocks, and what that is worth at the cut.

all-MiniLM-L6-v2, fine-tuned on sst2, continues training with the reweighted
group-Lasso penalty or without, for the same steps, and is then cut to 20 % of its
blocks in one go. Saves both histograms of block norms as ``docs/penalty.png``. The
dense checkpoint is one that ``pybsp glue`` left in STUDY/dense.

    python -m benchmarks.penalty --data DIR --runs DIR --dense STUDY/dense/sst2-seed0
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import PYBSP, result

ROOT = Path(__file__).parents[1]
RUNS = {
    "none": ["--recipe", "ramp", "--method", "magnitude"],
    "reweighted": ["--recipe", "ramp"],
}
TITLES = {"none": "no penalty", "reweighted": "reweighted group Lasso"}


def prune(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    out = arguments.runs / f"penalty-{name}"
    subprocess.run(
        [PYBSP, "prune", "--model", "minilm", "--task", "sst2", "--resume", "--json",
         "--data", str(arguments.data), "--out", str(out),
         "--dense-checkpoint", str(arguments.dense),
         "--max-train-samples", "8000", "--epochs", "1.5", "--ramp", "one_shot",
         "--phases", "0,0.75,0.25", "--threads", str(arguments.threads), *RUNS[name]],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return result.keep(out, f"penalty/{name}", arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    results = {TITLES[name]: prune(arguments, name) for name in RUNS}
    for title, run in results.items():
        print(title, {stage: s[run["metric"]] for stage, s in run["scores"].items()})
    from pybsp.cli.reporting import save_norm_histograms

    histograms = {
        f"before the cut, {title}": run["block_norms"]["before_the_cut"]
        for title, run in results.items()
    }
    save_norm_histograms(histograms, ROOT / "docs" / "penalty.png")


if __name__ == "__main__":
    main()
