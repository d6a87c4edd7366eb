"""Move activations into the packed layer before them, and back.

The activation is then applied to results still in registers instead of in a pass of
its own over ``(tokens, intermediate)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..reference import ACTIVATIONS
from .linear import BlockSparseLinear

#: Feed-forward modules, known by exactly these children: which layer the activation
#: follows immediately, and the attribute of the activation.
_ARCHITECTURES = (
    # BERT, RoBERTa, ELECTRA, ViT and others: Intermediate
    ({"dense", "intermediate_act_fn"}, "dense", "intermediate_act_fn"),
    # DistilBERT: FFN
    ({"lin1", "lin2", "activation", "dropout"}, "lin1", "activation"),
)


class FusedActivation(nn.Identity):
    """Stands where an activation was that a packed layer computes now."""

    def __init__(self, original: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        # A tuple, so that nn.Module does not register the original as a child.
        self._original = (original,)

    @property
    def original(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._original[0]


def fuse_(model: nn.Module) -> list[str]:
    """Fuse activations where the architecture is known; names of the layers changed.

    Only relu, gelu, its tanh form and silu are fused, and only into packed layers.
    """
    fused = []
    # A layer that two modules share would compute the activation for both.
    owners = Counter(
        id(child) for module in model.modules() for child in module.children()
    )
    for name, parent in model.named_modules():
        for children, layer_name, activation_name in _ARCHITECTURES:
            # A plain function as the activation is an attribute and not a child.
            if {*parent._modules, activation_name} != children:
                continue
            layer = getattr(parent, layer_name)
            original = getattr(parent, activation_name, None)
            if (
                isinstance(layer, BlockSparseLinear)
                and layer.activation is None
                and owners[id(layer)] == 1
                and original is not None
                and (activation := activation_of(original)) is not None
            ):
                layer.activation = activation
                setattr(parent, activation_name, FusedActivation(original))
                fused.append(f"{name}.{layer_name}" if name else layer_name)
    return fused


def unfuse_(model: nn.Module) -> None:
    """Undo ``fuse_``."""
    for parent in model.modules():
        for _, layer_name, activation_name in _ARCHITECTURES:
            stand_in = parent._modules.get(activation_name)
            if isinstance(stand_in, FusedActivation):
                getattr(parent, layer_name).activation = None
                # A plain function may not take the place of a child module.
                delattr(parent, activation_name)
                setattr(parent, activation_name, stand_in.original)


def activation_of(function: Any) -> str | None:
    """Which of the fusable activations ``function`` computes, found by calling it.

    Compared on -40 to 40, where every pair of them differs by more than the rounding
    of any of their formulas.
    """
    if not callable(function) or isinstance(function, FusedActivation):
        return None
    if isinstance(function, nn.Module) and (
        function._forward_hooks or function._forward_pre_hooks
    ):
        return None
    # The first call of MKL's vector functions in a process, made by several threads at
    # once, can be wrong by 4e-4 (github.com/pytorch/pytorch 188792). Here one makes it.
    torch.erf(torch.zeros(1))
    probe = torch.linspace(-40.0, 40.0, 4001)
    with torch.no_grad():
        result = function(probe.clone())  # it may work in place
        if not isinstance(result, torch.Tensor) or result.shape != probe.shape:
            return None
        for name, formula in ACTIVATIONS.items():
            activation: Callable[[torch.Tensor], torch.Tensor] = formula
            if name is not None and torch.allclose(
                result, activation(probe), rtol=1e-6, atol=2e-6
            ):
                return name
    return None
