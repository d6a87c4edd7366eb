"""Where the time of a packed model goes, the least it could take, and its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..nn.encoder import FusedForward, fuse_encoders_
from ..nn.encoder.reader import Deviation
from ..nn.linear import BlockSparseLinear
from ..nn.report import EncoderReport
from ..nn.shrunk import RECORD
from .timing import torch_threads

#: Part of a call -> what it is, in the order of the table.
PARTS = {
    "embeddings": "embeddings",
    "query_key_value": "query, key, value",
    "attention": "attention",
    "output": "output projection",
    "norms": "norms",
    "up": "feed-forward up, activation",
    "down": "feed-forward down",
    "storing": "storing",
    "rest": "preparing",
    "outside": "outside the native call",
}


def encoders(model: Any) -> tuple[EncoderReport, ...]:
    """Which encoders of a packed ``model`` run natively, and why the others do not."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.fuse:
        reason = "fuse=False in its quantization_config"
        return (EncoderReport("", type(model).__name__, False, reason),)
    return fuse_encoders_(model)


class NotNative(Exception):
    """Why there is nothing to tell about the parts of a call."""


def native_forward(model: Any) -> FusedForward:
    """That of a packed base model; raises ``NotNative``."""
    forward = vars(model).get("forward")
    if not isinstance(forward, FusedForward):
        raise NotNative(f"{type(model).__name__} runs through its own modules")
    return forward


def parts(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    others: Sequence[Callable[[], object]],
    *,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds and share of each of ``PARTS``, medians over calls of a base model.

    ``outside`` is Python, the pooler and what else torch does. ``others`` are called
    before each, as in the rounds of a timing: a call right after its like finds caches
    warm. Raises ``NotNative``.
    """
    forward = native_forward(model)
    calls: list[dict[str, float]] = []
    stop = time.perf_counter() + seconds
    try:
        with torch.inference_mode(), torch_threads(threads):
            forward.profile(**inputs)
            while len(calls) < 5 or (time.perf_counter() < stop and len(calls) < 200):
                for other in others:
                    other()
                started = time.perf_counter()
                found = forward.profile(**inputs)[1]
                whole = time.perf_counter() - started
                calls.append(found | {"outside": whole - sum(found.values())})
    except Deviation as deviation:
        raise NotNative(str(deviation)) from deviation
    medians = {name: statistics.median(call[name] for call in calls) for name in PARTS}
    total = sum(medians.values())
    return {
        "rounds": len(calls),
        "ms": {name: round(1e3 * value, 4) for name, value in medians.items()},
        "share": {name: round(value / total, 4) for name, value in medians.items()},
    }


def floor(
    model: Any, inputs: Mapping[str, torch.Tensor], *, peak: float, int8_peak: float,
    median_ms: float,
) -> dict[str, Any]:  # fmt: skip
    """The time of the multiply-adds alone at ``peak`` operations a second, and of those
    of int8 weights at ``int8_peak``.

    They are those of the kept weights of the encoder and of attention, for tokens that
    are not padding. Raises ``NotNative``.
    """
    forward = native_forward(model)
    lengths = inputs["attention_mask"].sum(1).tolist()
    try:
        with torch.inference_mode():
            count = forward.spec.multiply_adds(lengths)
            int8 = forward.spec.int8_multiply_adds(lengths)
    except Deviation as deviation:
        raise NotNative(str(deviation)) from deviation
    least_ms = 2e3 * ((count - int8) / peak + int8 / int8_peak)
    products = {
        "int8_multiply_adds": int8,
        "int8_peak_gops": round(int8_peak / 1e9, 1),
    }
    return {
        "multiply_adds": count,
        "peak_gflops": round(peak / 1e9, 1),
        **(products if int8 else {}),
        "ms": round(least_ms, 4),
        "times_floor": round(median_ms / least_ms, 3),
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that ``model`` keeps, with indices of blocks, with what was
    left out and is kept aside for saving, and with the bytes of int8 layers in the
    order of the kernels."""
    tensors = [*model.parameters(), *model.buffers()]
    native: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, BlockSparseLinear) and module.is_int8:
            pattern = module.matrix.pattern
            native[id(pattern)] = pattern.nbytes
        record = vars(module).get(RECORD)
        for left_out in record.aside.values() if record else ():
            tensors += [left_out.positions, left_out.values]
    # Tied ones once.
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(kept.values()) + sum(native.values())


def memory(dense: nn.Module, packed: nn.Module) -> dict[str, int]:
    return {
        "dense_weight_bytes": weight_bytes(dense),
        "packed_weight_bytes": weight_bytes(packed),
    }
