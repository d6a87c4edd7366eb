"""Train the kept blocks alone: packed layers in place of dense ones with zero blocks.

Forward, backward and optimizer then cost what the kept blocks do. The optimizer goes on
as it was: the packed parameter takes the place of the dense weight in its group, and
its state (the moments of Adam) is gathered to the kept blocks. What is saved meanwhile
stays dense, the model's ``state_dict`` and the optimizer's alike, so that a checkpoint
can be resumed with or without this.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..blocks import BlockShape, BlockShapeSpec
from ..matrix import BlockSparseMatrix
from ..pruning.hooks import inner_optimizer
from ..pruning.pruner import BlockPruner
from ..reference import block_row_indices, block_sparse_to_dense
from .linear import BlockSparseLinear
from .plan import plan_packing, why_not_packed

#: Optimizers that treat every weight by itself, so that leaving out zero ones changes
#: nothing for the others.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


@dataclass(frozen=True)
class _Swapped:
    """One layer: what it was, what stands there now, and which blocks it keeps."""

    name: str
    linear: nn.Linear
    packed: BlockSparseLinear
    values: nn.Parameter
    mask: torch.Tensor
    block_shape: BlockShape

    @property
    def shape(self) -> torch.Size:
        return self.linear.weight.shape

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """The kept blocks of a tensor of the weight's shape."""
        return BlockSparseMatrix.from_mask(dense, self.mask, self.block_shape).values

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse, zero elsewhere."""
        return block_sparse_to_dense(
            self.packed.weight_crow_indices, self.packed.weight_col_indices,
            values, (self.shape[0], self.shape[1]),
        )  # fmt: skip


class PackedTraining:
    """Handle of ``pack_for_training_``; ``unpack()`` (or leaving ``with``) ends it."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, swapped: list[_Swapped]
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._swapped = swapped
        for entry in swapped:
            model.set_submodule(entry.name, entry.packed)
            _move(optimizer, entry.linear.weight, entry.values, entry.gather)
        self._handles = [
            optimizer.register_state_dict_post_hook(self._save_dense),
            optimizer.register_load_state_dict_pre_hook(self._load_dense),
        ]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the layers that train packed."""
        return tuple(entry.name for entry in self._swapped)

    @torch.no_grad()
    def unpack(self) -> None:
        """Put the dense layers back, with the trained blocks and zeros elsewhere; the
        optimizer goes on with them. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for entry in self._swapped:
            linear, packed = entry.linear, entry.packed
            linear.weight.copy_(packed.weight)
            linear.weight.requires_grad_(packed.weight_values.requires_grad)
            if packed.bias is not linear.bias:
                linear.bias = packed.bias  # type: ignore[assignment]
            linear.pybsp_block_shape = entry.block_shape  # type: ignore[assignment]
            linear.train(packed.training)
            self._model.set_submodule(entry.name, linear)
            _move(self._optimizer, entry.values, linear.weight, entry.expand)
        self._swapped, self._handles = [], []

    def __enter__(self) -> PackedTraining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpack()

    def _save_dense(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._with_states(state_dict, lambda entry: entry.values.shape, "expand")

    def _load_dense(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return self._with_states(state_dict, lambda entry: entry.shape, "gather")

    def _with_states(
        self, state_dict: dict[str, Any], shape: Any, change: str
    ) -> dict[str, Any]:
        """A copy of ``state_dict`` with the state of the packed layers changed."""
        entries = {id(entry.values): entry for entry in self._swapped}
        states = dict(state_dict["state"])
        parameters = [p for g in self._optimizer.param_groups for p in g["params"]]
        for index, parameter in enumerate(parameters):
            entry = entries.get(id(parameter))
            if entry is not None and index in states:
                states[index] = {
                    key: getattr(entry, change)(value)
                    if isinstance(value, torch.Tensor) and value.shape == shape(entry)
                    else value
                    for key, value in states[index].items()
                }
        return {**state_dict, "state": states}


def pack_for_training_(
    model: nn.Module, optimizer: Any, block_shape: BlockShapeSpec | None = None
) -> PackedTraining:
    """Replace, in place, every ``nn.Linear`` with zero blocks that ``optimizer`` trains
    by a packed layer whose kept blocks train on.

    Zero blocks stay zero, as under ``preserve_sparsity``, and cost nothing. A layer
    that ``pack_`` would leave dense is left as it is. The handle that is returned gives
    the dense layers back. Clipping by norm sees the gradients of the kept blocks only.
    Code that took the list of parameters before (and not, as most loops do, in every
    step) still holds the dense weights: take it again.

    Parameters
    ----------
    model : float32 on the CPU; not wrapped in DistributedDataParallel or compiled.
    optimizer : one of torch's that treats every weight by itself (SGD, Adam, AdamW and
        their kin), possibly wrapped by accelerate.
    block_shape : as for ``pack_``.

    Raises ``ValueError`` before anything is changed.
    """
    check_optimizer(optimizer)
    check_model(model)
    held = {id(p) for g in inner_optimizer(optimizer).param_groups for p in g["params"]}
    masks: dict[str, tuple[torch.Tensor, BlockShape]] = {}
    for plan in plan_packing(model, block_shape):
        if plan.linear is None or not plan.report.packed:
            continue
        if id(plan.linear.weight) not in held:
            continue
        matrix = plan.matrix()
        masks[plan.names[0]] = (_kept_blocks(matrix), matrix.block_shape)
    if not masks:
        raise ValueError(
            "the optimizer trains none of the layers with zero blocks; build it from "
            "model.parameters() of this very model"
        )
    return swap(model, optimizer, masks)


def swap(
    model: nn.Module,
    optimizer: Any,
    masks: Mapping[str, tuple[torch.Tensor, BlockShape]],
) -> PackedTraining:
    """Pack the linear layers named, keeping the blocks where their mask is True."""
    check_optimizer(optimizer)
    check_layers(model, list(masks))
    inner = inner_optimizer(optimizer)
    swapped = []
    for name, (mask, block_shape) in masks.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _check_state(inner, name, linear.weight)
        matrix = BlockSparseMatrix.from_mask(linear.weight, mask, block_shape)
        packed = BlockSparseLinear(matrix)
        packed.bias = linear.bias
        packed.train(linear.training)
        values = packed.weight_values
        assert isinstance(values, nn.Parameter)
        values.requires_grad_(linear.weight.requires_grad)
        swapped.append(_Swapped(name, linear, packed, values, mask, block_shape))
    return PackedTraining(model, inner, swapped)


def check_optimizer(optimizer: Any) -> None:
    """``ValueError`` for an optimizer that relates weights to each other."""
    inner = inner_optimizer(optimizer)
    if not isinstance(inner, _ELEMENTWISE):
        raise ValueError(
            f"packed training needs an optimizer that treats every weight by itself; "
            f"{type(inner).__name__} is not known to: use AdamW, Adam or SGD, or train "
            "with masks"
        )


def check_model(model: nn.Module) -> None:
    """``ValueError`` for a model whose layers cannot be exchanged while it trains."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"layers inside {type(model).__name__} cannot be exchanged while it trains;"
            " pack the model before it is wrapped, or train with masks"
        )
    distributed = torch.distributed
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise ValueError(
            "packed training runs in one process; this is one of "
            f"{distributed.get_world_size()}: train with masks instead"
        )


def check_layers(model: nn.Module, names: list[str]) -> None:
    """``ValueError`` when one of the linear layers cannot be packed for training."""
    check_model(model)
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        reason = why_not_packed(model, (name,), linear)
        if len(users[id(weight)]) > 1:
            other = next(user for user in users[id(weight)] if user != name)
            reason = f"its weight is shared with '{other}'"
        elif weight.device.type != "cpu":
            reason = f"its weight is on {weight.device}"
        elif weight._backward_hooks or weight._post_accumulate_grad_hooks:
            reason = "its weight has gradient hooks"
        if reason is not None:
            raise ValueError(
                f"'{name}' cannot train packed: {reason}; train with masks instead"
            )


def _check_state(optimizer: Optimizer, name: str, weight: torch.Tensor) -> None:
    for key, value in optimizer.state.get(weight, {}).items():
        if not isinstance(value, torch.Tensor) or value.numel() <= 1:
            continue
        if value.shape != weight.shape:
            raise ValueError(
                f"the optimizer's {key} of '{name}' has shape {tuple(value.shape)} and "
                f"the weight {tuple(weight.shape)}; only state of the weight's own "
                "shape can be packed: train with masks"
            )


def _kept_blocks(matrix: BlockSparseMatrix) -> torch.Tensor:
    rows, cols = matrix.block_shape
    mask = torch.zeros(
        matrix.shape[0] // rows, matrix.shape[1] // cols, dtype=torch.bool
    )
    row_indices = block_row_indices(matrix.crow_indices, matrix.col_indices)
    mask[row_indices, matrix.col_indices.long()] = True
    return mask


def _move(
    optimizer: Optimizer, old: torch.Tensor, new: torch.Tensor, change: Any
) -> None:
    """Let ``new`` take the place of ``old``, with its gradient and state changed."""
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    new.grad = None if old.grad is None else change(old.grad)
    old.grad = None
    if old in optimizer.state:
        optimizer.state[new] = {
            key: change(value)
            if isinstance(value, torch.Tensor) and value.shape == old.shape
            else value
            for key, value in optimizer.state.pop(old).items()
        }


# The pruner lies below this module and exchanges its layers through it.
BlockPruner.packing = sys.modules[__name__]
