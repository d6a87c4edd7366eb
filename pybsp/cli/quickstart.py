"""``pybsp quickstart``: the whole method on text that every Python carries."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import corpus
from .arguments import positive_int
from .main import Result
from .models import find_packaged, load_classifier
from .recipe import RECIPES, Recipe, Subject

if TYPE_CHECKING:
    from .tasks import TaskData

SPARSITY = 0.8
BLOCK_SHAPE = (8, 1)
#: Tokens that the cut reconstructs: enough here.
CALIBRATION = 8192
#: As `pybsp prune` does it.
DEFAULTS = RECIPES["reconstruct"]


@dataclass(frozen=True)
class Size:
    """How much is trained, so that all of it takes two minutes on two slow cores."""

    train: int
    dev: int
    epochs_dense: float
    epochs: float
    learning_rate: float
    prune_learning_rate: float
    hidden: int = 256
    layers: int = 4
    seconds: float = 4.0


PRETRAINED = Size(1000, 400, 1.25, 2.5, 2e-4, 5e-4)
FROM_SCRATCH = Size(2400, 400, 3, 2, 5e-4, 5e-4)
TINY = Size(200, 40, 1, 1, 1e-3, 1e-3, hidden=64, layers=1, seconds=0.2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="new directory for the pruned model (default: runs/quickstart)",
    )  # fmt: skip
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="train a small BERT from scratch even when all-MiniLM-L6-v2 is installed",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="of the data, the order and the initial weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive_int, metavar="N",
        help="torch threads while training (default: torch's); one is faster than two "
        "on a busy machine. Latency is always taken with one",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Result:
    packaged = (
        None if arguments.from_scratch or arguments.tiny else find_packaged("minilm")
    )
    size = TINY if arguments.tiny else PRETRAINED if packaged else FROM_SCRATCH
    options = {"command": "quickstart", "seed": arguments.seed, **vars(size)}
    out = arguments.out or free_folder(Path("runs") / "quickstart", options)

    from .workspace import Workspace, finished_results

    finished_results(out, options, resume=False)
    data = corpus.load(size.train, size.dev, arguments.seed)
    tell(data, packaged)
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    with Workspace(out, options, resume=True) as workspace:
        from .experiment import Experiment

        results = Experiment(
            subject(packaged, data, size, arguments.seed),
            data,
            pruning_config(),
            recipe(size, arguments.seed),
            workspace,
            command=arguments.line,
        ).run()
    from .reporting import results_table

    return Result(results, [results_table(results), what_next(out)])


def tell(data: TaskData, packaged: Path | None) -> None:
    """Say on stderr what is about to happen."""
    model = "all-MiniLM-L6-v2" if packaged else "a small BERT from random weights"
    print(
        f"Task: which area of the standard library is a passage about ("
        f"{', '.join(data.task.labels)})? {len(data.train)} passages to train on, "
        f"{len(data.dev)} to test.\nModel: {model}.",
        file=sys.stderr,
    )


def subject(packaged: Path | None, data: TaskData, size: Size, seed: int) -> Subject:
    def load() -> tuple[Any, Any]:
        if packaged is not None:
            return load_classifier(str(packaged), data.task.outputs)
        from . import small_bert

        tokenizer = small_bert.train_tokenizer(data.train)
        model = small_bert.build(
            tokenizer,
            data.task.outputs,
            hidden=size.hidden,
            layers=size.layers,
            seed=seed,
        )
        return model, tokenizer

    return Subject("minilm" if packaged else "small BERT", load)


def pruning_config() -> Any:
    from ..pruning import BlockPruningConfig

    return BlockPruningConfig(
        block_shape=BLOCK_SHAPE, target_sparsity=SPARSITY, **DEFAULTS.config
    )


def recipe(size: Size, seed: int) -> Recipe:
    return Recipe(
        epochs_dense=size.epochs_dense,
        epochs=size.epochs,
        dense_learning_rate=size.learning_rate,
        learning_rate=size.prune_learning_rate,
        batch_size=16,
        max_length=48,
        seed=seed,
        distill=DEFAULTS.distill,
        distill_hidden=DEFAULTS.distill_hidden,
        reconstruct=DEFAULTS.reconstruct,
        dropout=DEFAULTS.dropout,
        calibration=CALIBRATION,
        checkpoints=0,
        seconds=size.seconds,
    )


def free_folder(wanted: Path, options: dict[str, Any]) -> Path:
    """``wanted``; when that is taken, the first free of ``wanted-2``, ``wanted-3``. An
    unfinished run of the same ``options`` goes on."""
    from .workspace import is_of_another_run

    folder, number = wanted, 1
    while folder.exists() or is_of_another_run(folder, options):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def what_next(out: Path) -> str:
    return f"""\
Saved in {out}: the model, README.md, results.json, and the kept blocks in
{out / "kept_blocks.png"}.

Use it:     import pybsp
            from transformers import pipeline
            pipeline("text-classification", model="{out}")
Measure it: pybsp bench {out}
Verify it:  pybsp check {out}
Your model: pybsp prune --model NAME_OR_DIR --task sst2 --out DIR"""
