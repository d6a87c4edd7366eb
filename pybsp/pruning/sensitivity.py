"""How much the outputs of a model move with each output of its layers.

A layer ``y = W x`` whose weights change by ``D`` moves the outputs ``z`` of the model
by ``J D x``, with the Jacobian ``J = dz / dy``. Taking tokens and the outputs of a
layer one by one, and derivatives as independent of the inputs (the factors of Martens &
Grosse 2015, arXiv 1503.05671), with the sum over tokens ``t`` and the second moment
``H`` of ``x``::

    |z' - z|^2  ~  sum_o  g_o  (D H D^T)_oo,     g_o = sum_t sum_k (dz_k / dy_to)^2

What tokens do together is left out: for keys, which all tokens look at, and for values
under an even attention the true change is several times as large.

The sum over ``k`` is the mean of ``(d(v z) / dy_to)^2`` over random ``v`` whose entries
are independent with mean 0 and variance 1: one backward pass for all of ``z`` instead
of one for each of its entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .forwards import (
    attention_mask,
    call_model,
    main_outputs,
    outside_inference_mode,
    unpadded,
)

#: Random directions of the outputs in each batch.
PROBES = 2


def output_gains(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any]
) -> dict[str, torch.Tensor]:
    """``g_o`` of the outputs of the modules ``names``: ``(out,)`` float64, summed over
    the tokens of ``batches``.

    The outputs of the model are its logits where it has such, or else the first tensor
    of floating point; a loss and padding do not count. A batch takes the memory of a
    step of training on it.

    Raises ``ValueError`` for a model without such an output, or where no derivatives
    lead from it to one of the modules.
    """
    generator = torch.Generator().manual_seed(0)
    gains: dict[str, torch.Tensor] = {}
    for batch in batches:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _watched(model, names) as seen,
        ):
            batch = outside_inference_mode(batch)
            outputs = _outputs(call_model(model, batch))
            if not any(z.requires_grad for z in outputs):
                break
            for probe in range(PROBES):
                moved = sum(_probed(z, batch, generator) for z in outputs)
                found: Sequence[torch.Tensor | None] = torch.autograd.grad(
                    moved,  # type: ignore[arg-type]
                    [seen[name] for name in names],
                    retain_graph=probe < PROBES - 1,
                    allow_unused=True,
                )
                for name, of_name in zip(names, found, strict=True):
                    if of_name is None:
                        continue
                    squares = unpadded(of_name, batch).double().square().sum(0)
                    squares /= PROBES
                    gains[name] = gains[name] + squares if name in gains else squares
    for name in names:
        if name not in gains:
            raise ValueError(
                f"no derivatives lead from the model's outputs to '{name}', so what its"
                " blocks matter to them is not known; exclude it or pass error='layer'"
            )
        if not gains[name].isfinite().all():
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
            # A checkpoint that computes it again is not asked for the derivatives.
            seen.setdefault(name, output)
            return output.clone()  # what follows may work in place

        return look

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(hook(name)))
        yield seen


def _outputs(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's result that count as its outputs."""
    found = main_outputs(result)
    if not found:
        raise ValueError(
            "the model returns no tensor of floating point, nor a tuple or dict with "
            "one, so what a block matters to its outputs is not known; pass "
            "error='layer'"
        )
    return found


def _probed(z: torch.Tensor, batch: Any, generator: torch.Generator) -> torch.Tensor:
    """``v z`` for random ``v``."""
    mask = attention_mask(batch)
    if mask is not None and mask.shape == z.shape:
        z = z[mask]  # one for each token
    elif z.dim() > 1:
        z = unpadded(z, batch)
    return (z * torch.randn(z.shape, generator=generator).to(z)).sum()
