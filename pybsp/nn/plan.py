"""Which linear layers of a model have zero blocks, and in which block shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..blocks import (
    BlockShape,
    BlockShapeSpec,
    block_view,
    check_block_shape_spec,
    resolve_block_shape,
)
from ..matrix import BlockSparseMatrix
from ..pruning.names import is_among
from ..pruning.record import by_layer
from .detect import detect_block_shape
from .linear import FIELDS, SCALES, BlockSparseLinear
from .report import LayerReport


class NothingToPack(ValueError):
    """The model has no layer with zero blocks."""


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer, every name it has in the model, and what to do with it.

    ``linear`` is None for a layer that is ``packed`` already. ``fixed``: something
    needs it to be an ``nn.Linear``.
    """

    names: tuple[str, ...]
    linear: nn.Linear | None
    report: LayerReport
    packed: BlockSparseLinear | None = None
    fixed: bool = False

    def matrix(self) -> BlockSparseMatrix:
        if self.packed is not None:
            return self.packed.matrix
        assert self.linear is not None
        assert self.report.block_shape is not None
        return BlockSparseMatrix.from_dense(self.linear.weight, self.report.block_shape)

    def again(self, model: nn.Module) -> LayerPlan:
        """The plan for the layer as it is after ``shrink_``, in the same blocks."""
        layer = model.get_submodule(self.names[0])
        if isinstance(layer, BlockSparseLinear):
            report = replace(
                _report_packed(self.names[0], layer),
                dense_us=self.report.dense_us,
                sparse_us=self.report.sparse_us,
            )
            if self.linear is not None:
                report = replace(report, reason=self.report.reason)
            return replace(self, report=report, packed=layer)
        assert isinstance(layer, nn.Linear)
        if layer is self.linear and self.report.shape == tuple(layer.weight.shape):
            return self
        if self.report.packed:
            report = _inspect(self.names[0], layer, self.report.block_shape)
        else:
            report = _report_dense(self.names[0], layer)
            report = replace(report, reason=self.report.reason)
        return replace(self, linear=layer, report=report, packed=None)

    def with_input_scales(self, scales: Mapping[str, float]) -> LayerPlan:
        """The plan with the input scale that one of its names has, if it is int8."""
        found = [scales[name] for name in self.names if name in scales]
        if not found or self.report.dtype != "int8":
            return self
        return replace(self, report=replace(self.report, input_scale=found[0]))

    def build(
        self, shared: dict[tuple[int, str], BlockSparseLinear]
    ) -> BlockSparseLinear:
        """The packed layer; weights that linears of one type share stay shared."""
        if self.packed is not None:
            if self.report.dtype == self.packed.dtype != "int8":
                return self.packed
            weight: torch.Tensor = self.packed.weight_values
            scale = self.report.input_scale if self.report.dtype == "int8" else None
            layer = self.packed.quantize(scale, self.report.dtype)
        else:
            assert self.linear is not None
            assert self.report.block_shape is not None
            weight = self.linear.weight
            layer = BlockSparseLinear.from_linear(
                self.linear, self.report.block_shape, None, self.report.dtype,
                self.report.input_scale or None,
            )  # fmt: skip
        first = shared.setdefault((id(weight), self.report.dtype), layer)
        if first is not layer:
            for name in (*FIELDS, SCALES):
                setattr(layer, name, getattr(first, name))
        return layer


def plan_packing(
    model: nn.Module, block_shape: BlockShapeSpec | None = None
) -> list[LayerPlan]:
    """A plan for each distinct linear layer: packed where it has zero blocks.

    Changes nothing and measures nothing. ``ValueError`` when no layer has zero blocks.
    """
    if block_shape is not None:
        check_block_shape_spec(block_shape)
    recorded = recorded_block_shapes(model)
    foreign = _weights_used_elsewhere(model)
    plans = []
    for names, module in _linear_layers(model):
        if isinstance(module, BlockSparseLinear):
            report = _report_packed(names[0], module)
            plans.append(LayerPlan(names, None, report, module))
            continue
        reason = why_not_packed(model, names, module)
        fixed = True
        if type(module) is nn.Linear and id(module.weight) in foreign:
            reason = "its weight is tied to another kind of layer"
        if reason is None:
            spec = block_shape or getattr(module, "pybsp_block_shape", None)
            spec = spec or recorded(names[0])
            report = _inspect(names[0], module, spec)
            fixed = False
        else:
            report = replace(_report_dense(names[0], module), reason=reason)
        plans.append(LayerPlan(names, module, report, fixed=fixed))
    if not any(plan.report.packed for plan in plans):
        raise NothingToPack(_nothing_found(model, plans, block_shape))
    return plans


def plan_int8(
    model: nn.Module, plans: list[LayerPlan], float32: str | tuple[str, ...] = ()
) -> list[LayerPlan]:
    """``plans`` with int8 weights, of more layers: those without zero blocks too, in
    the blocks of most others, where they stand in one ``nn.ModuleList`` with layers
    that have some. Heads and poolers, which do not, stay float32, and the modules that
    ``float32`` names."""
    packed = [plan for plan in plans if plan.report.packed]
    stacks = {stack for plan in packed for stack in _stacks(model, plan.names)}
    usual = Counter(plan.report.block_shape for plan in packed).most_common(1)[0][0]
    return [
        plan
        if any(is_among(name, float32) for name in plan.names)
        else _as_int8(plan, usual if stacks & _stacks(model, plan.names) else None)
        for plan in plans
    ]


def plan_bfloat16(
    plans: list[LayerPlan], float32: str | tuple[str, ...] = ()
) -> list[LayerPlan]:
    """``plans`` with bfloat16 weights where they were float32 and are packed, but for
    the modules that ``float32`` names."""
    return [
        plan
        if any(is_among(name, float32) for name in plan.names)
        else _as_bfloat16(plan)
        for plan in plans
    ]


def _as_bfloat16(plan: LayerPlan) -> LayerPlan:
    report = plan.report
    if not report.packed or report.dtype != "float32":
        return plan
    weights = round(report.density * report.shape[0] * report.shape[1])
    size = report.packed_bytes - 2 * weights
    report = replace(report, dtype="bfloat16", packed_bytes=size, reason="")
    return replace(plan, report=report)


def _stacks(model: nn.Module, names: tuple[str, ...]) -> set[str]:
    """The outermost lists of layers in which a layer stands."""
    found = set()
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            if isinstance(model.get_submodule(path), nn.ModuleList):
                found.add(path)
                break
    return found


def _as_int8(plan: LayerPlan, usual: BlockShape | None) -> LayerPlan:
    report, rows = plan.report, plan.report.shape[0]
    if plan.packed is not None:
        if plan.packed.is_int8:
            return plan
    elif plan.fixed:
        return plan
    if (report.packed or usual is not None) and report.shape[1] > ops.max_int8_inputs():
        reason = f"8-bit products are exact up to {ops.max_int8_inputs()} inputs"
        return replace(plan, report=replace(report, reason=reason))
    if plan.packed is not None:
        # One byte for each weight, and a scale for each row.
        values = plan.packed.weight_values
        less = values.nbytes - values.numel() - 4 * rows
        smaller = replace(report, packed_bytes=report.packed_bytes - less, reason="")
        return replace(plan, report=replace(smaller, dtype="int8"))
    if not report.packed:
        if usual is None or plan.linear is None:
            return plan
        try:
            shape = resolve_block_shape(report.block_shape or usual, report.shape)
        except ValueError:
            return plan
        _check_packable(report.name, plan.linear.weight)
        report = _report_blocks(
            report, shape, block_view(plan.linear.weight != 0, shape).any(3).any(2)
        )
    weights = round(report.density * report.shape[0] * report.shape[1])
    size = report.packed_bytes - 3 * weights + 4 * rows
    report = replace(report, dtype="int8", packed_bytes=size, reason="")
    return replace(plan, report=report)


def planned_block_shapes(plans: list[LayerPlan]) -> dict[str, BlockShape]:
    """By the names of the layers that are to be packed."""
    return {
        name: plan.report.block_shape
        for plan in plans
        if plan.report.packed and plan.report.block_shape is not None
        for name in plan.names
    }


def recorded_block_shapes(model: nn.Module) -> Callable[[str], BlockShapeSpec | None]:
    """Look-up by layer name in ``model.config.quantization_config``."""
    record = getattr(getattr(model, "config", None), "quantization_config", None)
    if record is not None and not isinstance(record, Mapping):
        record = record.to_dict()
    if not record or record.get("quant_method") != "pybsp":
        return lambda name: None  # noqa: ARG005
    modules: dict[str, Any] = dict(record.get("modules") or {})
    default = record.get("block_shape") if not modules else None
    # A head model names the layers of its base model with a prefix.
    shapes = by_layer(modules, [n for names, _ in _linear_layers(model) for n in names])

    def look_up(name: str) -> BlockShapeSpec | None:
        shape = shapes.get(name, default)
        return shape and check_block_shape_spec(shape)

    return look_up


def _linear_layers(
    model: nn.Module,
) -> Iterator[tuple[tuple[str, ...], nn.Linear | BlockSparseLinear]]:
    """Every linear layer once, with all the names it goes by."""
    found: dict[int, tuple[list[str], nn.Linear | BlockSparseLinear]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, BlockSparseLinear)):
            found.setdefault(id(module), ([], module))[0].append(name)
    for names, module in found.values():
        yield tuple(names), module


def _weights_used_elsewhere(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        if type(module) is not nn.Linear
        for parameter in module._parameters.values()
        if parameter is not None
    }


def why_not_packed(
    model: nn.Module, names: tuple[str, ...], module: nn.Linear
) -> str | None:
    """Why this layer must stay an ``nn.Linear`` whatever its zeros, or None."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a linear layer of its own kind"
    if "forward" in vars(module) or any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ):
        return "it has hooks, which packing would lose"
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            return "torch's TransformerEncoderLayer reads the weight itself"
    return None


def _inspect(name: str, linear: nn.Linear, spec: BlockShapeSpec | None) -> LayerReport:
    """Whether ``linear`` has zero blocks, without timing anything."""
    report = _report_dense(name, linear)
    weight = linear.weight.detach()
    _check_place(name, weight)
    if not (weight == 0).any():
        return replace(report, reason="no zeros")
    shape: BlockShape | None
    if spec is None:
        shape = detect_block_shape(weight)
        if shape is None:
            return replace(report, reason="its zeros are scattered, not in blocks")
    else:
        try:
            shape = resolve_block_shape(spec, weight.shape)
        except ValueError as error:
            return replace(report, reason=str(error))
    kept = block_view(weight != 0, shape).any(3).any(2)
    if bool(kept.all()):
        return replace(report, block_shape=shape, reason="no zero blocks")
    _check_packable(name, weight)
    return _report_blocks(report, shape, kept)


def _report_blocks(
    report: LayerReport, shape: BlockShape, kept: torch.Tensor
) -> LayerReport:
    count = int(kept.sum())
    indices = 4 * (count + kept.shape[0] + 1)
    return replace(
        report,
        block_shape=shape,
        density=count / kept.numel(),
        packed_bytes=4 * count * shape[0] * shape[1] + indices,
        packed=True,
    )


def _check_place(name: str, weight: torch.Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(
            f"the weight of '{name}' is on {weight.device}; packing needs the model on "
            "the CPU: call model.cpu() first"
        )


def _check_packable(name: str, weight: torch.Tensor) -> None:
    if weight.dtype != torch.float32:
        raise ValueError(
            f"the weight of '{name}' is {weight.dtype}; packed layers compute in "
            "float32: call model.float() first"
        )
    if not ops.all_finite(weight):
        raise ValueError(
            f"the weight of '{name}' holds NaN or infinite values: check the training "
            "run or the checkpoint it came from"
        )


def _report_dense(name: str, linear: nn.Linear) -> LayerReport:
    shape = (linear.out_features, linear.in_features)
    size = 4 * shape[0] * shape[1]
    return LayerReport(name, shape, dense_bytes=size, packed_bytes=size)


def _report_packed(name: str, layer: BlockSparseLinear) -> LayerReport:
    shape = (layer.out_features, layer.in_features)
    return LayerReport(
        name,
        shape,
        dense_bytes=4 * shape[0] * shape[1],
        packed_bytes=layer.matrix.nbytes,
        block_shape=layer.block_shape,
        density=layer.density,
        packed=True,
        reason="was packed already",
        dtype=layer.dtype,
        input_scale=layer.static_scale,
    )


def _nothing_found(
    model: nn.Module, plans: list[LayerPlan], block_shape: BlockShapeSpec | None
) -> str:
    name = type(model).__name__
    if not plans:
        return f"{name} has no nn.Linear layers, so there is nothing to pack"
    shape = "" if block_shape is None else f" of shape {tuple(block_shape)}"
    example = plans[0].report
    return (
        f"none of the {len(plans)} linear layers of {name} has zero blocks{shape} "
        f"(for instance {example.name}: {example.reason}); prune it first with "
        "pybsp.BlockPruner or `pybsp prune`, or give the block_shape it was pruned with"
    )
