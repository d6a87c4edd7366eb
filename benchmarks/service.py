"""A service loop: many mixed requests from several Python threads, on one packed model.

all-MiniLM-L6-v2 with 80 % of the (8, 1) blocks of its encoder removed by magnitude, or
random weights of that size where its package is missing. Requests are batches of 1 to 4
random texts of 1 to 64 tokens: ragged (one text, no mask) and padded. Every answer is
computed once by the main thread alone and must be the same bit by bit; ten times on the
way the resident memory is read.

    python -m benchmarks.service [--requests 10000] [--threads 4] [--torch-threads 1]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModel, BertConfig, BertModel

import pybsp
from benchmarks import result
from benchmarks.resident import resident
from benchmarks.section import console
from pybsp.cli.models import find_packaged, quiet
from pybsp.cli.timing import torch_threads

BLOCK_SHAPE, SPARSITY = (8, 1), 0.8
LARGEST = (4, 64)
#: Megabytes by which anonymous memory may grow from the first tenth to the last: the
#: allocator keeps what the largest requests that met took, in an arena a thread. If one
#: hidden state in ten were lost, ten thousand requests would grow it by 100 MB.
BOUND_MB = 16.0


def pruned() -> tuple[torch.nn.Module, str]:
    folder = find_packaged("minilm")
    if folder is not None:
        model, source = AutoModel.from_pretrained(folder), "all-MiniLM-L6-v2"
    else:
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536,
        )  # fmt: skip
        model, source = BertModel(config), "random weights"
    with torch.no_grad():
        for linear in model.encoder.modules():
            if isinstance(linear, torch.nn.Linear):
                norms = pybsp.ops.block_norms(linear.weight, BLOCK_SHAPE)
                kept = norms.numel() - round(norms.numel() * SPARSITY)
                mask = pybsp.ops.block_mask(norms, kept)
                pybsp.ops.apply_block_mask_(linear.weight, mask, BLOCK_SHAPE)
    return model.eval(), source


def requests(count: int, words: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    made = []
    for number in range(count):
        batch = 1 if number % 3 == 0 else int(random(1, LARGEST[0] + 1, 1))
        length = int(random(1, LARGEST[1] + 1, 1))
        inputs = {"input_ids": random(1, words, batch, length)}
        if number % 3:
            lengths = random(1, length + 1, batch)
            lengths[0] = length
            inputs["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        made.append(inputs)
    return made


def digest(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> bytes:
    """Of every bit of the hidden states: ten thousand answers need not be kept."""
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    return hashlib.blake2b(hidden.contiguous().numpy()).digest()


def serve(
    threads: int, count: int, answer: Callable[[int], None], every: int
) -> tuple[float, list[dict[str, float]], list[str]]:
    """Seconds, memory after each ``every`` answers, and errors."""
    numbers, done = itertools.count(), itertools.count(1)
    memory: list[dict[str, float]] = []
    errors: list[str] = []

    def work() -> None:
        while (number := next(numbers)) < count:
            try:
                answer(number)
            except Exception as error:
                errors.append(f"request {number}: {error!r}")
            if next(done) % every == 0:
                memory.append(resident())
        # A thread that ends gives its working memory back.
        together.wait()

    together = threading.Barrier(threads)
    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start, memory, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4, help="Python threads")
    parser.add_argument("--torch-threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    with (
        tempfile.TemporaryDirectory() as folder,
        torch_threads(arguments.torch_threads),
    ):
        dense, source = pruned()
        pybsp.save_packed(dense, Path(folder) / "packed", dense=False)
        del dense
        model = AutoModel.from_pretrained(Path(folder) / "packed")
        data = measure(model, arguments)
    data = {"model": source, "sparsity": SPARSITY, "block_shape": BLOCK_SHAPE, **data}
    show(data)
    if data["errors"] or data["wrong"] or not data["flat"]:
        raise SystemExit("an error, a wrong answer or growing memory: see above")
    if arguments.requests >= 10_000:
        print(result.save("service", data))


def measure(model: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    count = arguments.requests
    made = requests(count, model.config.vocab_size)
    start = time.perf_counter()
    serial = [digest(model, inputs) for inputs in made]
    serial_s = time.perf_counter() - start
    wrong: list[int] = []

    def answer(number: int) -> None:
        if digest(model, made[number]) != serial[number]:
            wrong.append(number)

    every = max(count // 10, 1)
    seconds, memory, errors = serve(arguments.threads, count, answer, every)
    anonymous = [parts["anonymous"] for parts in memory]
    return {
        "requests": count,
        "threads": arguments.threads,
        "torch_threads": arguments.torch_threads,
        "tokens": sum(inputs["input_ids"].numel() for inputs in made),
        "serial_s": round(serial_s, 1),
        "seconds": round(seconds, 1),
        "errors": errors,
        "wrong": wrong,
        "growth_mb": round(anonymous[-1] - anonymous[0], 1),
        "growth_total_mb": round(memory[-1]["total"] - memory[0]["total"], 1),
        "bound_mb": BOUND_MB,
        "flat": max(anonymous) - anonymous[0] <= BOUND_MB,
        "memory_mb": [{k: round(v, 1) for k, v in parts.items()} for parts in memory],
    }


def show(data: dict[str, Any]) -> None:
    table = Table(
        "model", "requests", "threads", "errors", "wrong answers", "s", "serial s",
        "anonymous MB after each tenth", "growth",
    )  # fmt: skip
    table.add_row(
        data["model"], str(data["requests"]), str(data["threads"]),
        str(len(data["errors"])), str(len(data["wrong"])), str(data["seconds"]),
        str(data["serial_s"]),
        " ".join(f"{parts['anonymous']:.0f}" for parts in data["memory_mb"]),
        f"{data['growth_mb']} (bound {data['bound_mb']})",
    )  # fmt: skip
    console().print(table)
    for error in data["errors"][:5]:
        print(error)


if __name__ == "__main__":
    main()
