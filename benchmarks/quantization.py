"""What int8 changes in all-MiniLM-L6-v2, by how its scales are chosen.

The model as published and with 80 % of its (8, 1) blocks removed by magnitude, without
training after it. Sentences of sst2 and stsb: 512 of the training sets to calibrate and
256 of the development sets to compare. ``hidden`` is the relative error of the last
hidden states against float32, ``cosine`` that of the mean-pooled embeddings (mean and
worst of all sentences).

    python -m benchmarks.quantization --data DIR
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

import pybsp
from benchmarks import result
from benchmarks.section import console
from pybsp.cli import tasks
from pybsp.cli.models import quiet, resolve
from pybsp.cli.timing import torch_threads
from pybsp.quantization import calibrate, sensitivity
from pybsp.quantization.calibration import run, watched_inputs
from pybsp.quantization.linear import fake_quantize_

BLOCK_SHAPE, SPARSITIES = (8, 1), (0.0, 0.8)
CALIBRATION, EVALUATION = 512, 256
#: Layers that ``sensitivity`` ranks first and that then stay in float32.
KEPT = (2, 4, 8)

Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Scheme:
    """How weights and inputs get their scales."""

    name: str
    clip: str = "max"
    #: Static scales by this method; None is dynamic.
    static: str | None = None
    #: Exponent of the migration from activations to weights, and where it is done.
    migration: float | None = None
    place: str = ""
    keep: tuple[str, ...] = field(default=())


SCHEMES = (
    Scheme("weights: largest; inputs: dynamic"),
    Scheme("weights: mse", clip="mse"),
    Scheme("weights: percentile", clip="percentile"),
    Scheme("inputs: static, largest", static="max"),
    Scheme("inputs: static, percentile", static="percentile"),
    Scheme("inputs: static, mse", static="mse"),
    Scheme("migration 0.5, value to output", migration=0.5, place="attention.output"),
    Scheme("migration 0.5, all inputs", migration=0.5),
    Scheme("migration 0.25, all inputs", migration=0.25),
)  # fmt: skip


def sentences(data: Path, part: str, count: int) -> list[str]:
    found: list[str] = []
    for task in ("sst2", "stsb"):
        split = getattr(tasks.load(task, data), part)
        rows = random.Random(0).sample(range(len(split)), count // 2)
        found += [split.texts[row][0] for row in rows]
    return found


def batches(tokenizer: Any, texts: Sequence[str], size: int = 32) -> Batches:
    """Of like length, so that little of them is padding."""
    ordered = sorted(texts, key=len)
    return [
        dict(
            tokenizer(
                ordered[i : i + size], padding=True, truncation=True, max_length=128,
                return_tensors="pt",
            )
        )
        for i in range(0, len(ordered), size)
    ]  # fmt: skip


def pruned(model: torch.nn.Module, sparsity: float) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for name in linears(model) if sparsity else ():
        weight = model.get_submodule(name).weight.data
        norms = pybsp.ops.block_norms(weight, BLOCK_SHAPE)
        kept = norms.numel() - round(norms.numel() * sparsity)
        mask = pybsp.ops.block_mask(norms, kept)
        pybsp.ops.apply_block_mask_(weight, mask, BLOCK_SHAPE)
    return model


def linears(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("encoder.")
    ]


def states(model: torch.nn.Module, given: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of all tokens, and mean-pooled embeddings."""
    hidden, pooled = [], []
    for batch, output in zip(given, run(model, given), strict=True):
        mask = batch["attention_mask"].bool()
        hidden.append(output[0][mask])
        sums = (output[0] * mask[..., None]).sum(1)
        pooled.append(sums / mask.sum(1, keepdim=True))
    return torch.cat(hidden), torch.cat(pooled)


def migrate_(model: torch.nn.Module, names: list[str], power: float, given: Batches):
    """Xiao et al. 2022, eq. 4, ``s_j = max|x_j|^a / max|w_j|^(1 - a)``.

    The inputs are divided here by a hook. For free it is only where a linear map comes
    before: from the values to the output of attention. The outputs of a LayerNorm go
    to the next residual sum too in models of BERT's kind, so its affine map cannot
    absorb the factors, and a GELU does not let them pass.
    """
    largest: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        most = x.abs().flatten(0, -2).amax(0)
        largest[name] = torch.maximum(most, largest.get(name, most))

    with watched_inputs(model, names, see):
        run(model, given)
    for name in names:
        linear = model.get_submodule(name)
        columns = linear.weight.data.abs().amax(0)
        ratio = largest[name].clamp_min(1e-5) ** power
        ratio /= columns.clamp_min(1e-5) ** (1 - power)
        factors = torch.where(columns > 0, ratio / ratio.median(), torch.inf)
        linear.weight.data *= factors.nan_to_num(posinf=1.0)
        linear.register_forward_pre_hook(divide(factors))


def divide(factors: torch.Tensor) -> Callable[..., Any]:
    return lambda _, inputs: (inputs[0] / factors,)


def quantized(
    model: torch.nn.Module, scheme: Scheme, given: Batches
) -> torch.nn.Module:
    names = linears(model)
    model = copy.deepcopy(model)
    scales = calibrate(model, given, names, scheme.static) if scheme.static else {}
    if scheme.migration is not None:
        chosen = [name for name in names if scheme.place in name]
        migrate_(model, chosen, scheme.migration, given)
    for name in names:
        if name not in scheme.keep:
            fake_quantize_(
                model.get_submodule(name), clip=scheme.clip,
                input_scale=scales.get(name, 0.0),
            )  # fmt: skip
    return model


def measure(
    data: Path, model: torch.nn.Module, tokenizer: Any, sparsity: float
) -> list[dict[str, Any]]:
    model = pruned(model, sparsity)
    calibration = batches(tokenizer, sentences(data, "train", CALIBRATION))
    compared = batches(tokenizer, sentences(data, "dev", EVALUATION))
    hidden, pooled = states(model, compared)
    errors = sensitivity(model, calibration[::8], linears(model))
    kept = [
        Scheme(f"the {count} most sensitive of {len(errors)} in float32",
               keep=tuple(list(errors)[:count]))
        for count in KEPT
    ]  # fmt: skip
    found: list[dict[str, Any]] = []
    for scheme in (*SCHEMES, *kept):
        int8 = quantized(model, scheme, calibration)
        changed, embeddings = states(int8, compared)
        cosines = torch.cosine_similarity(embeddings, pooled)
        found.append({
            "sparsity": sparsity,
            "scheme": scheme.name,
            "hidden": float((changed - hidden).norm() / hidden.norm()),
            "cosine": float(cosines.mean()),
            "worst_cosine": float(cosines.min()),
            "kept": list(scheme.keep),
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    source = resolve("minilm")
    model = AutoModel.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch_threads(arguments.threads):
        rows = [
            row
            for sparsity in SPARSITIES
            for row in measure(arguments.data, model, tokenizer, sparsity)
        ]
    result.save("quantization", {"rows": rows})
    table = Table("sparsity", "scheme", "hidden", "cosine", "worst")
    for row in rows:
        errors = [row[key] for key in ("hidden", "cosine", "worst_cosine")]
        texts = [f"{value:.4f}" for value in errors]
        table.add_row(f"{row['sparsity']:.0%}", row["scheme"], *texts)
    console().print(table)


if __name__ == "__main__":
    main()
