"""What else computes a linear layer on this CPU, each as a call on the same inputs.

Every peer gets its quickest form: sessions compiled beforehand, inputs and outputs
shared instead of copied where it offers that, as many threads as torch has. A peer that
is not installed is absent from the dictionaries.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.layers import Layer

Call = Callable[[], Any]


def dense_float32(x: torch.Tensor, layer: Layer) -> dict[str, Call]:
    """The dense peers; "best dense" is the fastest of these."""
    calls: dict[str, Call] = {"torch": lambda: F.linear(x, layer.weight, layer.bias)}
    if find_spec("onnx"):
        calls |= onnx_calls(onnx_linear(x, layer).SerializeToString(), x)
    return calls


def onnx_calls(model: bytes, x: torch.Tensor) -> dict[str, Call]:
    """An ONNX model of the one input ``x`` in the engines that are installed."""
    calls: dict[str, Call] = {}
    if find_spec("onnxruntime"):
        calls["onnxruntime"] = onnxruntime_call(model, x)
    if find_spec("openvino"):
        calls["openvino"] = openvino_call(model, x)
    return calls


def dense_int8(x: torch.Tensor, layer: Layer) -> dict[str, Call]:
    """8-bit anchors: a sparse float32 layer must be compared with these as well."""
    from torch.ao.nn import quantized

    torch.backends.quantized.engine = "x86"
    outputs, inputs = layer.weight.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: deprecated
        per_channel = quantized_weight(layer.weight)
        dynamic = quantized.dynamic.Linear(inputs, outputs)
        dynamic.set_weight_bias(per_channel, layer.bias)
        static = quantized.Linear(inputs, outputs)
        static.set_weight_bias(per_channel, layer.bias)
        x8 = static_input(static, x, layer)
    calls: dict[str, Call] = {
        "torch int8 dynamic": lambda: dynamic(x),
        "torch int8 static": lambda: static(x8),
    }
    if find_spec("onnx") and find_spec("onnxruntime"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "linear.onnx"
            # It advises to infer shapes first; all of them are given.
            logging.getLogger().addFilter(_no_advice)
            quantize_dynamic(
                onnx_linear(x, layer), file, per_channel=True,
                weight_type=QuantType.QInt8,
            )  # fmt: skip
            calls["onnxruntime int8 dynamic"] = onnxruntime_call(file.read_bytes(), x)
    if find_spec("onnx") and find_spec("nncf"):
        quantized = openvino_int8(onnx_linear(x, layer).SerializeToString(), x)
        calls["openvino int8"] = openvino_call(quantized, x)
    return calls


def openvino_int8(model: bytes, x: torch.Tensor) -> Any:
    """An ONNX model in the 8 bits of NNCF for transformers, calibrated on ``x``."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            openvino.Core().read_model(io.BytesIO(model)),
            nncf.Dataset([{"x": x.numpy()}]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=1,
        )


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()


def sparse(x: torch.Tensor, layer: Layer) -> dict[str, Call]:
    """Float32 peers that skip zeros."""
    import scipy.sparse

    r, c = layer.matrix.block_shape
    columns = x.t().contiguous()
    scipy_bsr = scipy.sparse.bsr_matrix(layer.weight.numpy(), blocksize=(r, c))
    scipy_bias, scipy_columns = layer.bias.numpy()[:, None], columns.numpy()
    calls: dict[str, Call] = {
        "scipy BSR": lambda: (scipy_bsr @ scipy_columns + scipy_bias).T
    }
    if r == c and torch.backends.mkl.is_available():  # MKL has square blocks only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: BSR is in beta
            bsr = layer.weight.to_sparse_bsr((r, c))
        bias = layer.bias[:, None]
        # Both ways: what nn.Linear does with such a weight, and the way MKL is fast.
        calls["torch BSR, F.linear"] = lambda: F.linear(x, bsr, layer.bias)
        calls["torch BSR, W @ x.T"] = lambda: (bsr @ columns + bias).t()
    return calls


def sparse_int8(x: torch.Tensor, layer: Layer) -> dict[str, Call]:
    """``torch.ao``'s kernel for ``(1, 4)`` blocks, static, one thread."""
    if layer.matrix.block_shape != (1, 4) or "fbgemm" not in (
        torch.backends.quantized.supported_engines
    ):
        return {}
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: deprecated
        outputs, inputs = layer.weight.shape
        linear = torch.ao.nn.sparse.quantized.Linear(inputs, outputs, 1, 4)
        linear.set_weight_bias(quantized_weight(layer.weight), layer.bias, 1, 4)
        x8 = static_input(linear, x, layer)
    return {"torch.ao sparse int8 1x4": lambda: linear(x8)}


def quantized_weight(weight: torch.Tensor) -> torch.Tensor:
    """8 bits, a scale for each output."""
    scales = weight.abs().amax(1).clamp(min=1e-6).double() / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.long)
    return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)


def static_input(linear: Any, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """``x`` in 8 bits and the output's scale, both from the timed values."""
    y = F.linear(x, layer.weight, layer.bias).abs().max()
    linear.scale, linear.zero_point = float(y) / 127, 128
    return torch.quantize_per_tensor(x, float(x.abs().max()) / 127, 128, torch.quint8)


def onnx_linear(x: torch.Tensor, layer: Layer) -> Any:
    """``y = x w + b`` as an ONNX model of fixed shape."""
    from onnx import TensorProto, helper, numpy_helper

    tokens, outputs = x.shape[0], layer.weight.shape[0]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["t"]),
            helper.make_node("Add", ["t", "b"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, outputs])],
        [
            numpy_helper.from_array(
                np.ascontiguousarray(layer.weight.t().numpy()), "w"
            ),
            numpy_helper.from_array(layer.bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8  # what the oldest reader here knows
    return model


def onnxruntime_call(model: bytes, x: torch.Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_call(model: Any, x: torch.Tensor, precision: str = "f32") -> Call:
    """An ONNX model, or one of OpenVINO's; what is not 8-bit runs in ``precision``."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(io.BytesIO(model)) if isinstance(model, bytes) else model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Otherwise bfloat16 where the CPU has AMX.
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            # It would pin the calling thread for everyone.
            "ENABLE_CPU_PINNING": False,
        },
    )
    request, feed = compiled.create_infer_request(), [x.numpy()]
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]
