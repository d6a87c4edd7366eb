"""The dense model in ONNX Runtime, as a peer to time against."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def available() -> bool:
    """Whether both ``onnx`` and ``onnxruntime`` are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


class _Outputs(nn.Module):
    """``model`` with positional inputs and its first output only."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        first: torch.Tensor = self.model(**named, return_dict=False)[0]
        return first


def session(
    model: Any, inputs: Mapping[str, torch.Tensor], threads: int
) -> Callable[[], Any]:
    """A call of the exported ``model`` on ``inputs``; returns the first output.

    ``model`` is a dense transformers model; it is left as it was.
    """
    import onnxruntime

    names = tuple(inputs)
    buffer = io.BytesIO()
    attention = getattr(model.config, "_attn_implementation", None)
    # The other attention kernels trace into operators that ONNX does not have.
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            # The exporter warns about itself and about traced shapes, both intended.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Outputs(model, names).eval(),
                tuple(inputs.values()),
                buffer,  # type: ignore[arg-type]
                input_names=list(names),
                output_names=["output"],
                opset_version=17,
                dynamo=False,
            )
    finally:
        if attention and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    runner = onnxruntime.InferenceSession(
        buffer.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {
        name: value.numpy()
        for name, value in inputs.items()
        if name in {node.name for node in runner.get_inputs()}
    }
    return lambda: runner.run(None, feeds)[0]
