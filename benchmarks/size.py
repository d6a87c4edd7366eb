"""Bytes of all-MiniLM-L6-v2 on disk by sparsity and type, with accuracy and latency.

sst2, one seed. The dense model is cut to each sparsity and trained for a short while
(``benchmarks.one_shot_training``), and each result is quantised as it is. Bytes are
those of the encoder's layers in the checkpoint: values, indices, scales, and what is
not pruned (biases and norms); embeddings and the rest of the file stand beside them.
Latencies are those of the base models, batch 1, 128 tokens, in turns.

    python -m benchmarks.size --data DIR --runs DIR       # trains what is missing
    python -m benchmarks.size --runs DIR --seconds 60     # sizes and latencies again
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks import result
from benchmarks.one_shot_training import UNSEEN_METRIC, OneShotTraining
from benchmarks.section import block_text, console, text_table
from benchmarks.turns import Rounds, take_turns
from pybsp.cli import checkpoints, measurement
from pybsp.cli.bench import check_same
from pybsp.cli.models import quiet
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
DENSE_BLOCKS = ((8, 1), (16, 4))
PRUNED = ((0.5, (8, 1)), (0.8, (8, 1)), (0.9, (8, 1)), (0.9, (16, 4)))


@dataclass(frozen=True)
class Model:
    """A checkpoint of the table; without a block shape the dense one of float32."""

    sparsity: float
    block_shape: tuple[int, int] | None
    dtype: str

    @property
    def name(self) -> str:
        """Of its run, as ``OneShotTraining`` calls it."""
        if self.block_shape is None:
            return f"{TASK}-dense"
        rows, columns = self.block_shape
        return f"{TASK}-{self.sparsity:.0%}-{rows}x{columns}-seed0"

    @property
    def form(self) -> str:
        """The key of its scores, and the folder in its run."""
        return "float32" if self.dtype == "float32" else "post_training"

    def folder(self, runs: Path) -> Path:
        return runs / self.name / (self.form if self.block_shape else "")

    def scores(self, runs: Path) -> dict[str, float]:
        """Accuracy, also on rows that no run saw and of the cut before training."""
        name = self.name if self.block_shape else Model(0.0, (8, 1), "int8").name
        forms = json.loads((runs / f"{name}.json").read_text(encoding="utf-8"))
        found = dict(forms[self.form if self.block_shape else "dense"])
        if "cut" in forms and self.form == "float32":
            found["cut"] = forms["cut"][METRIC]
        return found

    def load(self, runs: Path) -> Any:
        model = checkpoints.load(self.folder(runs))
        if self.block_shape is not None:
            check_same(copy.deepcopy(model).dequantize(), model, 128)
        return model.base_model.eval()


MODELS = [
    Model(0.0, None, "float32"),
    *(Model(0.0, shape, "int8") for shape in DENSE_BLOCKS),
    *(Model(*of, dtype) for of in PRUNED for dtype in ("float32", "int8")),
]


def train(data: Path, runs: Path) -> None:
    """Make the checkpoints that are missing."""
    for sparsity, shape in PRUNED:
        run = OneShotTraining(data, runs, TASK, sparsity, shape)
        run.prune()
        if "post_training" not in run.scores:
            run.save_form(run.pruned(), "post_training", "int8")
    for shape in DENSE_BLOCKS:
        run = OneShotTraining(data, runs, TASK, 0.0, shape)
        if "post_training" not in run.scores:
            run.keep("dense", run.score(run.teacher))
            run.save_form(with_all_blocks(run), "post_training", "int8")


def with_all_blocks(run: OneShotTraining) -> Any:
    """The dense model with packed layers; ``pack_`` wants zero blocks somewhere."""
    model, shape = run.teacher, run.config.block_shape
    for target in select_targets(model, run.config):
        linear = model.get_submodule(target.name)
        layer = BlockSparseLinear.from_linear(linear, shape, dtype="int8")
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


def latencies(runs: Path, seconds: float) -> Rounds:
    calls: dict[Model, Callable[[], object]] = {}
    for model in MODELS:
        module = model.load(runs)
        inputs = measurement.random_inputs(module.config, 1, 128)
        calls[model] = lambda module=module, inputs=inputs: module(**inputs)
    with torch.inference_mode():
        return take_turns(calls, seconds=seconds, always_warm=True)


def measure(runs: Path, seconds: float) -> list[dict[str, Any]]:
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
            "scores": model.scores(runs),
            "latency": rounds.to_dict(model),
            "faster": round(rounds.ratio(dense, model), 2),
        })  # fmt: skip
    return rows


def summary(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["sparsity", "block", "type", "values", "indices", "scales", "other",
            "encoder MB", "smaller", "by arithmetic", "whole file MB", "only cut",
            "accuracy", "unseen rows", "ms", "faster"]  # fmt: skip
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
              for name in ("cut", METRIC, UNSEEN_METRIC)),
            f"{row['latency']['median_ms']:.2f}", f"{row['faster']:.1f}x",
        ])  # fmt: skip
    return head, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="train the checkpoints not in RUNS")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    with torch_threads(arguments.threads):
        if arguments.data is not None:
            train(arguments.data, arguments.runs)
        data = {
            "task": TASK,
            "metric": METRIC,
            "threads": arguments.threads,
            "rows": measure(arguments.runs, arguments.seconds),
        }
    result.save("size", data)
    console().print(text_table("size", *summary(data)))


if __name__ == "__main__":
    main()
