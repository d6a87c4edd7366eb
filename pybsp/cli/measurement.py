"""What packing gained: agreement with the dense model, bytes, latency."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from ..integrations.distillation import hidden_states_loss, logits_loss
from ..nn.linear import BlockSparseLinear
from ..nn.pack import pack_
from . import engines
from .engines import Call
from .errors import WorkError
from .timing import interleaved, speedup, torch_threads

DENSE_FILE = "model.safetensors"
PACKED_FILE = "model.pybsp.safetensors"
#: Bytes of one element by its safetensors type.
ELEMENT_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


#: The candidate beside a rounded model that is the same in float32.
PACKED_FLOAT32 = "packed float32"
#: How far a packed model's results may be from the dense ones, of the largest value.
#: Inputs of int8 layers are rounded, which is no fault but would hide small ones.
TOLERANCES = {"int8": 0.25, "bfloat16": 1e-3, "float32": 1e-3}


def packed_dtype(model: nn.Module) -> str:
    """The first of ``TOLERANCES`` that any packed layer has."""
    found = {
        module.dtype
        for module in model.modules()
        if isinstance(module, BlockSparseLinear)
    }
    return next((dtype for dtype in TOLERANCES if dtype in found), "float32")


def tolerance(packed: nn.Module) -> float:
    """Of ``TOLERANCES``, that for this model."""
    return TOLERANCES[packed_dtype(packed)]


def _packed_float32(dense: Any) -> Any:
    model = copy.deepcopy(dense)
    pack_(model, min_gain=0)
    return model


def agreement(
    dense: NDArray[np.float32], packed: NDArray[np.float32], inputs: Sequence[int]
) -> dict[str, Any]:
    """Compare logits ``(examples, outputs)`` of the masked dense and the packed model.

    ``inputs`` are the in-features of the packed layers. Summing ``n`` products in
    another order moves a float32 result by about ``eps sqrt(n)`` of its size; over the
    layers these add up at most linearly, which gives the relative tolerance. A
    regression has no ``same_predictions``.
    """
    eps = float(np.finfo(np.float32).eps)
    scale = max(float(np.abs(dense).max()), 1e-6)
    tolerance = scale * eps * float(np.sqrt(np.asarray(inputs, dtype=np.float64)).sum())
    difference = float(np.abs(dense - packed).max())
    classes = dense.shape[1] > 1
    same = float((dense.argmax(1) == packed.argmax(1)).mean()) if classes else None
    return {
        "examples": len(dense),
        "max_difference": difference,
        "tolerance": tolerance,
        "largest_logit": scale,
        "agree": bool(np.isfinite(packed).all() and difference <= tolerance),
        "same_predictions": same,
    }


def fidelity(
    teacher: nn.Module, pruned: nn.Module, inputs: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """How far a pruned model went from the dense one that it was cut from.

    ``inputs`` are batches of both models. ``logits`` is the divergence
    KL(dense || pruned) in nats, or with one output the squared error, and
    ``hidden_states``, of models that give them, the squared error of the outputs of the
    layers, of their size (the loss of distillation), a mean over the batches. A score
    counts the answers that turn, these see every example move: they tell recipes
    apart where one seed's scores cannot.
    """
    sums: dict[str, float] = {}
    examples = 0
    with torch.inference_mode():
        for batch in inputs:
            theirs, ours = (
                model.eval()(**batch, output_hidden_states=True)
                for model in (teacher, pruned)
            )
            errors = {"logits": logits_loss(ours.logits, theirs.logits, temperature=1)}
            if ours.get("hidden_states") and theirs.get("hidden_states"):
                errors["hidden_states"] = hidden_states_loss(
                    ours.hidden_states,
                    theirs.hidden_states,
                    batch.get("attention_mask"),
                )
            for name, error in errors.items():
                sums[name] = sums.get(name, 0.0) + float(error) * len(ours.logits)
            examples += len(ours.logits)
    return {name: float(f"{total / examples:.4g}") for name, total in sums.items()}


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
    onnx: bool = True, ragged: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Interleaved times of the base models (embeddings and encoder) of two classifiers.

    Inputs are those of ``random_inputs``, the rest is as in ``candidates`` and
    ``compare``.
    """
    inputs = random_inputs(dense.config, batch, sequence, ragged)
    calls, notes = candidates(dense, packed, inputs, threads=threads, onnx=onnx)
    return compare(calls, inputs, threads=threads, seconds=seconds, notes=notes)


def candidates(
    dense: Any, packed: Any, inputs: Mapping[str, torch.Tensor], *, threads: int,
    onnx: bool = True,
) -> tuple[dict[str, Call], list[str]]:  # fmt: skip
    """Calls of both base models on ``inputs``, and why others are left out.

    With ``onnx`` the dense model also runs in the ``engines`` that are installed.
    Beside a rounded model stands the same one packed in float32. Raises ``WorkError``
    when the packed model's result is not that of the dense one.
    """
    models = {"dense": dense.base_model.eval(), "packed": packed.base_model.eval()}
    if packed_dtype(packed) != "float32":
        models[PACKED_FLOAT32] = _packed_float32(dense).base_model.eval()
    calls: dict[str, Call] = {
        name: _call(model, inputs) for name, model in models.items()
    }
    with torch.inference_mode(), torch_threads(threads):
        expected = calls["dense"]()
        wrong = difference(
            calls["packed"](), expected, inputs["attention_mask"], tolerance(packed)
        )
        if wrong:
            raise WorkError(f"the packed model's {wrong}; run pybsp check")
        if not (onnx and engines.installed()):
            return calls, []
        found, notes = _engines(models["dense"], inputs, threads, expected)
    return calls | found, notes


def compare(
    calls: Mapping[str, Call], inputs: Mapping[str, torch.Tensor], *, threads: int,
    seconds: float, notes: Sequence[str] = (), dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """Interleaved times of ``candidates``. Tokens are those that are not padding."""
    with torch.inference_mode(), torch_threads(threads):
        timings = interleaved(calls, seconds=seconds)
    batch, sequence = inputs["input_ids"].shape
    tokens = int(inputs["attention_mask"].sum())
    others = timings.keys() - {"packed", PACKED_FLOAT32}
    best = min(others, key=lambda name: timings[name].median)
    result: dict[str, Any] = {
        "what": "embeddings and encoder",
        "batch": batch,
        "sequence": sequence,
        "tokens": tokens,
        "threads": threads,
        "dtype": dtype,
        "candidates": {
            name: {
                **timing.to_dict(),
                "sequences_per_s": round(1e3 * batch / timing.median, 2),
                "tokens_per_s": round(1e3 * tokens / timing.median, 1),
            }
            for name, timing in timings.items()
        },
        "best_dense": best,
        "speedup": speedup(timings, "dense", "packed"),
        "speedup_over_best_dense": speedup(timings, best, "packed"),
    }
    if PACKED_FLOAT32 in timings:
        result["speedup_over_packed_float32"] = speedup(
            timings, PACKED_FLOAT32, "packed"
        )
    if "onnxruntime" in timings:
        result["speedup_over_onnxruntime"] = speedup(timings, "onnxruntime", "packed")
    if notes:
        result["note"] = "; ".join(notes)
    return result


def random_inputs(
    config: Any, batch: int, sequence: int, ragged: bool = False
) -> dict[str, torch.Tensor]:
    """Token ids ``(batch, sequence)`` and their mask.

    ``ragged``: the first sequence has all tokens and the others from one token on, as
    in a batch that is padded to its longest. Raises ``WorkError`` when the model has no
    room for so many tokens or takes none.
    """
    words = getattr(config, "vocab_size", None)
    if words is None:
        raise WorkError(
            f"a model of type {config.model_type!r} takes no token ids; only models of "
            "text can be timed"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and sequence > limit:
        raise WorkError(
            f"the model takes at most {limit} tokens; a sequence of {sequence} is "
            "too long"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (batch, sequence), generator=generator)
    lengths = torch.full((batch,), sequence)
    if ragged:
        others = torch.randint(1, sequence + 1, (batch - 1,), generator=generator)
        lengths[1:] = others
    mask = (torch.arange(sequence) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def difference(
    found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None,
    tolerance: float = TOLERANCES["float32"],
) -> str | None:  # fmt: skip
    """How much too far two results are from each other, None when they are the same.

    ``mask``: tokens that count. ``tolerance``: of the largest value.
    """
    if mask is not None:
        found, expected = found[mask != 0], expected[mask != 0]
    scale = float(expected.abs().max())
    largest = float((expected - found).abs().max())
    if largest <= tolerance * max(scale, 1e-6):
        return None
    return (
        f"output differs from the dense one's by {largest:.3g} (largest value "
        f"{scale:.3g})"
    )


def _call(model: Any, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: model(**inputs)[0]


def _engines(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    threads: int,
    expected: torch.Tensor,
) -> tuple[dict[str, engines.Call], list[str]]:
    """Calls of the dense ``model`` in other engines, and why some are left out."""
    calls: dict[str, engines.Call] = {}
    notes = []
    names = engines.installed()
    # What the exporter or an engine refuses must not stop the measurement.
    try:
        exported = engines.export(model, inputs)
    except Exception as error:
        return {}, [f"{', '.join(names)} left out: {type(error).__name__}"]
    for name in names:
        try:
            call = engines.ENGINES[name](exported, inputs, threads)
            result = torch.from_numpy(call())
            wrong = difference(result, expected, inputs["attention_mask"])
        except Exception as error:
            wrong = type(error).__name__
        if wrong:
            notes.append(f"{name} left out: {wrong}")
        else:
            calls[name] = call
    return calls, notes


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
