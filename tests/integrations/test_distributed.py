"""``accelerate launch`` with two processes against one with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import os, sys
import torch
from transformers import (
    BertConfig, BertForSequenceClassification, Trainer, TrainingArguments,
)
from pybsp import BlockPruningCallback, BlockPruningConfig

out, batch, order = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
ids = torch.randint(1, 20, (96, 8))
rows = [{"input_ids": x, "labels": (x == 3).any().long()} for x in ids]
model = BertForSequenceClassification(BertConfig(
    vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
))
cfg = BlockPruningConfig(
    target_sparsity=0.75, phases=(0.2, 0.4, 0.4), penalty="proximal",
    reg_lambda="auto", ramp="cubic",
)
trainer = Trainer(
    model=model, train_dataset=rows, callbacks=[BlockPruningCallback(cfg)],
    args=TrainingArguments(
        output_dir=out, max_steps=24, per_device_train_batch_size=batch,
        learning_rate=1e-3, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, seed=0, data_seed=order, dataloader_pin_memory=False,
    ),
)
trainer.train()
rank = int(os.environ.get("RANK", "0"))
torch.save(model.state_dict(), f"{out}/rank{rank}.pt")
"""


def train(
    folder: Path, processes: int, batch: int, order: int = 0
) -> list[dict[str, torch.Tensor]]:
    """The state of the model in every process."""
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # the script keeps to the CPU; for CPUs accelerate itself would want MPI
        launch += ["-P", "-m", "accelerate.commands.launch", "--multi_gpu",
                   "--num_processes", str(processes), "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--main_process_port", str(port)]  # fmt: skip
    run = subprocess.run(
        [*launch, str(script), str(folder), str(batch), str(order)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def masks(state: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = [
        value.flatten()
        for name, value in state.items()
        if name.startswith("bert.encoder") and value.dim() == 2
    ]
    return torch.cat(weights) != 0


def test_two_launched_processes_prune_as_one_does(tmp_path: Path) -> None:
    first, second = train(tmp_path / "two", processes=2, batch=4)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    (one,) = train(tmp_path / "one", processes=1, batch=8)
    (other,) = train(tmp_path / "other", processes=1, batch=8, order=1)
    assert int((~masks(one)).sum()) == int(0.75 * masks(one).numel())
    differ = float((masks(first) != masks(one)).float().mean())
    noise = float((masks(other) != masks(one)).float().mean())
    assert noise > 0.01, "another order of the data makes a difference"
    assert differ < noise / 4
