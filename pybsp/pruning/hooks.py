"""Work before and after every optimizer step that really happens.

Hooks on the innermost optimizer see gradients after accumulation, unscaling and
clipping, whichever loop calls ``step``. A step that a gradient scaler skips does not
reach them, except with fused optimizers, which are told to skip from inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        raise ValueError(
            "block pruning hooks a torch.optim.Optimizer; got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}: optimizers that "
            "flatten or partition the weights (DeepSpeed) are not supported"
        )
    return optimizer


class StepHooks:
    """Calls ``before(optimizer)`` when the gradients of a step are ready and
    ``after(optimizer)`` when the weights have moved; ``remove()`` undoes it."""

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Optimizer], None],
        after: Callable[[Optimizer], None],
    ) -> None:
        self._before = before
        self._after = after
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def _pre(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._run(self._before, optimizer)
            return None

        def ready() -> Any:
            # with a closure the gradients exist only once it has run
            loss = closure()
            self._run(self._before, optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": ready}
        return (args[0], ready, *args[2:]), kwargs

    def _post(
        self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]
    ) -> None:
        self._run(self._after, optimizer)

    @staticmethod
    def _run(work: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, torch.Tensor) and bool(found_inf.any()):
            return
        with torch.no_grad():
            work(optimizer)


def gradient_scale(optimizer: Optimizer) -> float:
    """By how much the gradients are still scaled: 1 unless a fused optimizer unscales
    them itself."""
    scale = getattr(optimizer, "grad_scale", None)
    return float(scale) if isinstance(scale, torch.Tensor) else 1.0


def learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """Learning rate by ``id`` of the parameter, as of now."""
    return {
        id(parameter): float(group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
