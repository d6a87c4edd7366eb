"""How much the outputs of a model move with each output of its layers.

A layer ``y = W x`` whose weights change by ``D`` moves the outputs ``z`` of the model
by ``J D x``, with the Jacobian ``J = dz / dy``. Taking the outputs of a layer one by
one, and their derivatives as independent of the inputs (the factors of Martens & Grosse
2015, arXiv 1503.05671), with means ``E`` over tokens and the second moment ``H`` of
``x``::

    E |z' - z|^2  ~  sum_o  g_o  (D H D^T)_oo,     g_o = E sum_k (dz_k / dy_o)^2

The sum over ``k`` is the mean of ``(d(v z) / dy_o)^2`` over random ``v`` whose entries
are independent with mean 0 and variance 1: one backward pass for all of ``z`` instead
of one for each of its entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .forwards import call_model, unpadded

#: Random directions of the outputs in each batch.
PROBES = 2


def output_gains(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any]
) -> dict[str, torch.Tensor]:
    """``g_o`` of the outputs of the modules ``names``: ``(out,)`` float64, summed over
    the tokens of ``batches``.

    The outputs of the model are its logits where it has such, or else the first of
    floating point that is no loss; padding does not count.

    Raises ``ValueError`` for a model without such an output, or whose output does not
    depend on them in a way that can be differentiated.
    """
    generator = torch.Generator().manual_seed(0)
    gains = {name: torch.zeros((), dtype=torch.float64) for name in names}
    for batch in batches:
        with torch.enable_grad(), _watched(model, names) as seen:
            outputs = _outputs(call_model(model, batch))
            if not any(z.requires_grad for z in outputs):
                raise ValueError(
                    "the model's outputs cannot be differentiated, so what a block "
                    "matters to them is not known; pass error='layer'"
                )
            for probe in range(PROBES):
                moved = sum(_probed(z, batch, generator) for z in outputs)
                found = torch.autograd.grad(
                    moved,  # type: ignore[arg-type]
                    [seen[name] for name in names],
                    retain_graph=probe < PROBES - 1,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for name, of_name in zip(names, found, strict=True):
                    squares = unpadded(of_name, batch).double().square().sum(0)
                    gains[name] = gains[name].to(squares) + squares / PROBES
    for name, gain in gains.items():
        if not gain.isfinite().all():
            raise ValueError(
                f"the derivatives of the model's outputs by those of '{name}' are not "
                "finite; check the model and the batches"
            )
    return gains


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of the modules, by name, as far as they have run."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def look(_: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            seen[name] = output
            return output.clone()  # what follows may work in place

        return look

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name)) for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's result that count as its outputs."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        named = dict(result)
    else:
        named = dict(enumerate(result if isinstance(result, (tuple, list)) else ()))
    found = {
        str(name): value
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    logits = [value for name, value in found.items() if name.endswith("logits")]
    others = [value for name, value in found.items() if name != "loss"]
    if not others:
        raise ValueError(
            "the model returns no tensor of floating point, so what a block matters to "
            "its outputs is not known; pass error='layer'"
        )
    return logits or others[:1]


def _probed(z: torch.Tensor, batch: Any, generator: torch.Generator) -> torch.Tensor:
    """``v z`` for random ``v``."""
    kept = unpadded(z, batch)
    return (kept * torch.randn(kept.shape, generator=generator).to(kept)).sum()
