"""Reading the modules of an encoder: whatever is not as expected is a ``Deviation``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ...ops import LinearSpec, NormSpec
from ..fuse import FusedActivation, activation_of
from ..linear import FIELDS, INPUT_SCALE, SCALES, BlockSparseLinear
from .watch import Slot, Watch


class Deviation(Exception):
    """Why the stock modules compute an encoder, or one call of it.

    ``quiet``: nothing to tell, as it is what the caller asked for.
    """

    def __init__(self, reason: str, quiet: bool = False) -> None:
        super().__init__(reason)
        self.quiet = quiet


class Reader:
    """Walks from ``model`` to the modules that its stock forward calls.

    A stock module has the class, the children and the forward that the reader knows; a
    subclass or a replacement may compute anything. What was read is watched later.
    """

    def __init__(self, model: nn.Module) -> None:
        cls = type(model)
        #: Where the stock classes live, and what their names start with.
        self.home, self.prefix = cls.__module__, cls.__name__.removesuffix("Model")
        self.config: Any = model.config
        self.packed = 0
        self._paths = {id(model): ""}
        self._slots: list[Slot] = [(vars(model), "config", self.config)]
        self._tensors: list[torch.Tensor] = []
        self._modules: list[nn.Module] = []
        self._random: list[nn.Module] = []
        self._copied: list[torch.Tensor] = []
        self._stacks: list[dict[str, Any]] = []
        self._classes: set[type] = set()
        self._expect_own_forward(cls, "it")

    def watch(self) -> Watch:
        return Watch(
            self._slots, self._stacks, self._tensors, self._copied,
            self._modules, self._random,
        )  # fmt: skip

    def expect(self, condition: bool, reason: str) -> None:
        if not condition:
            raise Deviation(reason)

    def expect_children(self, module: nn.Module, *names: str) -> None:
        found = {name for name, child in module._modules.items() if child is not None}
        if found != {*names}:
            other = ", ".join(sorted(found ^ {*names}))
            raise Deviation(f"{self._name(module)} has other children: {other}")

    def child(self, parent: nn.Module, name: str, cls: str | type) -> Any:
        """The child, of exactly this class. A text names a stock one: what follows the
        prefix, or after ``=`` all of it."""
        child = self._open(parent, name)
        found = type(child)
        if isinstance(cls, str):
            cls = cls[1:] if cls[0] == "=" else self.prefix + cls
            known = (found.__module__, found.__name__) == (self.home, cls)
        else:
            known = found is cls
        self.expect(known, f"{self._name(child)} is {_a(found.__name__)}")
        return child

    def present(self, module: nn.Module, name: str) -> tuple[str, ...]:
        """``name`` if it is a child: an activation may be a function instead."""
        return (name,) if name in module._modules else ()

    def stock(self, name: str) -> Any:
        """A class that the module of the stock classes imports."""
        found = getattr(sys.modules[self.home], name, None)
        self.expect(found is not None, f"this transformers has no {name}")
        return found

    def layers(self, parent: nn.Module, name: str, cls: str) -> list[Any]:
        """The entries of an ``nn.ModuleList``; there must be one."""
        stack = self.child(parent, name, nn.ModuleList)
        self.expect(len(stack._modules) > 0, "it has no layers")
        self._stacks.append(stack._modules)
        return [self.child(stack, index, cls) for index in stack._modules]

    def linear(
        self, parent: nn.Module, name: str, activation: str | None = None
    ) -> LinearSpec:
        """``activation``: which one a packed layer computes by itself."""
        layer = self._open(parent, name)
        input_scale = 0.0
        if type(layer) is nn.Linear:
            weight: Any = self.parameter(layer, "weight")
        elif type(layer) is BlockSparseLinear:
            self._check_values(layer)
            try:
                weight = layer.matrix
            except (TypeError, ValueError) as error:
                raise Deviation(f"{self._name(layer)}: {error}") from error
            self.expect(
                layer.activation == activation,
                f"{self._name(layer)} computes an activation of its own",
            )
            input_scale = self._watch_fields(layer)
            self.packed += 1
        else:
            raise Deviation(f"{self._name(layer)} is {_a(type(layer).__name__)}")
        bias = None if layer.bias is None else self.parameter(layer, "bias")
        return LinearSpec(weight, bias, input_scale)

    def _check_values(self, layer: BlockSparseLinear) -> None:
        if not layer.is_rounded:
            self._check(layer, "weight_values", layer.weight_values, strided=False)
        self.expect(
            layer.weight_values.is_cpu,
            f"{self._name(layer)}.weight_values is on {layer.weight_values.device}",
        )

    def _watch_fields(self, layer: BlockSparseLinear) -> float:
        """The fields of a packed weight; its input scale."""
        for field in FIELDS[1:]:
            self.buffer(layer, field)
        if not layer.is_rounded:
            self.parameter(layer, "weight_values", strided=False)
            return 0.0
        if not layer.is_int8:
            self._tensors.append(self.buffer(layer, "weight_values"))
            return 0.0
        # The native matrix is a copy of these.
        for field in (FIELDS[0], SCALES, INPUT_SCALE):
            if layer._buffers[field] is None:
                self._slots.append((layer._buffers, field, None))
            else:
                self.copied(self.buffer(layer, field))
        return layer.static_scale

    def heads(self, parent: Any, size: int, *names: str) -> int:
        """How many heads of ``size`` the projections ``names`` compute: stock modules
        go by that, whatever number they keep."""
        features = [getattr(parent, name).out_features for name in names]
        self.expect(
            len(set(features)) == 1 and features[0] % size == 0,
            f"{self._name(parent)} projects to {features} features, heads are {size}",
        )
        return int(features[0] // size)

    def norm(self, parent: nn.Module, name: str) -> NormSpec:
        layer = self.child(parent, name, nn.LayerNorm)
        if len(layer.normalized_shape) != 1 or layer.weight is None:
            raise Deviation(f"{self._name(layer)} is not over the features alone")
        weight = self.parameter(layer, "weight")
        bias = None if layer.bias is None else self.parameter(layer, "bias")
        return NormSpec(weight, bias, self.setting(layer, "eps"))

    def embedding(self, parent: nn.Module, name: str) -> torch.Tensor:
        table = self.child(parent, name, nn.Embedding)
        self.expect(table.max_norm is None, f"{self._name(table)} has max_norm")
        return self.parameter(table, "weight")

    def dropout(self, parent: nn.Module, name: str) -> None:
        layer = self.child(parent, name, nn.Dropout)
        self.drops(layer, layer.p)

    def drops(self, module: nn.Module, p: float) -> None:
        """``module`` drops with probability ``p`` while it is in training."""
        if p > 0:
            self._random.append(module)

    def copied(self, tensor: torch.Tensor) -> None:
        """Something is derived from ``tensor`` that a change in place outdates."""
        self._copied.append(tensor)

    def feed_forward_activation(
        self, parent: nn.Module, name: str, up: nn.Module
    ) -> tuple[str, str | None]:
        """The activation after ``up``, and what of it ``up`` computes by itself."""
        function = getattr(parent, name, None)
        path = f"{self._name(parent)}.{name}"
        if isinstance(function, nn.Module):
            self._open(parent, name)
            self.expect(not [*function.parameters()], f"{path} has parameters")
            self.expect(not function._modules, f"{path} has other children")
        else:
            self._slots.append((vars(parent), name, function))
        if isinstance(function, FusedActivation):
            fused: str | None = getattr(up, "activation", None)
            if fused is not None:
                return fused, fused
        found = activation_of(function)
        if found is None:
            raise Deviation(f"the activation {_name_of(function)} is not known")
        return found, None

    def parameter(
        self, module: nn.Module, name: str, strided: bool = True
    ) -> torch.Tensor:
        tensor = module._parameters[name]
        assert tensor is not None
        self._check(module, name, tensor, strided)
        self._slots.append((module._parameters, name, tensor))
        self._tensors.append(tensor)
        return tensor

    def setting(self, module: nn.Module, name: str) -> Any:
        """A number that is kept beside the tensors."""
        value = getattr(module, name)
        self._slots.append((vars(module), name, value))
        return value

    def buffer(self, module: nn.Module, name: str) -> torch.Tensor:
        tensor = module._buffers[name]
        assert tensor is not None
        self._slots.append((module._buffers, name, tensor))
        return tensor

    def _check(
        self, module: nn.Module, name: str, tensor: torch.Tensor, strided: bool
    ) -> None:
        path = f"{self._name(module)}.{name}"
        plain = type(tensor) in (torch.Tensor, nn.Parameter)
        self.expect(plain, f"{path} is {_a(type(tensor).__name__)}")
        self.expect(tensor.is_cpu, f"{path} is on {tensor.device}")
        kind = str(tensor.dtype).removeprefix("torch.")
        self.expect(tensor.dtype == torch.float32, f"{path} is {kind}")
        if strided:
            self.expect(tensor.is_contiguous(), f"{path} is not contiguous")

    def _open(self, parent: nn.Module, name: str) -> nn.Module:
        child = parent._modules.get(name)
        path = ".".join(filter(None, (self._paths[id(parent)], name)))
        if child is None:
            raise Deviation(f"there is no {path}")
        self._paths[id(child)] = path
        self.expect("forward" not in vars(child), f"{path} has another forward")
        self._expect_own_forward(type(child), path)
        self._slots.append((parent._modules, name, child))
        self._modules.append(child)
        return child

    def _expect_own_forward(self, cls: type, path: str) -> None:
        """Libraries that speed up transformers put another forward on its classes."""
        owner = next(base for base in cls.__mro__ if "forward" in vars(base))
        if owner in self._classes:
            return
        self._classes.add(owner)
        forward = vars(owner)["forward"]
        own = getattr(forward, "__module__", None) == owner.__module__
        self.expect(own, f"{path} has another forward, on the class")
        self._slots.append((vars(owner), "forward", forward))

    def _name(self, module: nn.Module) -> str:
        return self._paths[id(module)] or "it"


def _a(noun: str) -> str:
    return f"{'an' if noun[:1] in 'AEIOU' else 'a'} {noun}"


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
