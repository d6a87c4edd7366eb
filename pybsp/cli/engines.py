"""Other engines that run the dense model, exported to ONNX: peers to time against."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Call = Callable[[], Any]


def installed() -> tuple[str, ...]:
    """Those of ``ENGINES`` that are installed, and with them ``onnx`` to export."""
    if importlib.util.find_spec("onnx") is None:
        return ()
    return tuple(name for name in ENGINES if importlib.util.find_spec(name))


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


def export(model: Any, inputs: Mapping[str, torch.Tensor]) -> bytes:
    """``model`` as ONNX, for inputs of these shapes; its result is the first output.

    ``model`` is a dense transformers model; it is left as it was.
    """
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
    return buffer.getvalue()


def _onnxruntime(
    exported: bytes, inputs: Mapping[str, torch.Tensor], threads: int
) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    runner = onnxruntime.InferenceSession(
        exported, options, providers=["CPUExecutionProvider"]
    )
    names = {node.name for node in runner.get_inputs()}
    feeds = {name: value.numpy() for name, value in inputs.items() if name in names}
    return lambda: runner.run(None, feeds)[0]


def _openvino(
    exported: bytes, inputs: Mapping[str, torch.Tensor], threads: int
) -> Call:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(io.BytesIO(exported)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            # Otherwise bfloat16 where the CPU has AMX.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # It would pin the calling thread for every candidate.
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = compiled.create_infer_request()
    names = {name for node in compiled.inputs for name in node.names}
    feeds = {name: value.numpy() for name, value in inputs.items() if name in names}
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]


#: Who runs an exported model: ``(exported, inputs, threads)`` to a call of it.
ENGINES: dict[str, Callable[[bytes, Mapping[str, torch.Tensor], int], Call]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
