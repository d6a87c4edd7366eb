"""``pybsp prune``: from a pretrained model to a packed, measured checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tasks
from .errors import UsageError
from .main import Result
from .prune_options import add_arguments
from .recipe import RECIPES, Recipe, Subject, first_cuts

if TYPE_CHECKING:
    from ..pruning import BlockPruningConfig

__all__ = ["add_arguments", "run"]

#: Of the rows that --max-train-samples draws, the same for every --seed.
SAMPLE_SEED = 0

#: Options that say where to write and how fast to run, not what comes out.
NOT_RESULTS = (
    "line",
    "out",
    "save_dense",
    "resume",
    "json",
    "threads",
    "seconds",
    "no_onnx",
    "command",
    "version",
)

#: Options that say how blocks are found and removed step by step.
IN_THE_COURSE = (
    "method", "penalty", "ramp", "ranking", "reg_lambda", "phases", "saliency",
    "schedule",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> Result:
    config = pruning_config(arguments)
    options = run_options(arguments, config)
    out = arguments.out or default_out(arguments, config)

    from .workspace import Workspace, finished_results

    data = tasks.load(arguments.task, arguments.data)
    data = tasks.subsample(data, arguments.max_train_samples, SAMPLE_SEED)
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
                command=arguments.line,
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

    check_recipe(arguments)

    named = (
        "method", "penalty", "scope", "ramp", "ranking", "reg_lambda", "phases",
        "max_layer_sparsity", "block_shape", "saliency",
    )  # fmt: skip
    chosen = {
        name: getattr(arguments, name)
        for name in named
        if getattr(arguments, name) is not None
    }
    chosen["target_sparsity"] = arguments.sparsity
    defaults = RECIPES[arguments.recipe]
    make = BlockPruningConfig.paper if defaults.is_paper else BlockPruningConfig
    try:
        return make(**{**defaults.config, **chosen})
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_recipe(arguments: argparse.Namespace) -> None:
    """``UsageError`` for options of a run that prunes as it goes, in one that does
    not, or the other way round."""
    if not RECIPES[arguments.recipe].reconstruct:
        if arguments.error:
            raise UsageError(
                "--error is for the recipe 'reconstruct'; the others rank blocks by "
                "--saliency: leave it out"
            )
        return
    for name in IN_THE_COURSE:
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name.removeprefix('reg_')} is for pruning in the course of a run, "
                "and the recipe 'reconstruct' cuts before it; add --recipe ramp"
            )


def recipe(arguments: argparse.Namespace) -> Recipe:
    defaults = RECIPES[arguments.recipe]

    def given(name: str) -> Any:
        value = getattr(arguments, name)
        return getattr(defaults, name) if value is None else value

    return Recipe(
        epochs_dense=arguments.epochs_dense,
        epochs=arguments.epochs,
        dense_learning_rate=arguments.lr,
        learning_rate=prune_learning_rate(arguments),
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        distill=given("distill"),
        distill_hidden=given("distill_hidden"),
        reconstruct=defaults.reconstruct,
        error=given("error"),
        first_cuts=cuts_before(arguments),
        dropout=given("dropout"),
        bfloat16=arguments.bf16,
        schedule=given("schedule"),
        seconds=arguments.seconds,
        onnx=not arguments.no_onnx,
    )


def cuts_before(arguments: argparse.Namespace) -> tuple[float, ...]:
    """Sparsities of the cuts before the last one."""
    given: tuple[float, ...] | None = arguments.first_cuts
    if not RECIPES[arguments.recipe].reconstruct:
        if given:
            raise UsageError(
                "--first-cuts is for the recipe 'reconstruct'; the others remove "
                "blocks in the course of a run: leave it out"
            )
        return ()
    found = first_cuts(arguments.sparsity) if given is None else given
    if list(found) != sorted({*found}) or any(s >= arguments.sparsity for s in found):
        raise UsageError(
            f"--first-cuts must rise and stay below --sparsity {arguments.sparsity:g}; "
            f"got {','.join(f'{s:g}' for s in found)}"
        )
    return found


def prune_learning_rate(arguments: argparse.Namespace) -> float:
    """The peak of the pruning run, to two digits where it is not given."""
    if arguments.prune_lr is not None:
        return float(arguments.prune_lr)
    times = RECIPES[arguments.recipe].learning_rate_at(arguments.sparsity)
    return float(f"{times * arguments.lr:.2g}")


def find_subject(arguments: argparse.Namespace) -> Subject:
    """The model that the options name, checked as far as that costs nothing."""
    from . import models

    dense = arguments.dense_checkpoint
    if dense is not None and not (dense / "config.json").is_file():
        raise UsageError(f"--dense-checkpoint {dense} holds no model (no config.json)")
    source = str(dense) if dense is not None else models.resolve(arguments.model)
    outputs = tasks.find_task(arguments.task).outputs
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
    return {
        **plain,
        "block_shape": config.to_dict()["block_shape"],
        "phases": config.to_dict()["phases"],
        "prune_lr": prune_learning_rate(arguments),
        "first_cuts": list(cuts_before(arguments)),
    }


def default_out(arguments: argparse.Namespace, config: BlockPruningConfig) -> Path:
    shape = "x".join(str(extent).replace("/", "over") for extent in config.block_shape)
    model = Path(arguments.model).name
    sparsity = f"{100 * arguments.sparsity:g}"
    return Path("runs") / f"{model}-{arguments.task}-{sparsity}-{shape}"
