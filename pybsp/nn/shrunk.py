"""What is saved from, and loaded into, modules that ``shrink_`` made smaller.

Their ``state_dict`` is, bit by bit, what it was before: what was left out is kept
aside, nonzeros only, and put back. ``load_state_dict`` takes stock shapes, dense or
packed, keeps aside what it must, and refuses weights that need what is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..matrix import BlockSparseMatrix
from .chains import Chain, layers, spare
from .linear import FIELDS, SCALES, BlockSparseLinear

#: Attribute of an owner whose chain was made smaller.
RECORD = "_pybsp_shrunk"


@dataclass(frozen=True)
class _Nonzeros:
    """A tensor of which most may be zero."""

    shape: torch.Size
    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Nonzeros:
        positions = tensor.flatten().nonzero().flatten()
        values = tensor.flatten()[positions].clone()
        small = tensor.numel() <= torch.iinfo(torch.int32).max
        return cls(tensor.shape, positions.int() if small else positions, values)

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The tensor, of the type of ``other`` and where that is."""
        flat = other.new_zeros(self.shape.numel())
        positions = self.positions.to(other.device, torch.int64)
        return flat.index_copy_(0, positions, self.values.to(flat)).view(self.shape)


@dataclass
class Shrunk:
    """What was left out of one owner, and how to put it back."""

    chain: Chain  # as it was before
    kept: torch.Tensor  # the items that are left, in their order now
    counts: tuple[int, ...] = ()
    handles: tuple[Any, ...] = ()
    #: By layer and tensor: the rows or columns that are gone.
    aside: dict[tuple[str, str], _Nonzeros] = field(default_factory=dict)
    #: The sink's bias before and after it took up constants.
    biases: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def inputs(self) -> torch.Tensor:
        """The inputs of the sink that are left."""
        within = torch.arange(self.chain.size)
        return (self.kept[:, None] * self.chain.size + within).flatten()

    def indices(self, path: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What is left of a layer, what is gone, and along which dimension."""
        chain = self.chain
        if path == chain.sink:
            left, dim, size = self.inputs, 1, chain.width
        else:
            parts = chain.parts // len(chain.sources)
            starts = torch.arange(parts)[:, None] * chain.width
            left, dim = (starts + self.inputs).flatten(), 0
            size = parts * chain.width
        gone = torch.ones(size, dtype=torch.bool).index_fill(0, left, False)
        return left, gone.nonzero().flatten(), dim

    def stock_shape(
        self, path: str, layer: nn.Linear | BlockSparseLinear
    ) -> tuple[int, int]:
        left, gone, dim = self.indices(path)
        size = len(left) + len(gone)
        return (size, layer.in_features) if dim == 0 else (layer.out_features, size)

    def take(
        self,
        tensors: Mapping[tuple[str, str], torch.Tensor],
        constants: torch.Tensor,
    ) -> dict[tuple[str, str], torch.Tensor]:
        """The tensors that are left of stock ones; keeps aside what is not.

        ``constants`` replace inputs of the sink, those that are gone.
        """
        result = {}
        for (path, name), tensor in tensors.items():
            if (path, name) == (self.chain.sink, "bias"):
                weight = tensors[path, "weight"]
                result[path, name] = self._fold(weight, tensor, constants)
                continue
            if (path, name) == (self.chain.sink, SCALES):
                result[path, name] = tensor
                continue
            left, gone, dim = self.indices(path)
            self.aside[path, name] = _Nonzeros.of(tensor.index_select(dim, gone))
            result[path, name] = tensor.index_select(dim, left)
        return result

    def _fold(
        self, weight: torch.Tensor, bias: torch.Tensor, constants: torch.Tensor
    ) -> torch.Tensor:
        """The sink's bias with the constants of what is gone."""
        self.biases = None
        constants = constants.index_fill(0, self.inputs, 0.0)
        inputs = constants.nonzero().flatten()
        if not len(inputs):
            return bias
        added = weight[:, inputs].double() @ constants[inputs]
        folded = (bias.double() + added).to(bias.dtype)
        self.biases = (bias.clone(), folded)
        return folded

    def put_back(self, path: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The stock tensor of which ``tensor`` is left."""
        if (path, name) == (self.chain.sink, "bias"):
            if self.biases is None:
                return tensor
            before, folded = (bias.to(tensor.device).double() for bias in self.biases)
            return (before + (tensor.double() - folded)).to(tensor.dtype)
        if (path, name) == (self.chain.sink, SCALES):
            return tensor
        left, gone, dim = self.indices(path)
        shape = list(tensor.shape)
        shape[dim] = len(left) + len(gone)
        whole = tensor.new_zeros(shape).index_copy(dim, left.to(tensor.device), tensor)
        aside = self.aside[path, name].like(tensor)
        return whole.index_copy(dim, gone.to(tensor.device), aside)


def tensors_of(owner: nn.Module, chain: Chain) -> dict[tuple[str, str], torch.Tensor]:
    """The weights and biases of a chain, dense, by layer and name, and the scales of
    int8 weights."""
    tensors = {}
    for path, layer in layers(owner, chain).items():
        tensors[path, "weight"] = layer.weight.detach()
        if isinstance(layer, BlockSparseLinear) and layer.weight_scales is not None:
            tensors[path, SCALES] = layer.weight_scales
        if layer.bias is not None:
            tensors[path, "bias"] = layer.bias.detach()
    return tensors


def expand_state(
    owner: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any
) -> None:
    """Hook of ``owner``: stock tensors in its ``state_dict``."""
    record: Shrunk = getattr(owner, RECORD)
    for path in (*record.chain.sources, record.chain.sink):
        for name in ("weight", "bias"):
            key = f"{prefix}{path}.{name}"
            if key in state_dict:
                state_dict[key] = record.put_back(path, name, state_dict[key])


def gather_state(
    owner: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Hook of ``owner``: take stock tensors, as ``shrink_`` would."""
    record: Shrunk = getattr(owner, RECORD)
    chain = record.chain
    # What is not in the state stays as it is.
    tensors = {
        (path, name): record.put_back(path, name, tensor)
        for (path, name), tensor in tensors_of(owner, chain).items()
    }
    given = {}
    for path, layer in layers(owner, chain).items():
        shape = record.stock_shape(path, layer)
        weight = _dense_weight(state_dict, f"{prefix}{path}.", shape)
        bias = state_dict.get(f"{prefix}{path}.bias")
        if weight is not None:
            given[path, "weight"] = weight
        if (path, "bias") in tensors and bias is not None and len(bias) == shape[0]:
            given[path, "bias"] = bias
    tensors.update(given)
    items, constants = spare_items(chain, tensors)
    needed = int((~items.index_fill(0, record.kept, True)).sum())
    if needed:
        rest[-1].append(
            f"{prefix}{chain.sink}.weight: needs {needed} {chain.kind} that packing "
            "left out because nothing needed them then; call pybsp.nn.unpack_ on the "
            "model first"
        )
        return
    before = record.biases
    left = record.take(tensors, constants)
    if before is not None or record.biases is not None:
        given[chain.sink, "bias"] = left[chain.sink, "bias"]
    for path, name in given:
        if name == "weight":
            for part in (*FIELDS, SCALES):
                state_dict.pop(f"{prefix}{path}.{part}", None)
        state_dict[f"{prefix}{path}.{name}"] = left[path, name]


def spare_items(
    chain: Chain, tensors: Mapping[tuple[str, str], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``chains.spare`` for the stock tensors of a chain."""
    weights = [tensors[path, "weight"] for path in chain.sources]
    none = torch.zeros(len(weights[0]))
    biases = [tensors.get((path, "bias"), none) for path in chain.sources]
    return spare(
        chain,
        torch.cat([(weight == 0).all(1) for weight in weights]),
        torch.cat([bias.double() for bias in biases]),
        (tensors[chain.sink, "weight"] == 0).all(0),
        (chain.sink, "bias") in tensors,
    )


def _dense_weight(
    state_dict: Mapping[str, Any], prefix: str, shape: tuple[int, int]
) -> torch.Tensor | None:
    """The weight in ``state_dict``, stored dense or packed, if it has this shape."""
    weight = state_dict.get(f"{prefix}weight")
    if weight is None and all(prefix + name in state_dict for name in FIELDS):
        values, crow_indices, col_indices = (state_dict[prefix + n] for n in FIELDS)
        try:
            scales = state_dict.get(prefix + SCALES)
            matrix = BlockSparseMatrix(crow_indices, col_indices, values, shape, scales)
        except (TypeError, ValueError):
            return None  # The layer itself says what is wrong with them.
        weight = matrix.to_dense()
    return weight if weight is not None and tuple(weight.shape) == shape else None
