"""DeepSparse, which needs an environment of its own, as a candidate that takes turns.

python3.11 -m venv DIR
DIR/bin/pip install --only-binary deepsparse deepsparse==1.8.0
python -m benchmarks --deepsparse DIR/bin/python
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.layers import Layer
from benchmarks.peers import onnx_linear

SERVER = Path(__file__).with_name("deepsparse_server.py")
#: It waits for its turn meanwhile, so the first call of a turn is not counted.
CALLS = 6


class Server:
    """One compiled layer in another process, idle between its turns."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process = process
        self._expect("ready")
        self.output = torch.from_numpy(np.load(output))

    def turn(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{CALLS}\n")
        self.process.stdin.flush()
        times = [float(text) for text in self._expect("").split()]
        return sorted(times[1:])[(CALLS - 1) // 2]

    def _expect(self, start: str) -> str:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            # It prints a banner of its own first.
            if line.startswith(start):
                return line
            lines.append(line)
        raise RuntimeError(
            f"DeepSparse ended with status {self.process.wait()}: {''.join(lines)}"
        )


@contextlib.contextmanager
def serve(python: str, x: torch.Tensor, layer: Layer) -> Iterator[Server]:
    """Start DeepSparse under ``python`` for this layer and these tokens."""
    model = onnx_linear(x, layer).SerializeToString()
    with serve_model(python, x, model) as server:
        yield server


@contextlib.contextmanager
def serve_model(python: str, x: torch.Tensor, model: bytes) -> Iterator[Server]:
    """Start DeepSparse under ``python`` for an ONNX model of one input."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", x.numpy())
        (folder / "model.onnx").write_bytes(model)
        process = subprocess.Popen(
            # -I: this folder's deepsparse.py must not be what it imports.
            [python, "-I", str(SERVER), "x.npy", "model.onnx",
             str(torch.get_num_threads()), "y.npy"],
            cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # No reports over the network; no pinning, the parent's cores are enough.
            env={**os.environ, "NM_DISABLE_ANALYTICS": "1",
                 "NM_BIND_THREADS_TO_CORES": "0"},
        )  # fmt: skip
        try:
            yield Server(process, folder / "y.npy")
        finally:
            process.kill()
            process.communicate()
