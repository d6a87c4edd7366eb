"""What is saved from, and loaded into, modules that ``shrink_`` made smaller.

Their ``state_dict`` has the stock shapes, with zeros for what was left out, and loads
into any stock model. ``load_state_dict`` takes stock shapes, dense or packed, and
refuses weights that need what is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..matrix import BlockSparseMatrix
from .chains import Chain, layers, spare
from .linear import FIELDS, BlockSparseLinear

#: Attribute of an owner whose chain was made smaller.
RECORD = "_pybsp_shrunk"


@dataclass(frozen=True)
class Shrunk:
    """How to put back what was left out of one owner."""

    chain: Chain  # as it was before
    kept: torch.Tensor  # the items that are left, in their order now
    counts: tuple[int, ...]
    handles: tuple[Any, ...]

    @property
    def inputs(self) -> torch.Tensor:
        """The inputs of the sink that are left."""
        within = torch.arange(self.chain.size)
        return (self.kept[:, None] * self.chain.size + within).flatten()

    def indices(self, path: str) -> tuple[torch.Tensor, int, int]:
        """What is left of a layer: indices, along which dimension, of how many."""
        chain = self.chain
        if path == chain.sink:
            return self.inputs, 1, chain.width
        parts = chain.parts // len(chain.sources)
        starts = torch.arange(parts)[:, None] * chain.width
        return (starts + self.inputs).flatten(), 0, parts * chain.width

    def stock_shape(
        self, path: str, layer: nn.Linear | BlockSparseLinear
    ) -> tuple[int, int]:
        _, dim, size = self.indices(path)
        shape = (layer.out_features, layer.in_features)
        return (size, shape[1]) if dim == 0 else (shape[0], size)

    def gather(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is left of a weight, or of the bias of a source."""
        indices, dim, _ = self.indices(path)
        return tensor.index_select(dim, indices.to(tensor.device))

    def expand(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse, zero elsewhere."""
        indices, dim, size = self.indices(path)
        shape = list(tensor.shape)
        shape[dim] = size
        return tensor.new_zeros(shape).index_copy(
            dim, indices.to(tensor.device), tensor
        )


def fold(
    record: Shrunk,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    constants: torch.Tensor,
) -> torch.Tensor | None:
    """The sink's bias with the constants of what was left out."""
    constants = constants.index_fill(0, record.inputs, 0.0)
    inputs = constants.nonzero().flatten()
    if bias is None or not len(inputs):
        return bias
    added = weight[:, inputs].double() @ constants[inputs]
    return (bias.detach().double() + added).to(bias.dtype)


def expand_state(
    owner: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any
) -> None:
    record = getattr(owner, RECORD)
    for path in (*record.chain.sources, record.chain.sink):
        names = ("weight",) if path == record.chain.sink else ("weight", "bias")
        for key in (f"{prefix}{path}.{name}" for name in names):
            if key in state_dict:
                state_dict[key] = record.expand(path, state_dict[key])


def gather_state(
    owner: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Take stock shapes, as ``shrink_`` would; an error if something gone is needed."""
    record: Shrunk = getattr(owner, RECORD)
    chain = record.chain
    dense = {}
    for path, layer in layers(owner, chain).items():
        shape = record.stock_shape(path, layer)
        weight = _dense_weight(state_dict, f"{prefix}{path}.", shape)
        if weight is not None:
            dense[path] = weight
    if chain.sink in dense:
        message = _fold_constants(owner, record, state_dict, prefix, dense)
        if message is not None:
            rest[-1].append(message)
    for path, weight in dense.items():
        for field in FIELDS:
            state_dict.pop(f"{prefix}{path}.{field}", None)
        state_dict[f"{prefix}{path}.weight"] = record.gather(path, weight)
    for path in chain.sources:
        bias = state_dict.get(f"{prefix}{path}.bias")
        if bias is not None and len(bias) == record.indices(path)[2]:
            state_dict[f"{prefix}{path}.bias"] = record.gather(path, bias)


def _fold_constants(
    owner: nn.Module,
    record: Shrunk,
    state_dict: dict[str, Any],
    prefix: str,
    dense: Mapping[str, torch.Tensor],
) -> str | None:
    """Constants of what is gone go into the bias that is loaded, as in ``shrink_``.

    The message of the error when something else that is gone is needed.
    """
    chain = record.chain
    biases: list[torch.Tensor | None] = []
    for path, layer in layers(owner, chain).items():
        bias = state_dict.get(f"{prefix}{path}.bias")
        if bias is None and layer.bias is None and path in dense:
            bias = torch.zeros(len(dense[path]))
        biases.append(bias)
    sink, key = dense[chain.sink], f"{prefix}{chain.sink}.bias"
    zero_rows = torch.zeros(chain.parts * chain.width, dtype=torch.bool)
    values = torch.zeros(len(zero_rows), dtype=torch.float64)
    sources = [bias for bias in biases[:-1] if bias is not None]
    if len(dense) == len(biases) and len(sources) == len(chain.sources):
        zero_rows = torch.cat([(dense[path] == 0).all(1) for path in chain.sources])
        values = torch.cat([bias.double() for bias in sources])
    items, constants = spare(
        chain, zero_rows, values, (sink == 0).all(0), key in state_dict
    )
    needed = int((~items.index_fill(0, record.kept, True)).sum())
    if needed:
        return (
            f"{prefix}{chain.sink}.weight: needs {needed} {chain.kind} that packing "
            "left out because nothing needed them then; call pybsp.nn.unpack_ on the "
            "model first"
        )
    if key in state_dict:
        state_dict[key] = fold(record, sink, state_dict[key], constants)
    return None


def _dense_weight(
    state_dict: Mapping[str, Any], prefix: str, shape: tuple[int, int]
) -> torch.Tensor | None:
    """The weight in ``state_dict``, stored dense or packed, if it has this shape."""
    weight = state_dict.get(f"{prefix}weight")
    if weight is None and all(prefix + field in state_dict for field in FIELDS):
        values, crow_indices, col_indices = (state_dict[prefix + f] for f in FIELDS)
        try:
            matrix = BlockSparseMatrix(crow_indices, col_indices, values, shape)
        except (TypeError, ValueError):
            return None  # The layer itself says what is wrong with them.
        weight = matrix.to_dense()
    return weight if weight is not None and tuple(weight.shape) == shape else None
