"""Forwards of a model in which the inputs of its layers are seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

#: Layers that get the same inputs, such as query, key and value.
Stage = tuple[str, ...]


def in_lockstep(
    runs: Sequence[tuple[nn.Module, Any]],
    names: Sequence[str],
    meet: Callable[[int, Sequence[torch.Tensor]], None],
) -> None:
    """Run the forwards side by side, each waiting at every module of ``names`` until
    all are there; then ``meet(number, inputs of all)`` is called, before any goes on.

    One forward instead of one for each module: a thread holds each. A thread that
    computes in parallel would keep a team of its own, so each computes alone and as
    many run at a time as a team has threads. ``meet`` runs in the calling thread.
    """
    team = torch.get_num_threads()
    turn = threading.Semaphore(team)
    own = threading.local()
    inputs: list[torch.Tensor] = [torch.empty(0)] * len(runs)
    barrier = threading.Barrier(len(runs) + 1)

    def see(name: str, x: torch.Tensor) -> None:
        if own.left[0] != name:
            raise ValueError(
                f"'{name}' runs before '{own.left[0]}' in one of the batches, and after"
                " it in the first; such models are pruned while they train"
            )
        own.left.pop(0)
        inputs[own.index] = unpadded(x, runs[own.index][1])
        turn.release()
        try:
            barrier.wait()  # all are there
            barrier.wait()  # and have met
        finally:
            turn.acquire()
        if not own.left:
            raise _AllSeen

    @torch.no_grad()
    def run(index: int) -> None:
        torch.set_num_threads(1)
        own.index, own.left = index, list(names)
        with turn:
            try:
                with suppress(_AllSeen):
                    call_model(*runs[index])
            except BaseException:
                barrier.abort()
                raise

    errors: list[BaseException | None] = []
    try:
        with ExitStack() as watching, ThreadPoolExecutor(len(runs)) as threads:
            try:
                for model in {id(model): model for model, _ in runs}.values():
                    watching.enter_context(_watched(model, names, see))
                running = [threads.submit(run, i) for i in range(len(runs))]
                with suppress(threading.BrokenBarrierError):
                    for number in range(len(names)):
                        barrier.wait()
                        meet(number, inputs)
                        barrier.wait()
            except BaseException:
                barrier.abort()
                raise
            errors = [future.exception() for future in running]
    finally:
        # what a thread sets is also what threads to come start with
        torch.set_num_threads(team)
    broken = [error for error in errors if error is not None]
    for error in sorted(
        broken, key=lambda e: isinstance(e, threading.BrokenBarrierError)
    ):
        raise error


class _AllSeen(Exception):
    """The modules that are watched have their inputs; the rest need not run."""


def layer_inputs(
    model: nn.Module, names: Sequence[str], batch: Any
) -> list[torch.Tensor]:
    """Inputs ``(tokens, in)`` of the modules, padding left out."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        found[name] = unpadded(x, batch)
        if len(found) == len(names):
            raise _AllSeen

    with _watched(model, names, see), suppress(_AllSeen):
        call_model(model, batch)
    missed = [name for name in names if name not in found]
    if missed:
        raise ValueError(
            f"'{missed[0]}' does not run in one of the batches, and does in the first; "
            "exclude it, or prune while training"
        )
    return [found[name] for name in names]


def attention_mask(batch: Any) -> torch.Tensor | None:
    """Which tokens are no padding, where the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None else mask.bool()


def unpadded(x: torch.Tensor, batch: Any) -> torch.Tensor:
    """``x`` (..., features) as (tokens, features), without those that are padding."""
    kept = attention_mask(batch)
    if kept is not None and kept.shape == x.shape[:-1]:
        x = x[kept]
    return x.reshape(-1, x.shape[-1])


def outside_inference_mode(batch: Any) -> Any:
    """A batch that derivatives can be taken with, wherever it was made."""
    if isinstance(batch, torch.Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {name: outside_inference_mode(part) for name, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [outside_inference_mode(part) for part in batch]
    return batch


def find_stages(model: nn.Module, names: Sequence[str], batch: Any) -> list[Stage]:
    """Targets in the order in which they run; those with the same input together."""
    order: list[tuple[torch.Tensor, list[str]]] = []

    def see(name: str, x: torch.Tensor) -> None:
        if order and order[-1][0] is x:
            order[-1][1].append(name)
        else:
            order.append((x, [name]))

    with _watched(model, names, see):
        call_model(model, batch)
    stages = [tuple(dict.fromkeys(stage)) for _, stage in order]
    ran = [name for stage in stages for name in stage]
    odd = [name for name in names if ran.count(name) != 1]
    if odd:
        raise ValueError(
            f"'{odd[0]}' ran {ran.count(odd[0])} times in a forward; a layer is fitted "
            "to its inputs at one place: exclude it, or prune while training"
        )
    return stages


@contextmanager
def _watched(
    model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    def hook(name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return look

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(
                module.register_forward_pre_hook(hook(name), with_kwargs=True)
            )
        yield


def output_tensors(result: Any) -> dict[str, torch.Tensor]:
    """Tensors of floating point that a model returned, by name or number; a loss does
    not count."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    if isinstance(result, Mapping):
        named = dict(result)
    else:
        named = dict(enumerate(result if isinstance(result, (tuple, list)) else ()))
    return {
        str(name): value
        for name, value in named.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() > 0  # a loss
    }


def named_logits(result: Any) -> dict[str, torch.Tensor]:
    """The outputs whose names end in ``logits``: ``start_logits`` too."""
    found = output_tensors(result)
    return {name: z for name, z in found.items() if name.endswith("logits")}


def main_outputs(result: Any) -> list[torch.Tensor]:
    """The logits, or else the first tensor of floating point, or else nothing."""
    logits = list(named_logits(result).values())
    return logits or list(output_tensors(result).values())[:1]


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for keyword arguments, several arguments or only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
