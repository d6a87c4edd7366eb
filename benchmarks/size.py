"""Bytes of all-MiniLM-L6-v2 on disk by sparsity and type, with accuracy and latency.

sst2, one seed: the models of one variant that ``pybsp glue`` left in STUDY, and each of
them quantised as it is. Bytes are those of the encoder's layers in the checkpoint:
values, indices, scales, and what is not pruned (biases and norms); embeddings and the
rest of the file stand beside them. Latencies are those of the base models, batch 1, 128
tokens, in turns.

    python -m benchmarks.size --data DIR --study DIR [--variant layer-error]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks import result
from benchmarks.section import block_text, console, text_table
from benchmarks.studied import AS_PRUNED, UNSEEN_METRIC, Studied
from benchmarks.turns import Rounds, take_turns
from pybsp.blocks import BlockShape
from pybsp.cli import checkpoints, measurement
from pybsp.cli.bench import check_same
from pybsp.cli.models import quiet
from pybsp.cli.study import VARIANTS, Cell
from pybsp.cli.timing import torch_threads
from pybsp.nn import BlockSparseLinear
from pybsp.pruning.targets import select_targets

TASK, METRIC = "sst2", "accuracy"
ENCODER, EMBEDDINGS = "bert.encoder.layer.", "bert.embeddings."
#: Tensors of a packed layer by what they are for; all others of a layer are ``other``.
KINDS = {
    ".weight": "values", ".weight_values": "values", ".weight_scales": "scales",
    ".weight_crow_indices": "indices", ".weight_col_indices": "indices",
}  # fmt: skip
DENSE_BLOCKS: tuple[BlockShape, ...] = ((8, 1), (16, 4))
#: Sparsity and blocks of a run.
Pruning = tuple[float, str]
#: Of the run whose dense model stands for all.
FIRST: Pruning = (0.8, "8,1")
PRUNED: tuple[tuple[float, BlockShape], ...] = (
    (0.5, (8, 1)), (0.8, (8, 1)), (0.8, (16, 4)), (0.9, (8, 1)),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A checkpoint of the table; without a block shape the dense one of float32."""

    sparsity: float
    block_shape: BlockShape | None
    dtype: str

    @property
    def run(self) -> Pruning:
        """The run of the study that it comes from, or whose dense model it is."""
        if not self.sparsity:
            return FIRST
        rows, columns = self.block_shape or (1, 1)
        return self.sparsity, f"{rows},{columns}"

    @property
    def form(self) -> str:
        """Of its run: the key of its scores, and the folder."""
        if self.block_shape is None:
            return "dense"
        if not self.sparsity:
            return "dense-{}x{}".format(*self.block_shape)
        return AS_PRUNED if self.dtype == "float32" else "post_training"

    def folder(self, runs: Mapping[Pruning, Studied]) -> Path:
        run = runs[self.run]
        return run.dense if self.block_shape is None else run.packed(self.form)

    def load(self, runs: Mapping[Pruning, Studied]) -> Any:
        model = checkpoints.load(self.folder(runs))
        if self.block_shape is not None:
            check_same(copy.deepcopy(model).dequantize(), model, 128)
        return model.base_model.eval()


MODELS = [
    Model(0.0, None, "float32"),
    *(Model(0.0, shape, "int8") for shape in DENSE_BLOCKS),
    *(Model(*of, dtype) for of in PRUNED for dtype in ("float32", "int8")),
]


def make(data: Path, study: Path, variant: str) -> dict[Pruning, Studied]:
    """The runs, with the forms and scores that were missing."""
    runs = {
        run: Studied(data, study, Cell(TASK, variant, *run, 0))
        for run in dict.fromkeys(model.run for model in MODELS)
    }
    for model in MODELS:
        run = runs[model.run]
        scores = run.scores.get(model.form)
        if scores and (UNSEEN_METRIC in scores or "unseen" not in run.splits):
            continue
        if model.form == AS_PRUNED:
            run.score(AS_PRUNED)
        elif model.form == "post_training":
            run.save_form(run.pruned(), model.form, "int8")
        elif model.block_shape is None:
            run.score("dense", run.teacher)
        else:
            run.save_form(with_all_blocks(run, model.block_shape), model.form, "int8")
    return runs


def with_all_blocks(run: Studied, block_shape: BlockShape) -> Any:
    """The dense model with packed layers; ``pack_`` wants zero blocks somewhere."""
    model = copy.deepcopy(run.teacher)
    for target in select_targets(model, run.config):
        linear = model.get_submodule(target.name)
        layer = BlockSparseLinear.from_linear(linear, block_shape, dtype="int8")
        parent, _, name = target.name.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the checkpoint's tensors by kind, and of the whole file."""
    packed = folder / measurement.PACKED_FILE
    file = packed if packed.exists() else folder / measurement.DENSE_FILE
    found = dict.fromkeys(("values", "indices", "scales", "other", "embeddings"), 0)
    header = file.stat().st_size
    for key, size in tensors(file):
        header -= size
        if key.startswith(EMBEDDINGS):
            found["embeddings"] += size
        elif key.startswith(ENCODER):
            kind = KINDS.get(key[key.rindex(".") :], "other")
            found["other" if "LayerNorm" in key else kind] += size
    encoder = sum(found.values()) - found["embeddings"]
    whole = {"header": header, "file": file.stat().st_size}
    return {**found, "encoder": encoder, **whole}


def tensors(file: Path) -> Iterator[tuple[str, int]]:
    with safe_open(file, framework="pt") as checkpoint:
        for key in checkpoint.keys():  # noqa: SIM118 (not a mapping)
            tensor = checkpoint.get_slice(key)
            size = measurement.ELEMENT_BYTES[tensor.get_dtype()]
            yield key, size * int(np.prod(tensor.get_shape(), dtype=np.int64))


def latencies(runs: Mapping[Pruning, Studied], seconds: float) -> Rounds:
    calls: dict[Model, Callable[[], object]] = {}
    for model in MODELS:
        module = model.load(runs)
        inputs = measurement.random_inputs(module.config, 1, 128)
        calls[model] = lambda module=module, inputs=inputs: module(**inputs)
    with torch.inference_mode():
        return take_turns(calls, seconds=seconds, always_warm=True)


def measure(runs: Mapping[Pruning, Studied], seconds: float) -> list[dict[str, Any]]:
    dense = MODELS[0]
    whole = sizes(dense.folder(runs))
    rounds = latencies(runs, seconds)
    rows = []
    for model in MODELS:
        found = sizes(model.folder(runs))
        bits = {"float32": 32, "int8": 8}[model.dtype]
        rows.append({
            "sparsity": model.sparsity,
            "block_shape": model.block_shape,
            "dtype": model.dtype,
            "bytes": found,
            "ratio": round(whole["encoder"] / found["encoder"], 2),
            "arithmetic": round(32 / bits / (1 - model.sparsity), 1),
            "file_ratio": round(whole["file"] / found["file"], 2),
            "scores": runs[model.run].scores[model.form],
            "latency": rounds.to_dict(model),
            "faster": round(rounds.ratio(dense, model), 2),
        })  # fmt: skip
    return rows


def summary(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["sparsity", "block", "type", "values", "indices", "scales", "other",
            "encoder MB", "smaller", "by arithmetic", "whole file MB", "accuracy",
            "unseen rows", "ms", "faster"]  # fmt: skip
    rows = []
    for row in data["rows"]:
        size = {kind: f"{count / 1e6:.2f}" for kind, count in row["bytes"].items()}
        kinds = ("values", "indices", "scales", "other", "encoder")
        rows.append([
            f"{row['sparsity']:.0%}",
            block_text(row["block_shape"]) if row["block_shape"] else "none",
            row["dtype"], *(size[kind] for kind in kinds), f"{row['ratio']:.1f}x",
            f"{row['arithmetic']:.0f}x", size["file"],
            *(f"{100 * row['scores'][name]:.1f}" if name in row["scores"] else ""
              for name in (METRIC, UNSEEN_METRIC)),
            f"{row['latency']['median_ms']:.2f}", f"{row['faster']:.1f}x",
        ])  # fmt: skip
    return head, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="reconstruct")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    with torch_threads(arguments.threads):
        runs = make(arguments.data, arguments.study, arguments.variant)
        data = {
            "task": TASK,
            "metric": METRIC,
            "threads": arguments.threads,
            "rows": measure(runs, arguments.seconds),
        }
    result.save("size", data)
    console().print(text_table("size", *summary(data)))


if __name__ == "__main__":
    main()
