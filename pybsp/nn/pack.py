"""Replace the linear layers that have zero blocks, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .. import ops
from ..blocks import BlockShapeSpec
from ..costs import expected_cost, linear_cost
from ..pruning.config import check_names
from ..pruning.names import check_each_matches
from ..quantization import calibrate
from .encoder import fuse_encoders_, unfuse_encoders_
from .fuse import fuse_, unfuse_
from .linear import BlockSparseLinear
from .plan import (
    LayerPlan,
    plan_bfloat16,
    plan_int8,
    plan_packing,
    planned_block_shapes,
)
from .report import PackReport
from .shrink import Removed, is_shrunk, shrink_, unshrink_

#: Types of packed weights.
DTYPES = ("float32", "bfloat16", "int8")

#: Called with the model after ``pack_`` or ``unpack_`` changed it, by name.
listeners: dict[str, Callable[[nn.Module], None]] = {}


def pack_(
    model: nn.Module,
    block_shape: BlockShapeSpec | None = None,
    dtype: str = "float32",
    fuse: bool = True,
    min_gain: float = 1.0,
    tokens: int = 128,
    shrink: bool = True,
    calibration: Iterable[Any] | Mapping[str, float] | None = None,
    float32_modules: str | Sequence[str] = (),
) -> PackReport:
    """Replace, in place, every ``nn.Linear`` with zero blocks where that is faster.

    With ``dtype="bfloat16"`` packed weights are rounded to half the bytes, also those
    that were packed in float32 before; arithmetic and activations stay float32.

    With ``dtype="int8"`` weights are quantised as they are packed, also those of layers
    that were packed in float32 before, and of layers without zero blocks between others
    that have some. Their inputs are quantised in each call: token by token, or by the
    one scale of each layer that ``calibration`` gives.

    Parameters
    ----------
    model : any module with float32 weights on the CPU, possibly packed in part.
    block_shape : ``(out, in)`` blocks for every layer. None: what the pruner recorded
        on the layer or in ``model.config``, else detected from the zeros.
    dtype : of the packed weights, ``"float32"``, ``"bfloat16"`` or ``"int8"``. Layers
        that are int8 already stay so, and bfloat16 ones do not become float32 again.
    fuse : run whole encoders natively, and compute the activation after a packed layer
        inside of it, where the architecture is known. Natively the last hidden states
        are zero at padding.
    min_gain : a layer stays dense when the packed call would not be at least this many
        times faster on this CPU, as ``pybsp.costs`` predicts it or, where it is close,
        measures it; int8 is measured. 0 packs every layer with zero blocks, and asks
        for no times.
    tokens : rows of the input for these times.
    shrink : first leave out neurons and heads that the result does not need, where the
        architecture is known. Attention maps then lack these heads; what is saved, and
        what ``unpack_`` gives, does not.
    calibration : for int8, inputs of the model (a mapping of keywords, a tuple, or the
        only argument, each) that stand for what is to come, which are run through it;
        or the scales themselves by name, as ``pybsp.quantization.calibrate`` found them
        or as far as they are known.
    float32_modules : which layers are not rounded where others are: names (any run of
        dotted components), each of some layer, or one regular expression.
        ``quantization.sensitivity`` says which ones matter most.

    Raises ``ValueError`` before anything is changed: no layer with zero blocks, weights
    that are not finite, not float32 or not on the CPU, or a wrong option.
    """
    _check_options(model, dtype, min_gain, tokens)
    float32 = check_names("float32_modules", float32_modules, empty=True)
    if dtype != "int8" and calibration is not None:
        raise ValueError(f"calibration is for dtype='int8'; dtype is {dtype!r}")
    if dtype == "float32" and float32:
        raise ValueError(
            "float32_modules is for dtype='bfloat16' or 'int8'; dtype is 'float32'"
        )
    if dtype != "float32":
        plans, removed = _pack_rounded(
            model, block_shape, dtype, min_gain, tokens, shrink, calibration, float32
        )
    else:
        plans, removed = _pack_float32(model, block_shape, min_gain, tokens, shrink)
    fused = fuse_(model) if fuse else []
    encoders = fuse_encoders_(model) if fuse else ()
    _tell(model)
    layers = tuple(plan.report for plan in plans)
    return PackReport(layers, tokens, tuple(fused), encoders, tuple(removed))


def _pack_float32(
    model: nn.Module,
    block_shape: BlockShapeSpec | None,
    min_gain: float,
    tokens: int,
    shrink: bool,
) -> tuple[list[LayerPlan], list[Removed]]:
    plans = plan_packing(model, block_shape)
    removed: list[Removed] = []
    if shrink:
        removed = shrink_(model, planned_block_shapes(plans))
        plans = [plan.again(model) for plan in plans] if removed else plans
    plans = [_decide(plan, min_gain, tokens) for plan in plans]
    _build(model, [plan for plan in plans if plan.linear is not None])
    return plans, removed


def _pack_rounded(
    model: nn.Module,
    block_shape: BlockShapeSpec | None,
    dtype: str,
    min_gain: float,
    tokens: int,
    shrink: bool,
    calibration: Iterable[Any] | Mapping[str, float] | None,
    float32: str | tuple[str, ...],
) -> tuple[list[LayerPlan], list[Removed]]:
    plans = plan_packing(model, block_shape)
    names = [name for plan in plans for name in plan.names]
    check_each_matches("float32_modules", float32, names, "linear layer")

    def rounded() -> list[LayerPlan]:
        if dtype == "int8":
            return plan_int8(model, plans, float32)
        return plan_bfloat16(plans, float32)

    scales = _input_scales(model, rounded(), calibration)
    # Weights are rounded whole, as they are saved, and left out of afterwards.
    if is_shrunk(model):
        unshrink_(model)
        plans = plan_packing(model, block_shape)
    plans = [
        _decide(plan.with_input_scales(scales), min_gain, tokens) for plan in rounded()
    ]
    _build(model, plans)
    removed = shrink_(model) if shrink else []
    return [plan.again(model) if removed else plan for plan in plans], removed


def _input_scales(
    model: nn.Module,
    plans: list[LayerPlan],
    calibration: Iterable[Any] | Mapping[str, float] | None,
) -> Mapping[str, float]:
    """By the names of layers, known or found."""
    if calibration is None:
        return {}
    if not _is_scales(calibration):
        names = [plan.names[0] for plan in plans if plan.report.dtype == "int8"]
        return calibrate(model, calibration, names)
    scales: Mapping[str, float] = calibration  # type: ignore[assignment]
    known = {name for plan in plans for name in plan.names}
    for name, scale in scales.items():
        if name not in known:
            raise ValueError(
                f"calibration gives an input scale for '{name}', which is no linear "
                "layer of this model"
            )
        ops.check_input_scale(scale)
    return scales


def _is_scales(calibration: Any) -> bool:
    if not isinstance(calibration, Mapping):
        return False
    if not all(isinstance(scale, float) for scale in calibration.values()):
        raise TypeError(
            "calibration must be a list of inputs, or input scales by name; got one "
            "mapping: put the inputs of the model into a list"
        )
    return True


def _build(model: nn.Module, plans: list[LayerPlan]) -> None:
    shared: dict[tuple[int, str], BlockSparseLinear] = {}
    # All before the first is placed, so that an error leaves the model as it was.
    layers = [(plan, plan.build(shared)) for plan in plans if plan.report.packed]
    for plan, layer in layers:
        for name in plan.names:
            model.set_submodule(name, layer)


def unpack_(model: nn.Module) -> nn.Module:
    """Turn every ``BlockSparseLinear`` back into ``nn.Linear``, in place; the model.

    Neurons and heads that ``pack_`` left out are back.
    """
    unfuse_encoders_(model)
    unfuse_(model)
    dense: dict[int, nn.Linear] = {}
    weights: dict[int, Any] = {}
    places = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BlockSparseLinear)
    ]
    for name, module in places:
        if id(module) not in dense:
            linear = dense[id(module)] = module.to_linear()
            # Linears that shared a weight share it again.
            values = id(module.weight_values)
            linear.weight = weights.setdefault(values, linear.weight)
        model.set_submodule(name, dense[id(module)])
    unshrink_(model)
    _tell(model)
    return model


def _check_options(model: nn.Module, dtype: str, min_gain: float, tokens: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "pack_ replaces layers inside a model and this model is one nn.Linear; use "
            "pybsp.nn.BlockSparseLinear.from_linear(linear, block_shape)"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be 'float32', 'bfloat16' or 'int8'; got {dtype!r}"
        )
    if not min_gain >= 0:
        raise ValueError(f"min_gain must be 0 or a positive ratio; got {min_gain!r}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer; got {tokens!r}")


def _decide(plan: LayerPlan, min_gain: float, tokens: int) -> LayerPlan:
    """Keep dense what would not be ``min_gain`` times faster packed."""
    report = plan.report
    if plan.linear is None or not report.packed or min_gain == 0:
        return plan
    assert report.block_shape is not None
    layer = (report.shape, report.block_shape, report.density, tokens)
    if report.dtype == "int8":
        cost = linear_cost(*layer, dtype="int8")
    else:
        cost = expected_cost(*layer, min_gain)
    report = replace(report, dense_us=cost.dense_us, sparse_us=cost.sparse_us)
    if cost.gain < min_gain:
        reason = f"packed would run {cost.gain:.2f}x as fast here, below {min_gain:g}x"
        report = replace(report, packed=False, reason=reason, dtype="float32")
    return replace(plan, report=report)


def _tell(model: nn.Module) -> None:
    for listener in listeners.values():
        listener(model)
