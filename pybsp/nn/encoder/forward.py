"""The forward of a model whose encoder runs natively."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ...ops import Encoder, EncoderSpec
from .reader import Deviation, Reader
from .watch import Watch

logger = logging.getLogger(__name__)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_transforming = torch._C._are_functorch_transforms_active
_is_autocast_enabled = torch.is_autocast_enabled

#: What an encoder takes: ids, hidden, mask, token_types, positions.
Inputs = tuple[
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]


@dataclass(frozen=True)
class Reading:
    """What an architecture makes of a model.

    ``inputs`` takes the model and the arguments of its forward, and raises
    ``Deviation`` for those that the stock forward must serve. ``output`` is the class
    of the result, with ``pooler_output`` where the model pools.
    """

    spec: EncoderSpec
    inputs: Callable[..., Inputs]
    output: Callable[..., Any]
    pools: bool = False


class Bound:
    """A native encoder over the tensors of a model, and a watch over these."""

    __slots__ = ("config", "encoder", "reading", "watch")

    def __init__(
        self, model: nn.Module, read: Callable[[nn.Module, Reader], Reading]
    ) -> None:
        reader = Reader(model)
        try:
            self.reading = read(model, reader)
        except (AttributeError, KeyError, TypeError) as error:
            # Another version of transformers.
            raise Deviation(f"its modules are not as expected: {error}") from error
        reader.expect(reader.packed > 0, "none of its linear layers is packed")
        self.watch: Watch = reader.watch()
        try:
            self.encoder = Encoder(self.reading.spec)
        except ValueError as error:
            raise Deviation(str(error)) from error
        # A config looks each attribute up in Python; its dictionary does not.
        self.config: dict[str, Any] = vars(reader.config)


class FusedForward:
    """Stands for ``model.forward``: the native encoder, or else the stock forward.

    The stock forward takes what is not inference in float32 on the CPU, and what asks
    for more than the last hidden states. Copies and pickles bind anew.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[nn.Module, Reader], Reading],
        bound: Bound | None = None,
    ) -> None:
        self._model, self._read, self._bound = model, read, bound
        self._told: set[str] = set()
        # So that inspect.signature finds the arguments of the stock forward.
        functools.update_wrapper(
            self,
            MethodType(type(model).forward, model),
            assigned=("__name__", "__qualname__", "__doc__"),
            updated=(),
        )

    @property
    def __code__(self) -> Any:
        """What ``torch.export`` names as the place of a forward."""
        return type(self._model).forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "read": self._read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def spec(self) -> EncoderSpec:
        """What is computed; ``Deviation`` where that is up to the stock modules."""
        return self._current().reading.spec

    def profile(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, float]]:
        """The result of a call and the seconds of its native part, by part as in
        ``ops.Encoder.profile``; ``Deviation`` where the stock modules would compute."""
        if self._model.training:
            raise Deviation("it is in training")
        bound = self._current()
        inputs = bound.reading.inputs(self._model, *args, **kwargs)
        y, seconds = bound.encoder.profile(*inputs)
        return self._output(bound, y), seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model
        # What expects to see operators gets the stock forward, as in ops.linear.
        if (
            _is_compiling()
            or model.training
            or _is_tracing()
            or _dispatch_modes()
            or _is_transforming()
            or forward_ad._current_level >= 0
        ):
            return type(model).forward(model, *args, **kwargs)
        try:
            bound = self._current()
            inputs = bound.reading.inputs(model, *args, **kwargs)
        except Deviation as deviation:
            self._tell(deviation)
            return type(model).forward(model, *args, **kwargs)
        hidden = inputs[1]
        if hidden is not None and hidden.requires_grad:
            return type(model).forward(model, *args, **kwargs)
        return self._output(bound, bound.encoder(*inputs))

    def _output(self, bound: Bound, y: torch.Tensor) -> Any:
        reading = bound.reading
        if not reading.pools:
            return reading.output(last_hidden_state=y)
        pooler = self._model._modules.get("pooler")
        pooled = None if pooler is None else pooler(y)
        return reading.output(last_hidden_state=y, pooler_output=pooled)

    def _current(self) -> Bound:
        """The bound encoder, made anew after the model changed; ``Deviation`` where
        the state of the model or of torch asks for the stock modules."""
        bound = self._bound
        seen = None if bound is None else bound.watch.look()
        if bound is None or seen is None:
            self._bound = None
            self._bound = bound = Bound(self._model, self._read)
            seen = bound.watch.look()
            if seen is None:
                raise Deviation("it changed while it was read")
        config = bound.config
        if _is_grad_enabled() and bound.watch.needs_grad():
            raise Deviation(
                "gradients are on; torch.inference_mode() or torch.no_grad() turns "
                "them off"
            )
        if (
            seen.hooked
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
        ):
            raise Deviation("there are hooks on its modules")
        if seen.random:
            raise Deviation("some of its modules are in training", quiet=True)
        if _is_autocast_enabled("cpu"):
            raise Deviation("autocast is on")
        for name, usual in _CONFIG:
            if config.get(name, usual[0]) not in usual:
                raise Deviation(f"config.{name.lstrip('_')} is {config[name]!r}")
        return bound

    def _tell(self, deviation: Deviation) -> None:
        reason = str(deviation)
        if deviation.quiet or reason in self._told:
            return
        self._told.add(reason)
        logger.warning(
            "%s runs through its own modules and not natively as a whole: %s",
            type(self._model).__name__,
            reason,
        )


#: Entries of a config that a user may set at any time, with the values served.
_CONFIG = (
    ("output_hidden_states", (False, None)),
    ("_output_attentions", (False, None)),
    ("return_dict", (True, None)),
    ("is_decoder", (False, None)),
    ("is_causal", (False, None)),
    ("_attn_implementation_internal", ("sdpa", "eager", None)),
)


#: Arguments that no stock encoder computes with: what Trainer adds to the loss, and the
#: cache of a decoder.
_IDLE = ("num_items_in_batch", "use_cache")


def check_other_arguments(others: tuple[Any, ...], options: dict[str, Any]) -> None:
    """``Deviation`` unless they are as by default, or nothing depends on them."""
    for value in others:
        if value is not None:
            raise Deviation("it was called with further arguments")
    for name, value in options.items():
        if name == "return_dict":
            usual = value is None or value is True
        else:
            usual = value is None or value is False or name in _IDLE
        if not usual:
            raise Deviation(f"it was called with {name}")


def check_ids(ids: Any) -> torch.Tensor:
    if type(ids) is not torch.Tensor or not ids.is_cpu or ids.dim() != 2:
        raise Deviation("it was called without input_ids of (batch, length)")
    if ids.dtype is not torch.int64 or ids.numel() == 0:
        raise Deviation("its input_ids are no int64 numbers")
    return ids


def check_mask(mask: Any, shape: torch.Size) -> torch.Tensor | None:
    if mask is None:
        return None
    if type(mask) is not torch.Tensor or not mask.is_cpu or mask.shape != shape:
        raise Deviation("its attention_mask is not (batch, length)")
    return mask


def check_rows(name: str, rows: Any, shape: torch.Size) -> torch.Tensor | None:
    """Token types or positions of every token."""
    if rows is None:
        return None
    if type(rows) is not torch.Tensor or not rows.is_cpu:
        raise Deviation(f"its {name} are not (batch, length)")
    if rows.dtype is not torch.int64:
        raise Deviation(f"its {name} are no int64 numbers")
    if rows.shape == shape:
        return rows
    if rows.shape in ((1, shape[1]), (shape[1],)):
        return rows.expand(shape).contiguous()
    raise Deviation(f"its {name} are not (batch, length)")
