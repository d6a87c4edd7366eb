"""``prune_one_shot``: cut a model at once and refit what is left, without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import BlockPruningConfig
from .forwards import Stage, find_stages, in_lockstep, layer_inputs
from .masks import check_feasible, pools, select_masks
from .neurons import order_neurons_
from .reconstruction import InputMoments, output_energy, refit, removal_costs
from .record import record_block_shapes, zero_blocks
from .sensitivity import output_gains
from .targets import Target, select_targets, unwrap_model

#: Whose error a removal is charged for.
ERRORS = ("model", "layer")


@torch.no_grad()
def prune_one_shot(
    model: nn.Module,
    cfg: BlockPruningConfig,
    batches: Iterable[Any],
    *,
    error: str = "model",
) -> dict[str, Any]:
    """Prune ``model`` in place to the target of ``cfg``, from a few hundred examples.

    Blocks are ranked by what their removal costs when all others of the layer make up
    for it, on the inputs that the layer has in ``batches``; then, layer by layer, the
    kept weights and the bias are fitted so that the pruned model's layer gives what the
    dense one gave. No labels are needed. It is a start for training, rarely an end::

        cfg = BlockPruningConfig(method="magnitude", phases=(0, 0, 1))
        pybsp.prune_one_shot(model, cfg, batches)
        Trainer(..., callbacks=[BlockPruningCallback(cfg, teacher=dense)]).train()

    Parameters
    ----------
    model : a model whose targeted layers run in every forward; its modes are kept.
    cfg : ``block_shape``, ``target_sparsity``, ``scope``, ``max_layer_sparsity``,
        ``overrides`` and the selection of modules count.
    batches : inputs of the model as it is called: dicts of keyword arguments, tuples or
        lists of arguments, or the only argument. Where a dict has an
        ``attention_mask``, padding is left out.
    error : what a removal costs. ``"model"``: the squared change of the model's logits,
        or of its first output, to second order and output by output of the layer. The
        neurons of known feed-forward parts are first put into the order of what they
        matter, which changes nothing of what the model computes; an optimizer that
        holds moments of the weights is built afterwards. ``"layer"``: the squared
        change of the layer's outputs, relative to their variance.

    Returns the record that joins ``model.config``, as ``BlockPruner.finalize`` does.

    Raises ``ValueError`` for what ``BlockPruner`` refuses, no batches, a targeted layer
    that does not run, outputs without derivatives, or inputs that nothing can be fitted
    to. Whatever is raised, ``model`` is as it was.
    """
    if error not in ERRORS:
        raise ValueError(f"error must be 'model' or 'layer'; got {error!r}")
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
        stages = find_stages(model, list(targets), inputs[0])
        moments = _moments(model, stages, inputs)
        dense, gains = model, None
        if error == "model":
            dense = copy.deepcopy(model)
            # Of another copy: a model may hold on to what it computed.
            gains = output_gains(copy.deepcopy(model), list(targets), inputs)
            order_neurons_(dense, targets, gains, moments)
        costs = _costs(dense, targets, moments, gains)
        masks: dict[str, torch.Tensor] = {}
        for pool in groups:
            masks.update(select_masks(costs, pool, cfg.max_layer_sparsity))
        fitted = copy.deepcopy(dense)
        _refit_all(fitted, dense, stages, targets, masks, inputs)
        for name in targets:
            new, old = fitted.get_submodule(name), model.get_submodule(name)
            old.weight.copy_(new.weight)  # type: ignore[operator, arg-type]
            if old.bias is not None:
                old.bias.copy_(new.bias)  # type: ignore[operator, arg-type]
    finally:
        for module, training in modes.items():
            module.training = training
    return record_block_shapes(model, targets.values(), cfg.block_shape)


def _moments(
    model: nn.Module, stages: Sequence[Stage], batches: Sequence[Any]
) -> dict[str, InputMoments]:
    """Of the inputs of all targets; those of one stage share theirs."""
    moments = [InputMoments() for _ in stages]
    first = [stage[0] for stage in stages]
    for batch in batches:
        for seen, x in zip(moments, layer_inputs(model, first, batch), strict=True):
            seen.add(x, x)
    for stage, seen in zip(stages, moments, strict=True):
        _check_finite(stage[0], seen)
    return {
        name: seen
        for stage, seen in zip(stages, moments, strict=True)
        for name in stage
    }


def _costs(
    dense: nn.Module,
    targets: Mapping[str, Target],
    moments: Mapping[str, InputMoments],
    gains: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Costs of all blocks of all targets, relative to the size of a block: with
    ``gains`` in units of the model's outputs, else relative to the layer's outputs.
    What was removed before goes before what costs nothing."""
    costs = {}
    for name, target in targets.items():
        layer, seen = dense.get_submodule(name), moments[name]
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        covariance = seen.covariance(centred=layer.bias is not None)
        counted = weight
        if gains is not None:
            counted = weight.double() * gains[name].sqrt().unsqueeze(1)
        with _solving(name, seen):
            cost = removal_costs(counted, covariance, target.block_shape, seen.rounding)
        if gains is None:
            cost /= max(output_energy(weight, covariance), 1e-30)
        gone = zero_blocks(weight, target.block_shape)
        costs[name] = (cost / target.block_size).masked_fill(gone, -1.0)
    return costs


@contextmanager
def _solving(name: str, moments: InputMoments) -> Iterator[None]:
    """Names the layer whose equations have no solution."""
    _check_finite(name, moments)
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"the inputs of '{name}' cannot be fitted; exclude it or give more batches"
        ) from error


def _check_finite(name: str, moments: InputMoments) -> None:
    if not math.isfinite(moments.rounding):
        raise ValueError(
            f"the inputs of '{name}' cannot be fitted: they are not finite; check the "
            "model and the batches"
        )


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
    in_lockstep(runs, [stage[0] for stage in stages], fit)
