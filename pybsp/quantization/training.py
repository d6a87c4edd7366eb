"""``QuantizationAwareTraining``: train a model on the results that int8 will give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .. import ops
from ..pruning.config import BlockPruningConfig
from ..pruning.targets import select_targets, unwrap_model
from .activations import DYNAMIC
from .linear import fake_quantize_, restore_
from .weights import round_rows, row_scales

STATE_FORMAT = 1


class QuantizationAwareTraining:
    """Lets linear layers of ``model`` compute in int8 from ``begin()`` on::

        qat = QuantizationAwareTraining(model)
        for step, batch in enumerate(loader):
            if step == int(0.8 * len(loader)):
                qat.begin()
            ...                                # the loop as it was
        qat.finalize()

    Weights stay float32 and learn through the rounding (``FakeQuantizedLinear``); those
    that are exactly zero stay zero, so the blocks of a pruned model are locked. Keys
    and values of ``state_dict()`` are those of the plain model throughout. ``finalize``
    moves every weight to its int8 value, hence a stock checkpoint holds what was
    trained, and packing it in int8 finds those very bytes.

    Args:
        model: with float32 weights; wrapped or not.
        modules: which linear layers, as ``target_modules`` of ``BlockPruningConfig``:
            by default the layers that are pruned by default.
        exclude_modules: as in ``BlockPruningConfig``.
        input_scales: static scales by module name, from ``calibrate``; a layer that is
            not named has a scale of its own for every token.

    Raises:
        ValueError: when nothing matches, a layer is packed, sharded, not float32 or of
            a class of its own, or a scale is not that of such a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modules: str | Sequence[str] = "all-linear",
        exclude_modules: str | Sequence[str] | None = None,
        input_scales: Mapping[str, float] | None = None,
    ) -> None:
        self.model = unwrap_model(model)
        names = modules if isinstance(modules, str) else tuple(modules)
        if exclude_modules is not None and not isinstance(exclude_modules, str):
            exclude_modules = tuple(exclude_modules)
        cfg = BlockPruningConfig(
            block_shape=(1, 1), target_modules=names, exclude_modules=exclude_modules
        )
        self.modules: tuple[str, ...] = tuple(
            name
            for target in select_targets(self.model, cfg)
            for name in (target.name, *target.shared_with)
        )
        self.input_scales = _checked_scales(input_scales or {}, self.modules)
        self.active = False
        self._final = False

    def begin(self) -> None:
        """Compute in int8 from now on; a second call does nothing."""
        if self.active:
            return
        linears = self._linears()
        try:
            for name, linear in linears.items():
                scale = self.input_scales.get(name, DYNAMIC)
                try:
                    fake_quantize_(linear, input_scale=scale)
                except ValueError as error:
                    raise ValueError(f"module '{name}': {error}") from None
        except BaseException:
            self.remove()
            raise
        self.active = True

    def remove(self) -> None:
        """Compute in float32 again, with the weights as training left them."""
        for linear in self._linears().values():
            restore_(linear)
        self.active = False

    @torch.no_grad()
    def finalize(self) -> dict[str, float]:
        """Move the weights to their int8 values and make the layers plain again.

        Returns the input scale of every layer, 0 where it is dynamic. A second call
        returns the same and changes nothing.

        Raises:
            ValueError: when int8 training has not begun, or a weight became NaN.
                Nothing is changed then.
        """
        linears = self._linears()
        scales = {name: self.input_scales.get(name, DYNAMIC) for name in linears}
        if not self.active:
            if self._final:
                return scales
            raise ValueError(
                "int8 training has not begun, so the model is not used to int8 yet; "
                "call begin() and train on, or remove() to leave it as it is"
            )
        for name, linear in linears.items():
            if not bool(linear.weight.isfinite().all()):
                raise ValueError(
                    f"the weight of '{name}' became NaN or infinite in training; lower "
                    "the learning rate or restore a checkpoint of the run"
                )
        for linear in linears.values():
            rows = row_scales(linear.weight, "max")
            linear.weight.copy_(round_rows(linear.weight, rows) * rows[:, None])
        self.remove()
        self._final = True
        return scales

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers: ``json.dumps`` takes it."""
        return {
            "format": STATE_FORMAT,
            "active": self.active,
            "modules": list(self.modules),
            "input_scales": dict(self.input_scales),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; load the model's weights separately.

        Raises:
            ValueError: when the state is incomplete or of other layers or scales.
        """
        ours = self.state_dict()
        for key in ("format", "active", "modules", "input_scales"):
            if key not in state:
                raise ValueError(
                    f"the state of int8 training lacks {key!r}: it is truncated or "
                    "something else; resume from another checkpoint"
                )
            if key != "active" and state[key] != ours[key]:
                raise ValueError(
                    f"the state of int8 training was written with another {key}; "
                    "resume with the same model and arguments"
                )
        if state["active"]:
            self.begin()
        else:
            self.remove()

    def __enter__(self) -> QuantizationAwareTraining:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finalize()
        else:
            self.remove()

    def _linears(self) -> dict[str, nn.Linear]:
        found: dict[str, nn.Linear] = {}
        for name in self.modules:
            module = self.model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"'{name}' was exchanged for a {type(module).__name__} while the "
                    "model trained; int8 training needs the nn.Linear it began with"
                )
            found[name] = module
        return found


def _checked_scales(
    scales: Mapping[str, float], modules: Sequence[str]
) -> dict[str, float]:
    for name, scale in scales.items():
        if name not in modules:
            raise ValueError(
                f"input_scales names '{name}', which is not one of the "
                f"{len(modules)} layers to train in int8, such as '{modules[0]}'"
            )
        try:
            if not hasattr(scale, "__float__"):
                raise ValueError(
                    "input_scale must be a number, or left out for one scale for each "
                    f"token; got {scale!r}"
                )
            ops.check_input_scale(scale)
        except ValueError as error:
            raise ValueError(f"module '{name}': {error}") from None
    return {name: float(scale) for name, scale in scales.items()}
