"""What packing gained: agreement with the dense model, bytes, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from . import onnx_session
from .errors import WorkError
from .timing import interleaved, speedup, torch_threads

DENSE_FILE = "model.safetensors"
PACKED_FILE = "model.pybsp.safetensors"
#: Bytes of one element by its safetensors type.
ELEMENT_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def agreement(
    dense: NDArray[np.float32], packed: NDArray[np.float32], inputs: Sequence[int]
) -> dict[str, Any]:
    """Compare logits ``(examples, outputs)`` of the masked dense and the packed model.

    ``inputs`` are the in-features of the packed layers. Summing ``n`` products in
    another order moves a float32 result by about ``eps sqrt(n)`` of its size; over the
    layers these add up at most linearly, which gives the relative tolerance.
    """
    eps = float(np.finfo(np.float32).eps)
    scale = max(float(np.abs(dense).max()), 1e-6)
    tolerance = scale * eps * float(np.sqrt(np.asarray(inputs, dtype=np.float64)).sum())
    difference = float(np.abs(dense - packed).max())
    return {
        "examples": len(dense),
        "max_difference": difference,
        "tolerance": tolerance,
        "largest_logit": scale,
        "agree": bool(np.isfinite(packed).all() and difference <= tolerance),
        "same_predictions": float((dense.argmax(1) == packed.argmax(1)).mean()),
    }


def file_sizes(folder: Path, layers: Sequence[str]) -> dict[str, Any]:
    """Bytes of both checkpoints in ``folder``, whole and of the encoder alone.

    The encoder is everything below the part of the name that all pruned ``layers``
    share, such as ``bert.encoder.layer``: their weights, biases and layer norms.
    """
    encoder = encoder_prefix(layers)
    dense, packed = folder / DENSE_FILE, folder / PACKED_FILE
    dense_encoder = _tensor_bytes(dense, encoder)
    packed_encoder = _tensor_bytes(packed, encoder)
    return {
        "encoder": encoder.rstrip("."),
        "dense_encoder_bytes": dense_encoder,
        "packed_encoder_bytes": packed_encoder,
        "encoder_ratio": round(packed_encoder / dense_encoder, 4),
        "dense_file_bytes": dense.stat().st_size,
        "packed_file_bytes": packed.stat().st_size,
    }


def encoder_prefix(layers: Sequence[str]) -> str:
    """The dotted prefix, with its last dot, that all names share; "" when none."""
    parts = [name.split(".")[:-1] for name in layers]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1 or column[0].isdecimal():
            break
        shared.append(column[0])
    return "".join(f"{part}." for part in shared)


def latency(
    dense: Any, packed: Any, *, batch: int, sequence: int, threads: int, seconds: float,
    onnx: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Interleaved times of the base models (embeddings and encoder) of two classifiers.

    Inputs are random token ids without padding. ONNX Runtime takes part with the dense
    model when it is installed and ``onnx`` is set.
    """
    inputs = random_inputs(dense.config, batch, sequence)
    models = {"dense": dense.base_model.eval(), "packed": packed.base_model.eval()}
    calls: dict[str, Callable[[], object]] = {
        name: _call(model, inputs) for name, model in models.items()
    }
    note = None
    if onnx and onnx_session.available():
        try:
            calls["onnxruntime"] = onnx_session.session(
                models["dense"], inputs, threads
            )
        except Exception as error:
            # An architecture that the exporter refuses must not stop the measurement.
            note = f"onnxruntime left out: {type(error).__name__}"
    with torch.inference_mode(), torch_threads(threads):
        timings = interleaved(calls, seconds=seconds)
    result: dict[str, Any] = {
        "what": "embeddings and encoder",
        "batch": batch,
        "sequence": sequence,
        "threads": threads,
        "dtype": "float32",
        "candidates": {name: timing.to_dict() for name, timing in timings.items()},
        "speedup": speedup(timings, "dense", "packed"),
    }
    if "onnxruntime" in timings:
        result["speedup_over_onnxruntime"] = speedup(timings, "onnxruntime", "packed")
    if note:
        result["note"] = note
    return result


def random_inputs(config: Any, batch: int, sequence: int) -> dict[str, torch.Tensor]:
    """Token ids ``(batch, sequence)`` and a mask of ones.

    Raises ``WorkError`` when the model has no room for so many tokens.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and sequence > limit:
        raise WorkError(
            f"the model takes at most {limit} tokens; a sequence of {sequence} is "
            "too long"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, sequence), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _call(model: Any, inputs: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: model(**inputs)


def _tensor_bytes(file: Path, prefix: str) -> int:
    total = 0
    try:
        with safe_open(file, framework="pt") as checkpoint:
            for key in checkpoint.keys():  # noqa: SIM118 (not a mapping)
                if key.startswith(prefix):
                    tensor = checkpoint.get_slice(key)
                    size = ELEMENT_BYTES[tensor.get_dtype()]
                    total += size * int(np.prod(tensor.get_shape(), dtype=np.int64))
    except (SafetensorError, OSError) as error:
        raise WorkError(f"{file} is missing or damaged: {error}") from error
    return total
