"""Is a model still what was read from it? Asked before every call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

_training = attrgetter("training")
_requires_grad = attrgetter("requires_grad")
_version = attrgetter("_version")
_address = torch.Tensor.data_ptr

#: The function with which transformers records hidden states when it is asked to. It
#: stays registered once it was needed, and does nothing in other calls.
_RECORDER = ("transformers.utils.output_capturing", "output_capturing_hook")


class Watch:
    """The places that hold what was read; each question is answered in C.

    A Python loop would take three times as long: there are 550 places in 12 layers.

    Parameters
    ----------
    slots : ``(dictionary, key, object)``: each must still hold that very object
    stacks : dictionaries of layers, which must not become longer
    tensors : their memory must still be where it was
    copied : tensors that must not change in place either
    modules : on which a hook, or a forward of their own, would be passed over
    random : modules that draw random numbers in training
    """

    def __init__(
        self,
        slots: Sequence[tuple[dict[str, Any], str, Any]],
        stacks: Sequence[dict[str, Any]],
        tensors: Sequence[torch.Tensor],
        copied: Sequence[torch.Tensor],
        modules: Sequence[nn.Module],
        random: Sequence[nn.Module],
    ) -> None:
        self._places = [place for place, _, _ in slots]
        self._keys = [key for _, key, _ in slots]
        self._objects = [found for _, _, found in slots]
        self._stacks, self._depths = list(stacks), list(map(len, stacks))
        self._tensors, self._addresses = list(tensors), list(map(_address, tensors))
        # Inference tensors count no versions.
        self._copied = [tensor for tensor in copied if not tensor.is_inference()]
        self._versions = list(map(_version, self._copied))
        self._states = [vars(module) for module in modules]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._random = list(random)

    def unchanged(self) -> bool:
        """Whether everything is in its place."""
        found = map(dict.get, self._places, self._keys)
        return (
            all(map(is_, found, self._objects))
            and list(map(len, self._stacks)) == self._depths
            and list(map(_address, self._tensors)) == self._addresses
            and list(map(_version, self._copied)) == self._versions
        )

    def hooked(self) -> bool:
        """Whether a module has a hook that would be passed over, or its own forward."""
        if any(map(dict.__contains__, self._states, repeat("forward"))):
            return True
        return any(self._hooks) and any(
            _name_of(hook) != _RECORDER
            for hooks in self._hooks
            for hook in hooks.values()
        )

    def random(self) -> bool:
        """Whether a dropout is in training although the model may not be."""
        return any(map(_training, self._random))

    def needs_grad(self) -> bool:
        return any(map(_requires_grad, self._tensors))


def _name_of(hook: Any) -> tuple[str | None, str | None]:
    return getattr(hook, "__module__", None), getattr(hook, "__name__", None)
