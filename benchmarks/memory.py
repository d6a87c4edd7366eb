"""Loading a packed BERT-base against the same weights dense: memory and time.

Random weights with 80 % of the (8, 1) blocks of the encoder removed, each checkpoint
loaded by ``from_pretrained`` in fresh processes. Memory is what a process holds beyond
one that has imported torch, transformers and pybsp. transformers maps checkpoints into
memory: a dense load reads nothing yet and its first answer everything. "From disk" the
pages of the file are dropped from the system's cache beforehand.

    python -m benchmarks.memory [--rounds 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import BertConfig, BertModel

import pybsp
from benchmarks import result
from benchmarks.resident import MB, grown, resident
from benchmarks.section import console, numbers, reach, text_table
from pybsp.blocks import expand_blocks
from pybsp.cli.models import quiet

BLOCK_SHAPE, SPARSITY, TOKENS = (8, 1), 0.8, 128


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """The weight file of each form; its folder holds nothing else to load."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    with torch.no_grad():
        for linear in model.encoder.modules():
            if isinstance(linear, torch.nn.Linear):
                rows, cols = linear.weight.shape
                grid = (rows // BLOCK_SHAPE[0], cols // BLOCK_SHAPE[1])
                linear.weight *= expand_blocks(
                    torch.rand(grid) >= SPARSITY, BLOCK_SHAPE
                )
    model.save_pretrained(folder / "dense")
    return {
        "dense": folder / "dense" / "model.safetensors",
        "packed": pybsp.save_packed(model, folder / "packed", dense=False),
    }


def drop_from_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(file: Path, from_disk: bool) -> dict[str, Any]:
    """One process: load, answer, and what it holds after each."""
    quiet()
    torch.set_num_threads(1)
    ids = torch.randint(0, BertConfig().vocab_size, (1, TOKENS))
    if from_disk:
        drop_from_cache(file)
    before = resident(file)
    start = time.perf_counter()
    model = BertModel.from_pretrained(file.parent)
    load = time.perf_counter() - start
    memory = {"load": grown(before, resident(file))}
    with torch.inference_mode():
        model(input_ids=ids)
        first = time.perf_counter() - start
        memory["first answer"] = grown(before, resident(file))
        for _ in range(50):
            model(input_ids=ids)
        memory["51 answers"] = grown(before, resident(file))
        # A long text, or many: every row of the embeddings has been read.
        model.get_input_embeddings().weight.sum()
        memory["all words"] = grown(before, resident(file))
    del model
    again = []
    for _ in range(5):
        start = time.perf_counter()
        BertModel.from_pretrained(file.parent)
        again.append(time.perf_counter() - start)
    return {
        "load_s": load,
        "load_again_s": statistics.median(again),
        "load_and_answer_s": first,
        "memory": memory,
    }


def in_new_process(file: Path, from_disk: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, file, from_disk).result()


def summarise(form: str, file: Path, runs: dict[bool, list[dict[str, Any]]]) -> Any:
    size = file.stat().st_size / MB
    warm, cold = runs[False], runs[True]
    row: dict[str, Any] = {"form": form, "file_mb": round(size, 1)}
    for key in ("load_s", "load_again_s", "load_and_answer_s"):
        row[key] = round(statistics.median(run[key] for run in warm), 3)
    row["from_disk_s"] = round(
        statistics.median(run["load_and_answer_s"] for run in cold), 3
    )
    # Of the run with the most memory in the end, so that the parts add up.
    most = max(warm, key=lambda run: run["memory"]["all words"]["total"])
    memory = row["memory_mb"] = most["memory"]
    row["over_file"] = {
        when: round(parts["total"] / size, 3) for when, parts in memory.items()
    }
    # Without what answering takes of every model: activations, and code of torch.
    held = memory["all words"]["file"] + memory["load"]["anonymous"]
    row["held_over_file"] = round(held / size, 3)
    return row


def show(rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    times = Table("s", *(row["form"] for row in rows), title="median", min_width=60)
    for key, what in (
        ("load_s", "load, first of a process"),
        ("load_again_s", "load again"),
        ("load_and_answer_s", "load and first answer"),
        ("from_disk_s", "load and first answer, from disk"),
    ):
        times.add_row(what, *(f"{row[key]:.3f}" for row in rows))
    memory = Table(
        "MB beyond the imports", "after", "total", "of file", "pages of the file",
        "anonymous", "libraries",
    )  # fmt: skip
    for row in rows:
        for when, parts in row["memory_mb"].items():
            memory.add_row(
                f"{row['form']}, file {row['file_mb']}", when, f"{parts['total']:.1f}",
                f"{row['over_file'][when]:.2f}x", f"{parts['file']:.1f}",
                f"{parts['anonymous']:.1f}", f"{parts['libraries']:.1f}",
            )  # fmt: skip
    screen = console()
    screen.print(times)
    screen.print(memory)
    screen.print(text_table("", *numbers(targets)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        files = write_checkpoints(Path(folder).resolve())
        runs: dict[str, dict[bool, list[dict[str, Any]]]] = {
            form: {False: [], True: []} for form in files
        }
        for _ in range(arguments.rounds):
            for from_disk in (True, False):
                for form, file in files.items():
                    runs[form][from_disk].append(in_new_process(file, from_disk))
        rows = [summarise(form, file, runs[form]) for form, file in files.items()]
    targets = reach(
        "pages of the packed file and what loading allocates, over the file",
        [rows[-1]["held_over_file"]], every=1.15, at_most=True, form="{:.2f}x",
    )  # fmt: skip
    show(rows, targets)
    data = {
        "threads": 1, "batch": 1, "tokens": TOKENS, "block_shape": list(BLOCK_SHAPE),
        "sparsity": SPARSITY, "rounds": arguments.rounds, "rows": rows,
        "targets": targets,
    }  # fmt: skip
    print(result.save("memory", data))


if __name__ == "__main__":
    main()
