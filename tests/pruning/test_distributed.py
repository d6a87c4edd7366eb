"""Two processes under DistributedDataParallel prune the same blocks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = """
import sys, torch
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from pybsp import BlockPruner, BlockPruningConfig

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(rank)  # other weights and other data: what DDP does must be enough
model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
cfg = BlockPruningConfig(penalty=sys.argv[2], reg_lambda=0.01, ramp="cubic")
pruner = BlockPruner(model, cfg, total_steps=20).attach(optimizer)
for _ in range(20):
    optimizer.zero_grad()
    x = torch.randn(8, 32)
    (model(x) - x).square().mean().backward()
    optimizer.step()
record = pruner.finalize()
assert list(record["modules"]) == ["0", "1"]
state = {**model.module.state_dict(), **pruner.state_dict()["masks"]}
torch.save(state, Path(sys.argv[1]) / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_arrive_at_the_same_masks(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), "proximal"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            errors = worker.communicate(timeout=300)[1]
            assert worker.returncode == 0, errors.decode()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    first, second = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert sum(int((~first[name]).sum()) for name in ("0", "1")) == 410
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
