"""``pybsp check``: is a pruned checkpoint sound, and how fast can it be here?"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoints
from .arguments import positive_int
from .errors import FAILED, OK, WorkError, one_line
from .main import Result

if TYPE_CHECKING:
    import torch

    from ..blocks import BlockShape

#: Zeros inside kept blocks, as a fraction of the kept weights, that happen by chance.
STRAY_ZEROS = 0.01
#: Above this density a layer gains little from skipping blocks.
HIGH_DENSITY = 0.5


@dataclass
class Findings:
    """What is wrong, what slows the model, and the facts behind both."""

    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a pruned checkpoint")
    parser.add_argument(
        "--tokens", type=positive_int, default=128, metavar="N",
        help="tokens in a call, for the expected speed-up (default: %(default)s)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Result:
    folder = checkpoints.checked_folder(arguments.folder)
    from . import environment
    from .reporting import layer_table

    findings = Findings()
    read_record(folder, findings)
    if checkpoints.has_dense_file(folder):
        check_dense(folder, findings)
    packed = folder / checkpoints.PACKED_FILE
    if packed.is_file():
        check_packed(folder, findings)
    else:
        findings.hints.append(
            f"there is no {checkpoints.PACKED_FILE}, so every load reads the "
            f"dense file and packs it: run pybsp pack {folder}"
        )
    expect_speed(findings, arguments.tokens)
    data = {
        "folder": str(folder),
        "ok": not findings.problems,
        "problems": findings.problems,
        "hints": findings.hints,
        "environment": environment.describe(),
        **findings.facts,
        "layers": findings.layers,
    }
    lines = [f"problem: {text}" for text in findings.problems]
    lines += [f"hint: {text}" for text in findings.hints]
    lines.append(summary(findings, environment.isa()))
    status = FAILED if findings.problems else OK
    tables = [layer_table(findings.layers)] if findings.layers else []
    return Result(data, [*tables, *lines], status)


def summary(findings: Findings, isa: str) -> str:
    expected = findings.facts.get("expected_speedup_of_linear_layers")
    speed = f", linear layers {expected:.2f}x faster than dense" if expected else ""
    verdict = (
        "sound" if not findings.problems else f"{len(findings.problems)} problem(s)"
    )
    return f"{verdict}; {isa} in use{speed}"


def read_record(folder: Path, findings: Findings) -> None:
    """The facts of the record in ``config.json``, and whether it is one."""
    record = checkpoints.sparsity_record(folder)
    if record is None:
        findings.hints.append(
            "config.json has no pybsp record, so transformers loads this model dense: "
            f"run pybsp pack {folder}"
        )
        return
    findings.facts["record"] = {
        key: record.get(key)
        for key in ("format", "format_version", "sparsity", "dtype")
        if key in record or key != "dtype"
    }
    try:
        shapes = checkpoints.recorded_modules(record)
    except WorkError as error:
        findings.problems.append(str(error))
        return
    if not shapes:
        findings.problems.append("the pybsp record in config.json names no modules")


def check_dense(folder: Path, findings: Findings) -> None:
    """Every recorded weight: finite, its zeros whole blocks; fills ``layers``."""
    import torch

    from ..blocks import block_view
    from ..nn.detect import detect_block_shape
    from ..pruning.record import recorded_block_shape

    try:
        model = checkpoints.load_dense(folder)
    except WorkError as error:
        findings.problems.append(str(error))
        return
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    # By the names of this model, which the record may have from another one.
    shapes = {
        name: shape
        for name, linear in linears.items()
        if (shape := recorded_block_shape(linear)) is not None
    }
    if not shapes:
        shapes = {
            name: shape
            for name, weight in weights.items()
            if (shape := detect_block_shape(weight)) is not None
        }
        if not shapes:
            findings.problems.append("no linear layer has blocks of zeros")
    removed = total = 0
    for name, shape in shapes.items():
        weight = weights[name]
        if not bool(torch.isfinite(weight).all()):
            findings.problems.append(
                f"the weight of '{name}' has NaN or infinite values"
            )
            continue
        try:
            kept = block_view(weight != 0, shape).any(3).any(2)
        except ValueError as error:
            findings.problems.append(f"'{name}': {one_line(error)}")
            continue
        add_layer(name, weight, kept, shape, findings)
        removed += (kept.numel() - int(kept.sum())) * shape[0] * shape[1]
        total += weight.numel()
    if total:
        findings.facts["sparsity"] = round(removed / total, 6)
        settled = getattr(model.config, "quantization_config", None) or {}
        compare_sparsity(settled.get("sparsity"), findings)


def add_layer(
    name: str, weight: torch.Tensor, kept: torch.Tensor, shape: BlockShape,
    findings: Findings,
) -> None:  # fmt: skip
    """Note one layer, and whether its zeros are whole blocks."""
    kept_weights = int(kept.sum()) * shape[0] * shape[1]
    stray = kept_weights - int((weight != 0).sum())
    findings.layers.append(
        {
            "name": name,
            "shape": list(weight.shape),
            "block_shape": list(shape),
            "density": round(kept_weights / weight.numel(), 6),
            "zeros_in_kept_blocks": stray,
        }
    )
    # Rounded to int8, a kept weight may well be zero.
    rounded = (findings.facts.get("record") or {}).get("dtype") == "int8"
    if kept_weights and stray > STRAY_ZEROS * kept_weights and not rounded:
        findings.problems.append(
            f"'{name}': {stray / kept_weights:.0%} of the weights in kept "
            f"{shape[0]} x {shape[1]} blocks are zero: its zeros do not lie in these "
            "blocks, so packing keeps them"
        )
    elif bool(kept.all()):
        findings.hints.append(f"'{name}' has no zero block and stays dense")


def compare_sparsity(recorded: Any, findings: Findings) -> None:
    found = findings.facts["sparsity"]
    if isinstance(recorded, (int, float)) and abs(recorded - found) > 1e-3:
        findings.problems.append(
            f"config.json records a sparsity of {recorded:.4f}, the weights have "
            f"{found:.4f}: they were trained on without masks, see preserve_sparsity"
        )


def check_packed(folder: Path, findings: Findings) -> None:
    """The packed file: readable, complete, and the same weights as the dense file."""
    import torch

    from ..nn.pack import unpack_

    try:
        packed = checkpoints.load(folder)
    except WorkError as error:
        findings.problems.append(str(error))
        return
    if not checkpoints.has_dense_file(folder):
        findings.hints.append("there is no dense file: loading needs pybsp")
        return
    try:
        dense = checkpoints.load_dense(folder).state_dict()
    except WorkError:
        return  # told by check_dense
    # Loading may have found nothing worth packing: there is nothing to dequantize then.
    unpacked = unpack_(packed).state_dict()
    different = [
        name
        for name in dense
        if name not in unpacked or not torch.equal(dense[name], unpacked[name])
    ]
    findings.facts["packed_agrees"] = not different
    if different:
        findings.problems.append(
            f"{checkpoints.PACKED_FILE} differs from the dense file in "
            f"{len(different)} tensors, such as '{different[0]}': run pybsp pack "
            f"{folder}"
        )


def expect_speed(findings: Findings, tokens: int) -> None:
    """What each layer takes here, dense and packed, and what holds it back."""
    from .. import ops
    from ..costs import expected_cost
    from .timing import torch_threads

    dense = sparse = 0.0
    slow = []
    with torch_threads(1):
        for layer in findings.layers:
            shape = (layer["shape"][0], layer["shape"][1])
            block = (layer["block_shape"][0], layer["block_shape"][1])
            cost = expected_cost(shape, block, layer["density"], tokens)
            layer["gain"] = round(cost.gain, 3)
            dense += cost.dense_us
            sparse += min(cost.sparse_us, cost.dense_us)
            if cost.gain < 1:
                slow.append(layer)
    if sparse:
        findings.facts["expected_speedup_of_linear_layers"] = round(dense / sparse, 3)
    if slow:
        findings.hints.append(
            f"{len(slow)} layers would run slower packed, such as '{slow[0]['name']}' "
            f"at density {slow[0]['density']:.2f}: prune more or use taller blocks"
        )
    dense_layers = [row for row in findings.layers if row["density"] > HIGH_DENSITY]
    if dense_layers:
        findings.hints.append(
            f"{len(dense_layers)} of {len(findings.layers)} layers keep more than half "
            "of their blocks; a higher sparsity or --scope layer evens them out"
        )
    forced = os.environ.get("PYBSP_ISA")
    best = ops.available_isas()[-1]
    if forced and forced != best:
        findings.hints.append(
            f"PYBSP_ISA={forced} forces an instruction set below {best}; unset it"
        )
