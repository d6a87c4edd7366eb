"""A training step of all-MiniLM-L6-v2 in int8 against the same in float32.

Forward, backward and AdamW on the same batch, in turns in one process. The ratio is the
median over the rounds of that within a round.

    python -m benchmarks.quantization_step [--batch 16] [--tokens 64]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import result
from benchmarks.training_step import load
from pybsp import QuantizationAwareTraining
from pybsp.cli.models import quiet
from pybsp.cli.timing import torch_threads


def training(arguments: argparse.Namespace, int8: bool) -> Callable[[], float]:
    """One optimizer step; returns its seconds."""
    torch.manual_seed(0)
    model, _ = load(dropout=0.1)
    if int8:
        QuantizationAwareTraining(model).begin()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(1000, 30000, (arguments.batch, arguments.tokens))
    labels = torch.randint(0, 2, (arguments.batch,))

    def step() -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quiet()
    with torch_threads(arguments.threads):
        steps = [training(arguments, int8) for int8 in (False, True)]
        for step in steps:
            step()
        rounds = [[step() for step in steps] for _ in range(arguments.rounds)]
    ratios = sorted(int8 / float32 for float32, int8 in rounds)
    record = {
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "float32_ms": round(1e3 * min(pair[0] for pair in rounds), 1),
        "int8_ms": round(1e3 * min(pair[1] for pair in rounds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
        "rounds": len(rounds),
    }
    result.save("quantization_step", record)
    print(record)


if __name__ == "__main__":
    main()
