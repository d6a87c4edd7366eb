"""Leave out, physically, the neurons and heads that the result does not need.

A neuron or head is *spare* when its columns of the projection that follows are zero, or
when what it puts there is a constant: a neuron whose row is zero computes
``activation(bias)``, a head whose value rows are zero its value bias, because attention
weights add up to one. Leaving out the first kind changes nothing. Constants go, times
their columns, into the bias of the projection, computed in float64 and rounded once:
exact up to that rounding, for inference (dropout would break the sum) and for queries
that see anything at all. Without a bias there only the constant zero is spare.

What is left must still be made of blocks, and of no more of them than before. Rows of
``up`` in one block share their kept columns, so dropping a single row from ``(8, 1)``
blocks would shift all others across the boundaries and keep more blocks than before.
Therefore neurons move in groups, the larger of the two extents that the blocks of
``up`` and ``down`` have along them. Groups of only spare neurons go. Of the others that
hold spare ones, several whose neurons in use fit into one group become one: it keeps
the union of their blocks, which is at most the sum. Spare neurons of these fill up what
remains. Within a group whatever shares a smaller block stays together. With heads it is
the same; they are seldom smaller than a block. One group stays in any case, and a
multiple of 8 neurons remains where it was one.

Only the model in memory shrinks: see ``shrunk`` for what is saved and loaded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ..blocks import BlockShape
from ..matrix import BlockSparseMatrix
from ..reference import block_row_indices
from .chains import Chain, find_chains, layers, spare
from .linear import SCALES, BlockSparseLinear
from .shrunk import RECORD, Shrunk, expand_state, gather_state, tensors_of

Model = TypeVar("Model", bound=nn.Module)

#: Neurons of dense layers are left out in multiples of this, the floats of a vector.
_MULTIPLE = 8


@dataclass(frozen=True)
class Removed:
    """What was left out of one module: neurons or heads, how many before and after."""

    name: str
    kind: str
    before: int
    after: int


def shrink_(
    model: nn.Module, block_shapes: Mapping[str, BlockShape] | None = None
) -> list[Removed]:
    """Leave out spare neurons and heads, in place, where the architecture is known.

    ``block_shapes`` are those that the linear layers will be packed in, by name. What
    is shared, has hooks or was shrunk before stays as it is.
    """
    removed = []
    for name, owner, chain in list(find_chains(model)):
        if RECORD in vars(owner):
            continue
        extents = []
        for path, layer in layers(owner, chain).items():
            full = f"{name}.{path}" if name else path
            shape = getattr(layer, "block_shape", (block_shapes or {}).get(full))
            extents.append((shape or (1, 1))[path == chain.sink])
        facts = _facts(owner, chain)
        items, constants = spare(chain, *facts)
        kept = layout(items, chain.size, extents)
        if len(kept) < chain.items:
            _remove(owner, chain, kept, constants)
            removed.append(Removed(name, chain.kind, chain.items, len(kept)))
    return removed


def unshrink_(model: nn.Module) -> None:
    """Give all layers their stock shapes again, with what was left out of them."""
    for owner in model.modules():
        record = vars(owner).get(RECORD)
        if record is None:
            continue
        for handle in record.handles:
            handle.remove()
        delattr(owner, RECORD)
        for path, layer in layers(owner, record.chain).items():
            weight = record.put_back(path, "weight", layer.weight.detach())
            bias = layer.bias
            if bias is not None:
                bias = record.put_back(path, "bias", bias.detach())
            scales = getattr(layer, SCALES, None)
            if scales is not None:
                scales = record.put_back(path, SCALES, scales)
            _resize(layer, owner, path, weight, bias, scales)
        for (path, name), value in zip(record.chain.counts, record.counts, strict=True):
            setattr(owner.get_submodule(path), name, value)


def is_shrunk(model: nn.Module) -> bool:
    """Whether something was left out of a part of ``model``."""
    return any(RECORD in vars(module) for module in model.modules())


def unshrunk(model: Model) -> Model:
    """``model``, or a copy with the stock shapes when something was left out of it."""
    if not is_shrunk(model):
        return model
    model = copy.deepcopy(model)
    unshrink_(model)
    return model


def stock_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``(out, in)`` that shrunken layers have elsewhere, by name."""
    shapes = {}
    for name, owner in model.named_modules():
        record = vars(owner).get(RECORD)
        if record is None:
            continue
        for path, layer in layers(owner, record.chain).items():
            shapes[f"{name}.{path}" if name else path] = record.stock_shape(path, layer)
    return shapes


def layout(spare: torch.Tensor, size: int, extents: list[int]) -> torch.Tensor:
    """Which items stay, in their new order: the rule in the docstring of the module.

    ``size``: rows of an item; ``extents``: of the blocks that lie along them.
    """
    everything = torch.arange(len(spare))
    group = math.lcm(size, *extents)
    unit = math.lcm(size, *(extent for extent in extents if extent != group))
    group, unit = group // size, unit // size
    if len(spare) % group or not spare.any():
        return everything
    used = (~spare).view(-1, group // unit, unit).any(2)
    counts = used.sum(1).tolist()
    capacity = group // unit
    # First fit, the fullest first; a group that is full stays alone.
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
        count = counts[index]
        if not count:
            break
        place = next((b for b, free in enumerate(room) if free >= count), None)
        if place is None:
            bins.append([index])
            room.append(capacity - count)
        else:
            bins[place].append(index)
            room[place] -= count
    gone = [index for index, count in enumerate(counts) if not count]
    multiple = _MULTIPLE if size == 1 and len(spare) % _MULTIPLE == 0 else 1
    while gone and (not bins or len(bins) * group % multiple):
        bins.append([gone.pop(0)])
    units = everything.view(-1, capacity, unit)
    kept = []
    for members in sorted(sorted(members) for members in bins):
        inside = units[members].flatten(0, 1)
        if len(members) > 1:
            busy = used[members].flatten()
            inside = torch.cat([inside[busy], inside[~busy]])[:capacity]
        kept.append(inside.flatten())
    return torch.cat(kept)


def _facts(
    owner: nn.Module, chain: Chain
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """What ``spare`` asks for."""
    *sources, sink = layers(owner, chain).values()
    biases = [
        torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        for layer in sources
    ]
    return (
        torch.cat([_zeros(layer, 0) for layer in sources]),
        torch.cat([bias.detach().double() for bias in biases]),
        _zeros(sink, 1),
        sink.bias is not None,
    )


def _zeros(layer: nn.Linear | BlockSparseLinear, dim: int) -> torch.Tensor:
    """Which rows (``dim`` 0) or columns (1) of the weight are zero."""
    if not isinstance(layer, BlockSparseLinear):
        return layer.weight.detach().abs().amax(1 - dim) == 0
    matrix = layer.matrix
    indices = matrix.col_indices.long()
    if dim == 0:
        indices = block_row_indices(matrix.crow_indices, indices)
    extent = matrix.block_shape[dim]
    found = (matrix.values.detach() != 0).any(2 - dim).int()
    counts = torch.zeros(matrix.shape[dim] // extent, extent, dtype=torch.int32)
    return counts.index_add_(0, indices, found).flatten() == 0


def _remove(
    owner: nn.Module, chain: Chain, kept: torch.Tensor, constants: torch.Tensor
) -> None:
    counts = tuple(
        getattr(owner.get_submodule(path), name) for path, name in chain.counts
    )
    handles = (
        owner.register_state_dict_post_hook(expand_state),  # type: ignore[no-untyped-call]
        owner.register_load_state_dict_pre_hook(gather_state),  # type: ignore[no-untyped-call]
    )
    record = Shrunk(chain, kept, counts, handles)
    setattr(owner, RECORD, record)
    left = record.take(tensors_of(owner, chain), constants)
    for path, layer in layers(owner, chain).items():
        _resize(
            layer, owner, path, left[path, "weight"], left.get((path, "bias")),
            left.get((path, SCALES)),
        )  # fmt: skip
    for (path, name), value in zip(chain.counts, counts, strict=True):
        setattr(owner.get_submodule(path), name, value * len(kept) // chain.items)


def _resize(
    layer: nn.Linear | BlockSparseLinear,
    owner: nn.Module,
    path: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:
    """Give a layer another weight and bias; dense if no zero block is left in it, but
    for bfloat16 weights, and int8 ones, which stay the same numbers by their
    ``scales``."""
    if bias is not None:
        trained = layer.bias is not None and layer.bias.requires_grad
        bias = nn.Parameter(bias, requires_grad=trained)
    if not isinstance(layer, BlockSparseLinear):
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.register_parameter("bias", bias)
        layer.out_features, layer.in_features = weight.shape
        return
    matrix = BlockSparseMatrix.from_dense(weight, layer.block_shape)
    if scales is not None:
        matrix = matrix.quantize_with(scales)
    elif layer.dtype == "bfloat16":
        matrix = matrix.quantize("bfloat16")
    packed = BlockSparseLinear(
        matrix,
        None,
        layer.activation,
        layer.static_scale if scales is not None else None,
    )
    packed.register_parameter("bias", bias)
    packed.weight_values.requires_grad_(layer.weight_values.requires_grad)
    packed.train(layer.training)
    dense = matrix.density == 1 and packed.activation is None and not packed.is_rounded
    owner.set_submodule(path, packed.to_linear() if dense else packed)
