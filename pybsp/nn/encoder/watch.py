"""Is a model still what was read from it? Asked before every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...ops.runtime import DictVersions

Slot = tuple[Mapping[str, Any], str, Any]

#: The function with which transformers records hidden states when it is asked to. It
#: stays registered once it was needed, and does nothing in other calls.
_RECORDER = ("transformers.utils.output_capturing", "output_capturing_hook")


class Watch:
    """The places that hold what was read.

    12 layers of BERT have 900 dictionaries with 600 places, hooks and settings, which
    Python keeps a version of: they are looked into only after one has changed. Loops
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
        # The namespace of a class is no dictionary.
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
        dicts = [*places, *stacks, *self._states, *self._hooks, *drawing]
        self._dicts = list({id(place): place for place in dicts}.values())
        # No versions yet: something may have changed since it was read.
        self._seen: tuple[DictVersions | None, bool, bool] = (
            None, self._find_hook(), self._find_random(),
        )  # fmt: skip

    def unchanged(self) -> bool:
        """Whether everything is in its place."""
        versions = self._seen[0]
        if versions is None or not versions.unchanged(self._dicts):
            # Before looking: what changes from here on is seen the next time.
            versions = DictVersions(self._dicts)
            if not self._all_in_place(self._slots):
                return False
            for stack, depth in self._stacks:
                if len(stack) != depth:
                    return False
            self._seen = versions, self._find_hook(), self._find_random()
        if not self._all_in_place(self._class_slots):
            return False
        for address, before in self._addresses:
            if address() != before:
                return False
        for tensor, shape, stride in self._views:
            if tensor.shape != shape or tensor.stride() != stride:
                return False
        return all(tensor._version == before for tensor, before in self._versions)

    def hooked(self) -> bool:
        """Whether a module has a hook that would be passed over, or its own forward, as
        of the last ``unchanged``."""
        return self._seen[1]

    def random(self) -> bool:
        """Whether a dropout is in training although the model may not be, as of the
        last ``unchanged``."""
        return self._seen[2]

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

    def _find_hook(self) -> bool:
        for state in self._states:
            if "forward" in state:
                return True
        return any(self._hooks) and any(
            _name_of(hook) != _RECORDER
            for hooks in self._hooks
            for hook in hooks.values()
        )

    def _find_random(self) -> bool:
        return any(module.training for module in self._random)


def _name_of(hook: Any) -> tuple[str | None, str | None]:
    return getattr(hook, "__module__", None), getattr(hook, "__name__", None)
