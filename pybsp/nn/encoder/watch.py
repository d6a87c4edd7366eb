"""Is a model still what was read from it? Asked before every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...ops.runtime import DictVersions

Slot = tuple[Mapping[str, Any], str, Any]

#: The function with which transformers records hidden states when it is asked to. It
#: stays registered once it was needed, and does nothing in other calls.
_RECORDER = ("transformers.utils.output_capturing", "output_capturing_hook")


class Seen(NamedTuple):
    """What a model was like that is still as it was read.

    ``hooked``: a module has a hook that would be passed over, or its own forward.
    ``random``: a dropout is in training although the model may not be.
    """

    versions: DictVersions | None
    hooked: bool
    random: bool


class Watch:
    """The places that hold what was read.

    12 layers of BERT have 900 dictionaries, which hold 600 places, the hooks and the
    settings. Python keeps a version of each, and they are looked into only after a
    version has changed; from 3.12 on it is one count for those of all models. Loops
    over all places take 25 microseconds from the caches and 150 after a call, whose
    weights have driven them out.

    Parameters
    ----------
    slots : ``(dictionary, key, object)``: each must still hold that very object
    stacks : dictionaries of layers, which must not become longer
    tensors : their memory must still be where it was, and matrices of the same shape
    copied : tensors that must not change in place either
    modules : on which a hook, or a forward of their own, would be passed over
    random : modules that draw random numbers in training
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        stacks: Sequence[dict[str, Any]],
        tensors: Sequence[torch.Tensor],
        copied: Sequence[torch.Tensor],
        modules: Sequence[nn.Module],
        random: Sequence[nn.Module],
    ) -> None:
        # ``vars`` of a class has no version: these are looked at every time.
        self._class_slots = [slot for slot in slots if not isinstance(slot[0], dict)]
        self._slots = [slot for slot in slots if isinstance(slot[0], dict)]
        self._stacks = [(stack, len(stack)) for stack in stacks]
        self._tensors = list(tensors)
        self._addresses = [(tensor.data_ptr, tensor.data_ptr()) for tensor in tensors]
        # ``tensor.data = tensor.data[:n]``, or a transposed view, is where it was.
        # Packed weights, of three dimensions, are left out: there are many.
        self._views = [
            (tensor, tensor.shape, tensor.stride())
            for tensor in tensors
            if tensor.dim() == 2
        ]
        # Inference tensors count no versions.
        self._versions = [(t, t._version) for t in copied if not t.is_inference()]
        self._states = [vars(module) for module in modules]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._random = list(random)
        places = [place for place, _, _ in self._slots]
        drawing = [vars(module) for module in random]
        dicts = [*places, *self._states, *self._hooks, *drawing]
        self._dicts = list({id(place): place for place in dicts}.values())
        # No versions yet: something may have changed since it was read.
        self._seen = Seen(None, False, False)

    def look(self) -> Seen | None:
        """What is seen now; nothing unless everything is in its place."""
        seen = self._seen
        if seen.versions is None or not seen.versions.unchanged(self._dicts):
            # Before looking: what changes from here on is seen the next time.
            versions = DictVersions(self._dicts)
            if not self._all_in_place(self._slots):
                return None
            for stack, depth in self._stacks:
                if len(stack) != depth:
                    return None
            # For other calls. This one goes by what it saw itself: another thread may
            # put something older there.
            self._seen = seen = Seen(versions, self._hooked(), self._random_now())
        if not self._all_in_place(self._class_slots):
            return None
        for address, before in self._addresses:
            if address() != before:
                return None
        for tensor, shape, stride in self._views:
            if tensor.shape != shape or tensor.stride() != stride:
                return None
        if any(tensor._version != before for tensor, before in self._versions):
            return None
        return seen

    def needs_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self._tensors)

    @staticmethod
    def _all_in_place(slots: Sequence[Slot]) -> bool:
        try:
            for place, key, found in slots:
                if place[key] is not found:
                    return False
        except KeyError:
            return False
        return True

    def _hooked(self) -> bool:
        for state in self._states:
            if "forward" in state:
                return True
        return any(self._hooks) and any(
            _name_of(hook) != _RECORDER
            for hooks in self._hooks
            for hook in hooks.values()
        )

    def _random_now(self) -> bool:
        return any(module.training for module in self._random)


def _name_of(hook: Any) -> tuple[str | None, str | None]:
    return getattr(hook, "__module__", None), getattr(hook, "__name__", None)
