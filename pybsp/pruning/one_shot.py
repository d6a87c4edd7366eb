"""``prune_one_shot``: cut a model at once and refit what is left, without training."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from .config import BlockPruningConfig
from .masks import check_feasible, pools, select_masks
from .reconstruction import InputMoments, output_energy, refit, removal_costs
from .record import record_block_shapes
from .targets import Target, select_targets, unwrap_model

#: Targets that get the same inputs, such as query, key and value.
Stage = tuple[str, ...]


@torch.no_grad()
def prune_one_shot(
    model: nn.Module, cfg: BlockPruningConfig, batches: Iterable[Any]
) -> dict[str, Any]:
    """Prune ``model`` in place to the target of ``cfg``, from a few hundred examples.

    Blocks are ranked by what their removal costs when all others of the layer make up
    for it, on the inputs that the layer has in ``batches``; then, layer by layer, the
    kept weights and the bias are fitted so that the pruned model's layer gives what the
    dense one gave. No labels and no gradients are needed. It is a start for training,
    rarely an end::

        cfg = BlockPruningConfig(method="magnitude", phases=(0, 0, 1))
        pybsp.prune_one_shot(model, cfg, batches)
        Trainer(..., callbacks=[BlockPruningCallback(cfg, teacher=dense)]).train()

    Parameters
    ----------
    model : a model whose targeted layers run in every forward; its modes are kept.
    cfg : ``block_shape``, ``target_sparsity``, ``scope``, ``max_layer_sparsity``,
        ``overrides`` and the selection of modules count. With ``scope="global"`` the
        costs of a layer are taken relative to the variance of its outputs.
    batches : inputs of the model as it is called: dicts of keyword arguments, tuples or
        lists of arguments, or the only argument. Where a dict has an
        ``attention_mask``, padding is left out.

    Returns the record that joins ``model.config``, as ``BlockPruner.finalize`` does.

    Raises ``ValueError`` for what ``BlockPruner`` refuses, no batches, a targeted layer
    that does not run, or inputs that nothing can be fitted to. Whatever is raised,
    ``model`` is as it was.
    """
    if cfg.has_threshold:
        raise ValueError(
            "prune_one_shot ranks blocks by the error of their removal, which a "
            "threshold of norms does not fit; set target_sparsity instead"
        )
    if cfg.embedding_modules:
        raise ValueError(
            "prune_one_shot fits linear layers, and embedding tables are none; leave "
            "embedding_modules out"
        )
    model = unwrap_model(model)
    targets = {target.name: target for target in select_targets(model, cfg)}
    groups = pools(list(targets.values()), cfg)
    for pool in groups:
        check_feasible(pool, cfg.max_layer_sparsity)
    inputs = list(batches)
    if not inputs:
        raise ValueError("batches is empty; give a few hundred examples")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        stages = _stages(model, list(targets), inputs[0])
        costs = _costs(model, targets, stages, inputs)
        masks: dict[str, torch.Tensor] = {}
        for pool in groups:
            masks.update(select_masks(costs, pool, cfg.max_layer_sparsity))
        fitted = copy.deepcopy(model)
        _refit_all(fitted, model, stages, targets, masks, inputs)
        for name in targets:
            new, old = fitted.get_submodule(name), model.get_submodule(name)
            old.weight.copy_(new.weight)  # type: ignore[operator, arg-type]
            if old.bias is not None:
                old.bias.copy_(new.bias)  # type: ignore[operator, arg-type]
    finally:
        for module, training in modes.items():
            module.training = training
    return record_block_shapes(model, targets.values(), cfg.block_shape)


def _costs(
    dense: nn.Module,
    targets: Mapping[str, Target],
    stages: Sequence[Stage],
    batches: Sequence[Any],
) -> dict[str, torch.Tensor]:
    """Costs of all blocks of all targets, relative to their layer's outputs and to the
    size of a block."""
    moments = {stage: InputMoments() for stage in stages}
    first = [stage[0] for stage in stages]
    for batch in batches:
        for stage, x in zip(stages, _inputs(dense, first, batch), strict=True):
            moments[stage].add(x, x)
    costs = {}
    for stage in stages:
        for name in stage:
            layer, target = dense.get_submodule(name), targets[name]
            weight: torch.Tensor = layer.weight  # type: ignore[assignment]
            covariance = moments[stage].covariance(centred=layer.bias is not None)
            with _solving(name, moments[stage]):
                cost = removal_costs(
                    weight, covariance, target.block_shape, moments[stage].rounding
                )
            energy = output_energy(weight, covariance)
            costs[name] = cost / (target.block_size * max(energy, 1e-30))
    return costs


@contextmanager
def _solving(name: str, moments: InputMoments) -> Iterator[None]:
    """Names the layer whose equations have no solution."""
    message = f"the inputs of '{name}' cannot be fitted"
    if not math.isfinite(moments.rounding):
        raise ValueError(
            f"{message}: they are not finite; check the model and the batches"
        )
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"{message}; exclude it or give more batches") from error


def _refit_all(
    model: nn.Module,
    dense: nn.Module,
    stages: Sequence[Stage],
    targets: Mapping[str, Target],
    masks: Mapping[str, torch.Tensor],
    batches: Sequence[Any],
) -> None:
    """Fit stage after stage, each on inputs from the stages fitted before it."""

    def fit(stage: int, inputs: Sequence[torch.Tensor]) -> None:
        moments = InputMoments()
        half = len(batches)
        for of_dense, of_pruned in zip(inputs[:half], inputs[half:], strict=True):
            moments.add(of_dense, of_pruned)
        for name in stages[stage]:
            layer, shape = model.get_submodule(name), targets[name].block_shape
            weight: torch.Tensor = layer.weight  # type: ignore[assignment]
            bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
            with _solving(name, moments):
                fitted, shifted = refit(weight, bias, masks[name], shape, moments)
            weight.copy_(fitted)
            if bias is not None and shifted is not None:
                bias.copy_(shifted)

    runs = [(m, batch) for m in (dense, model) for batch in batches]
    _in_lockstep(runs, [stage[0] for stage in stages], fit)


def _in_lockstep(
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
        inputs[own.index] = _tokens(x, runs[own.index][1])
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
                    _call(*runs[index])
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


def _inputs(model: nn.Module, names: Sequence[str], batch: Any) -> list[torch.Tensor]:
    """Inputs ``(tokens, in)`` of the modules, padding left out."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        found[name] = _tokens(x, batch)
        if len(found) == len(names):
            raise _AllSeen

    with _watched(model, names, see), suppress(_AllSeen):
        _call(model, batch)
    missed = [name for name in names if name not in found]
    if missed:
        raise ValueError(
            f"'{missed[0]}' does not run in one of the batches, and does in the first; "
            "exclude it, or prune while training"
        )
    return [found[name] for name in names]


def _tokens(x: torch.Tensor, batch: Any) -> torch.Tensor:
    kept = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if kept is not None and kept.shape == x.shape[:-1]:
        x = x[kept.bool()]
    return x.reshape(-1, x.shape[-1])


def _stages(model: nn.Module, names: Sequence[str], batch: Any) -> list[Stage]:
    """Targets in the order in which they run; those with the same input together."""
    order: list[tuple[torch.Tensor, list[str]]] = []

    def see(name: str, x: torch.Tensor) -> None:
        if order and order[-1][0] is x:
            order[-1][1].append(name)
        else:
            order.append((x, [name]))

    with _watched(model, names, see):
        _call(model, batch)
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

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            hook(name), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
