"""``BlockPruner`` in a plain training loop."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pybsp import BlockPruner, BlockPruningConfig, preserve_sparsity
from pybsp.nn import BlockSparseLinear
from pybsp.pruning import model_sparsity
from pybsp.pruning.penalty import block_norms
from pybsp.pruning.schedule import Phase
from pybsp.pruning.state import load_state, save_state

STEPS = 20
FORMS: list[dict[str, Any]] = [
    {},
    {"method": "group_lasso", "lambda_scaling": "sqrt_block_size"},
    {"method": "magnitude", "ramp": "cubic"},
    {"penalty": "decoupled", "reg_lambda": 0.1, "scope": "layer"},
    {"penalty": "proximal", "reg_lambda": "auto", "ramp": "cubic"},
    {"block_shape": (1, "in/8"), "ranking": "relative"},
]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def config(**settings: Any) -> BlockPruningConfig:
    settings.setdefault("phases", (0.2, 0.4, 0.4))
    return BlockPruningConfig(**settings)


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = batch(step)
        F.mse_loss(model(x), x.flip(1)).backward()
        optimizer.step()
        after(step)


def removed_weights(pruner: BlockPruner) -> dict[str, int]:
    """Weights in zero blocks, by layer, counted in the weights themselves."""
    removed = {}
    for name, target in pruner.targets.items():
        weight = pruner.model.get_parameter(f"{name}.weight").detach()
        zero = block_norms(weight, target.block_shape) == 0
        removed[name] = int(zero.sum()) * target.block_size
    return removed


def test_a_threshold_cuts_what_has_fallen_to_it() -> None:
    model, twin = network(), network()
    optimizer, other = adam(model), adam(twin)
    cfg = config(threshold=0.02, overrides={"2": {"threshold": 0.1}})
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    # the twin takes the same steps and is not cut
    later = BlockPruner(twin, config(), total_steps=10 * STEPS).attach(other)
    later.schedule = pruner.schedule
    later.cut = lambda: None  # type: ignore[method-assign]
    train(twin, other, range(pruner.schedule.cut_step))
    train(model, optimizer, range(STEPS))
    removed = 0
    for name, threshold in (("0", 0.02), ("2", 0.1)):
        norms = block_norms(twin.get_submodule(name).weight.detach(), (8, 1))
        assert torch.equal(pruner.masks[name], norms / math.sqrt(8) > threshold)
        removed += int((norms / math.sqrt(8) <= threshold).sum()) * 8
    assert 0 < pruner.sparsity < 0.9
    assert pruner.sparsity == removed / (2 * 16 * 32)
    pruner.finalize()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("penalty", ["gradient", "proximal"])
def test_a_cut_ahead_of_time_is_the_last(penalty: Any, packed: bool) -> None:
    model = network()
    cfg = config(
        penalty=penalty, reg_lambda=0.1, ramp="cubic", packed_retraining=packed
    )
    optimizer = adam(model)
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    train(model, optimizer, range(STEPS // 2))
    assert pruner.phase is Phase.REGULARISE
    pruner.cut()
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    assert pruner.phase is Phase.RETRAIN
    assert pruner.metrics()["pybsp/penalty"] == 0
    train(model, optimizer, range(STEPS // 2, STEPS))
    assert all(torch.equal(pruner.masks[name], masks[name]) for name in masks)
    assert pruner.metrics()["pybsp/masked_steps"] == STEPS - STEPS // 2
    assert not pruner.regulariser.factors
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    pruner.finalize()


class Words(nn.Module):
    """Embeddings and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(40, 16, padding_idx=0)
        self.linear = nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.words(ids))
        return result

    def fit(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            ids = (torch.arange(64) * 7 + step) % 40
            F.mse_loss(self(ids), F.one_hot(ids % 16, 16).float()).backward()
            optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_are_pruned_to_the_target_by_themselves(
    form: dict[str, Any],
) -> None:
    model = Words()
    cfg = config(
        **{**form, "block_shape": (1, 4)},
        embedding_modules=["words"], target_sparsity=0.5,
    )  # fmt: skip
    optimizer = adam(model)
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    model.fit(optimizer, STEPS)
    pruner.finalize()
    for module in (model.words, model.linear):
        norms = block_norms(module.weight.detach(), (1, 4))
        assert int((norms == 0).sum()) == norms.numel() // 2
    counted = {layer.name: layer for layer in model_sparsity(model).layers}
    assert counted["words"].zero_blocks == 80
    assert counted["words"].block_shape == (1, 4)


def test_zeros_of_pruned_embeddings_stay() -> None:
    model = Words()
    cfg = config(block_shape=(1, 4), embedding_modules=["words"], target_sparsity=0.5)
    with torch.no_grad():
        model.words.weight[0] = 1  # as of a checkpoint whose padding was trained
    pruner = BlockPruner(model, cfg, total_steps=STEPS)
    pruner.cut()
    pruner.finalize()
    zero = model.words.weight == 0
    optimizer = adam(model)
    with preserve_sparsity(model, optimizer) as kept:
        assert set(kept.modules) == {"words", "linear"}
        model.fit(optimizer, 3)
    assert torch.equal(model.words.weight == 0, zero)


def test_embeddings_that_start_at_zero_train() -> None:
    model = Words()
    with torch.no_grad():
        model.words.weight.zero_()
        model.linear.weight[:8] = 0
    optimizer = adam(model)
    with preserve_sparsity(model, optimizer) as kept:
        assert kept.modules == ("linear",)
        model.fit(optimizer, 3)
    assert model.words.weight.any()


def test_a_table_with_two_names_is_pruned_once() -> None:
    model = nn.ModuleDict({"one": Words(), "two": Words()})
    model["two"].words.weight = model["one"].words.weight
    cfg = config(block_shape=(1, 4), embedding_modules=["words"])
    pruner = BlockPruner(model, cfg, total_steps=STEPS)
    tables = [t for t in pruner.targets.values() if t.is_embedding]
    assert [t.name for t in tables] == ["one.words"]
    assert tables[0].shared_with == ("two.words",)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [(1e-9, "removes none of 128 blocks"), (99.0, "removes all of 128 blocks but 8")],
)
def test_a_threshold_in_the_wrong_unit_warns(threshold: float, message: str) -> None:
    pruner = BlockPruner(network(), config(threshold=threshold), total_steps=STEPS)
    with pytest.warns(UserWarning, match=message):
        pruner.cut()
    assert pruner.at_target


def test_a_state_of_an_older_version_is_continued() -> None:
    pruner = BlockPruner(network(), config(), total_steps=STEPS)
    state = pruner.state_dict()
    for name in ("embedding_modules", "threshold", "saliency"):
        del state["config"][name]
    pruner.load_state_dict(state)
    other = BlockPruner(network(), config(threshold=0.1), total_steps=STEPS)
    with pytest.raises(ValueError, match="written with threshold = None"):
        other.load_state_dict(state)


@pytest.mark.parametrize("settings", FORMS)
def test_target_is_met_exactly_and_kept(settings: dict[str, Any]) -> None:
    model = network()
    optimizer = adam(model)
    pruner = BlockPruner(model, config(**settings), total_steps=STEPS).attach(optimizer)
    sizes = [t.block_size for t in pruner.targets.values()]

    def check(step: int) -> None:
        assert pruner.step == step + 1
        assert pruner.at_target == (step >= 11)
        if not pruner.at_target:
            return
        removed = removed_weights(pruner)
        assert abs(sum(removed.values()) - 0.8 * 1024) <= max(sizes) / 2
        if pruner.cfg.scope == "layer":
            assert all(abs(n - 0.8 * 512) <= max(sizes) / 2 for n in removed.values())
        assert pruner.sparsity == sum(removed.values()) / 1024

    train(model, optimizer, range(STEPS), check)
    record = pruner.finalize()
    assert record["sparsity"] == pytest.approx(0.8, abs=max(sizes) / 1024)
    assert pruner.finalize() == record
    assert model[0].pybsp_block_shape == pruner.targets["0"].block_shape


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    ],
)
def test_masks_hold_against_momentum_and_decay(make: Callable[..., Any]) -> None:
    model = network()
    optimizer = make(model.parameters())
    pruner = BlockPruner(model, config(), total_steps=STEPS).attach(optimizer)
    train(model, optimizer, range(12))
    kept = {name: mask.clone() for name, mask in pruner.masks.items()}
    before = {name: w.detach().clone() for name, w in pruner._weights().items()}
    train(model, optimizer, range(12, STEPS))
    for name, weight in pruner._weights().items():
        norms = block_norms(weight.detach(), (8, 1))
        assert torch.equal(norms != 0, kept[name])
        assert not torch.equal(weight, before[name])


def test_gradient_form_adds_to_grad_what_the_formula_says() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cfg = config(reg_lambda=0.01, phases=(0.0, 0.6, 0.4))
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    before = model[0].weight.detach().clone()
    F.mse_loss(model(batch(0)), batch(1)).backward()
    grad = model[0].weight.grad.clone()
    optimizer.step()
    leaf = before.clone().requires_grad_()
    norms = leaf.unflatten(0, (4, 8)).norm(dim=1)
    (0.01 * (norms / (norms.detach() + 1e-3))).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, grad + leaf.grad)
    torch.testing.assert_close(model[0].weight, before - 0.1 * (grad + leaf.grad))
    assert pruner.metrics()["pybsp/penalty"] == pytest.approx(0.01 * 128, rel=0.05)


def test_factors_follow_the_weights_only_when_reweighted() -> None:
    def factors(method: str) -> list[torch.Tensor]:
        model = network()
        optimizer = adam(model)
        cfg = config(method=method, reweight_every=0.1, phases=(0.1, 0.5, 0.4))
        pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
        seen: list[torch.Tensor] = []

        def keep(step: int) -> None:
            if 2 <= step < 11:
                seen.append(pruner.regulariser.factors["0"].clone())

        train(model, optimizer, range(STEPS), keep)
        return seen

    fixed = factors("group_lasso")
    assert all(torch.equal(f, fixed[0]) for f in fixed)
    moving = factors("reweighted_group_lasso")
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(moving)]
    assert changes == [False, True] * 4


def test_warm_up_leaves_training_alone() -> None:
    plain, pruned = network(), network()
    optimizer = adam(pruned)
    BlockPruner(pruned, config(), total_steps=STEPS).attach(optimizer)
    train(plain, adam(plain), range(4))
    train(pruned, optimizer, range(4))
    assert torch.equal(plain[0].weight, pruned[0].weight)
    train(pruned, optimizer, range(4, 5))
    assert not torch.equal(plain[0].weight, pruned[0].weight)


@pytest.mark.parametrize("settings", FORMS)
@pytest.mark.parametrize("stop", [0, 3, 4, 9, 12, 17, 20])
def test_resume_at_any_step_repeats_the_run(
    tmp_path: Path, settings: dict[str, Any], stop: int
) -> None:
    whole = network()
    optimizer = adam(whole)
    first = BlockPruner(whole, config(**settings), total_steps=STEPS).attach(optimizer)
    saved: dict[str, Any] = {}
    train(whole, optimizer, range(stop))
    buffer = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict(), first.state_dict()), buffer)
    save_state(first.state_dict(), tmp_path / "state.safetensors")
    train(whole, optimizer, range(stop, STEPS))

    buffer.seek(0)
    model_state, optimizer_state, saved = torch.load(buffer)
    from_file = load_state(tmp_path / "state.safetensors")
    for state in (saved, from_file):
        model = network(seed=1)
        again = adam(model)
        model.load_state_dict(model_state)
        again.load_state_dict(copy.deepcopy(optimizer_state))
        pruner = BlockPruner(model, config(**settings), total_steps=STEPS)
        pruner.load_state_dict(state)
        pruner.attach(again)
        train(model, again, range(stop, STEPS))
        for name, mask in first.masks.items():
            assert torch.equal(mask, pruner.masks[name])
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", FORMS)
def test_packed_retraining_equals_masked(settings: dict[str, Any]) -> None:
    states = []
    for packed in (False, True):
        model = network()
        optimizer = adam(model)
        cfg = config(**settings, packed_retraining=packed)
        pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
        kinds = []
        train(
            model,
            optimizer,
            range(STEPS),
            lambda _, m=model, k=kinds: k.append(type(m[0])),
        )
        assert (kinds[11:] == [BlockSparseLinear] * 9) == packed
        assert kinds[:11] == [nn.Linear] * 11
        assert pruner.metrics()["pybsp/masked_steps"] == 8
        pruner.finalize()
        assert type(model[0]) is nn.Linear
        assert optimizer.param_groups[0]["params"][0] is model[0].weight
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name] == 0, value == 0)
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [11, 12, 17, 20])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
def test_packed_retraining_resumes_from_dense_checkpoints(
    stop: int, before: bool, attach_first: bool
) -> None:
    def packing(packed: bool) -> BlockPruningConfig:
        return config(packed_retraining=packed)

    whole = network()
    optimizer = adam(whole)
    pruner = BlockPruner(whole, packing(before), total_steps=STEPS).attach(optimizer)
    train(whole, optimizer, range(stop))
    buffer = io.BytesIO()
    torch.save(
        (whole.state_dict(), optimizer.state_dict(), pruner.state_dict()), buffer
    )
    train(whole, optimizer, range(stop, STEPS))
    pruner.finalize()
    buffer.seek(0)
    weights, moments, state = torch.load(buffer)
    model = network(seed=1)
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    again = adam(model)
    model.load_state_dict(weights)
    again.load_state_dict(moments)
    pruner = BlockPruner(model, packing(True), total_steps=STEPS)
    if attach_first:
        pruner.attach(again)
    pruner.load_state_dict(state)
    pruner.attach(again)
    assert isinstance(model[0], BlockSparseLinear) == (stop >= 12)
    train(model, again, range(stop, STEPS))
    pruner.finalize()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        if before:
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packed_retraining_refuses_what_it_cannot_exchange() -> None:
    cfg = config(packed_retraining=True)
    with pytest.raises(ValueError, match="inside DataParallel"):
        BlockPruner(nn.DataParallel(network()), cfg, total_steps=STEPS)
    model = network()
    pruner = BlockPruner(model, cfg, total_steps=STEPS)
    with pytest.raises(ValueError, match="LBFGS is not known"):
        pruner.attach(torch.optim.LBFGS(model.parameters()))
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'0' cannot train packed: it has hooks"):
        pruner.attach(adam(model))
    handle.remove()
    optimizer = adam(model)
    pruner.attach(optimizer).cut()
    with pytest.raises(ValueError, match="detach"):
        pruner.load_state_dict(pruner.state_dict())
    assert isinstance(model[0], BlockSparseLinear)
    pruner.detach()
    assert type(model[0]) is nn.Linear
    shared = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    shared[1].weight = shared[0].weight
    pruner = BlockPruner(shared, cfg, total_steps=STEPS)
    with pytest.raises(ValueError, match="shared with '1'"):
        pruner.attach(adam(shared))


def test_state_of_another_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = network()
    optimizer = adam(model)
    pruner = BlockPruner(model, config(), total_steps=STEPS).attach(optimizer)
    train(model, optimizer, range(15))
    state = pruner.state_dict()
    fresh = BlockPruner(network(), config(), total_steps=STEPS)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in state.items() if k != "masks"}, "lacks 'masks'"),
        ({**state, "format": 9}, "format 9 is not 1"),
        ({**state, "total_steps": 50}, "belongs to a run of 50 steps"),
        ({**state, "masks": {}}, "after the cut but has no masks"),
        ({**state, "masks": {"0": state["masks"]["0"]}}, "has no masks entry '2'"),
        (
            {**state, "masks": {**state["masks"], "0": state["masks"]["2"]}},
            "whose block grid is",
        ),
        (
            {**state, "config": {**state["config"], "reg_lambda": 1.0}},
            "written with reg_lambda = 1.0",
        ),
    ]
    for damaged, message in wrong:
        with pytest.raises(ValueError, match="pruner state") as caught:
            fresh.load_state_dict(damaged)
        assert message in str(caught.value)
        assert fresh.step == 0
        assert not fresh.masks
    path = tmp_path / "state.safetensors"
    save_state(state, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"):
        load_state(path)
    with pytest.raises(ValueError, match="missing, truncated"):
        load_state(tmp_path / "none")


def test_accumulated_gradients_are_one_step() -> None:
    def run(parts: int) -> nn.Module:
        model = network()
        optimizer = adam(model)
        pruner = BlockPruner(model, config(reg_lambda=0.01), total_steps=STEPS)
        pruner.attach(optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            for x in batch(step).chunk(parts):
                (F.mse_loss(model(x), x.flip(1)) / parts).backward()
            optimizer.step()
        pruner.finalize()
        return model

    for one, four in zip(run(1).parameters(), run(4).parameters(), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_do_not_count(fused: bool) -> None:
    model = network()
    optimizer = adam(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    cfg = config(penalty="proximal", reg_lambda=0.1, phases=(0.0, 0.6, 0.4))
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    done = 0
    for step in range(6):
        optimizer.zero_grad()
        x = batch(step)
        scaler.scale(F.mse_loss(model(x), x.flip(1))).backward()
        overflow = step % 3 == 1
        if overflow:
            model[0].weight.grad[0, 0] = float("inf")
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        done += not overflow
        assert pruner.step == done
        assert torch.equal(model[0].weight, before) == overflow


def test_penalty_meets_gradients_that_are_still_scaled() -> None:
    def weights(fused: bool) -> torch.Tensor:
        model = network()
        optimizer = adam(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        cfg = config(reg_lambda=0.01, phases=(0.0, 0.6, 0.4))
        BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
        for step in range(5):
            optimizer.zero_grad()
            x = batch(step)
            scaler.scale(F.mse_loss(model(x), x.flip(1))).backward()
            scaler.step(optimizer)
            scaler.update()
        return model[0].weight.detach()

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_gets_the_penalty_too(named: bool) -> None:
    def run(closure_style: bool) -> torch.Tensor:
        model = network()
        optimizer = adam(model)
        cfg = config(reg_lambda=0.01, phases=(0.0, 0.6, 0.4))
        pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
        for step in range(STEPS):
            x = batch(step)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x.flip(1))
                loss.backward()
                return loss

            if not closure_style:
                closure()
                optimizer.step()
            elif named:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
        pruner.finalize()
        return model[0].weight.detach()

    assert torch.equal(run(True), run(False))


def test_missing_gradients_and_other_layouts() -> None:
    model = network()
    model.append(nn.Linear(16, 16))
    transposed = model[0].weight.detach().t().contiguous().t()
    model[0].weight = nn.Parameter(transposed)
    assert not model[0].weight.is_contiguous()
    optimizer = adam(model)
    pruner = BlockPruner(model, config(), total_steps=STEPS).attach(optimizer)
    train(model[:3], optimizer, range(STEPS))
    assert model[3].weight.grad is None
    pruner.finalize()


def test_phases_without_warm_up_and_regularisation_cut_at_once() -> None:
    model = network()
    cfg = config(method="magnitude", phases=(0.0, 0.0, 1.0))
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(adam(model))
    assert pruner.phase is Phase.RETRAIN
    assert pruner.at_target
    assert sum(removed_weights(pruner).values()) == 816


def test_cut_after_the_last_step_when_nothing_is_retrained() -> None:
    model = network()
    optimizer = adam(model)
    cfg = config(phases=(0.2, 0.8, 0.0))
    pruner = BlockPruner(model, cfg, total_steps=STEPS).attach(optimizer)
    train(model, optimizer, range(STEPS))
    assert pruner.finalize()["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_finalize_refuses_what_is_not_pruned() -> None:
    model = network()
    optimizer = adam(model)
    pruner = BlockPruner(model, config(), total_steps=STEPS).attach(optimizer)
    train(model, optimizer, range(5))
    with pytest.raises(ValueError, match="stopped after 5 optimizer steps, before the"):
        pruner.finalize()
    assert not hasattr(model[0], "pybsp_block_shape")
    train(model, optimizer, range(5, STEPS))
    model.load_state_dict(network().state_dict())
    with pytest.raises(ValueError, match="blocks that should be zero"):
        pruner.finalize()
    assert not hasattr(model[0], "pybsp_block_shape")


def test_weights_that_turn_nan_stop_the_cut() -> None:
    model = network()
    pruner = BlockPruner(model, config(), total_steps=STEPS).attach(adam(model))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="became NaN or infinite"):
        pruner.cut()


def test_attach_and_detach() -> None:
    model = network()
    optimizer = adam(model)
    pruner = BlockPruner(model, config(), total_steps=STEPS)
    assert pruner.attach(optimizer).attach(optimizer) is pruner
    train(model, optimizer, range(1))
    assert pruner.step == 1
    other = BlockPruner(model, config(), total_steps=STEPS)
    with pytest.raises(ValueError, match="another BlockPruner is attached"):
        other.attach(optimizer)
    with pytest.raises(ValueError, match="attached to another optimizer"):
        pruner.attach(adam(model))
    pruner.detach()
    pruner.detach()
    train(model, optimizer, range(1))
    assert pruner.step == 1
    other.attach(optimizer)


def test_attach_refuses_foreign_optimizers() -> None:
    model = network()
    pruner = BlockPruner(model, config(), total_steps=STEPS)
    with pytest.raises(ValueError, match=r"does not hold 2 of the weights.*'0'"):
        pruner.attach(adam(network()))
    with pytest.raises(ValueError, match=r"hooks a torch\.optim\.Optimizer"):
        pruner.attach(object())


def test_a_shared_weight_is_pruned_once_and_recorded_twice() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    optimizer = adam(model)
    pruner = BlockPruner(model, config(), total_steps=STEPS).attach(optimizer)
    assert list(pruner.targets) == ["0"]
    train(model, optimizer, range(STEPS))
    record = pruner.finalize()
    assert record["modules"] == {"0": [8, 1], "2": [8, 1]}
    assert record["sparsity"] == pytest.approx(0.8, abs=0.02)


def test_the_config_of_the_model_gets_the_record() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {}

    model = network()
    model.config = Config()
    pruner = BlockPruner(model, config(block_shape=(1, "in/8")), total_steps=STEPS)
    pruner.cut()
    record = pruner.finalize()
    assert model.config.quantization_config == record
    assert record["block_shape"] == [1, "in/8"]
    assert record["modules"] == {"0": [1, 2], "2": [1, 4]}
    assert record["format"] == "dense"
    assert record["format_version"] == 1


@pytest.mark.parametrize("settings", [{}, {"method": "magnitude", "ramp": "cubic"}])
def test_bfloat16_weights(settings: dict[str, Any]) -> None:
    model = network().to(torch.bfloat16)
    optimizer = adam(model)
    pruner = BlockPruner(model, config(**settings), total_steps=STEPS).attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(step).bfloat16()
        F.mse_loss(model(x), x.flip(1)).backward()
        optimizer.step()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(f.dtype == torch.float32 for f in pruner.regulariser.factors.values())
    pruner.finalize()
    assert abs(sum(removed_weights(pruner).values()) - 0.8 * 1024) <= 4


def test_a_tied_weight_is_penalised_and_masked_once() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = shared.weight
    cfg = config(phases=(0, 19, 1), reg_lambda=0.5)
    pruner = BlockPruner(model, cfg, total_steps=STEPS)
    assert list(pruner.targets) == ["0"]
    pruner.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
    model(batch(0)).square().sum().backward()
    assert shared.weight.grad is not None
    before, weight = shared.weight.grad.clone(), shared.weight.detach().clone()
    pruner._before_step(torch.optim.SGD(model.parameters(), lr=1e-3))
    norms = block_norms(weight, (8, 1))
    unit = weight.view(2, 8, 16) / norms[:, None]
    expected = 0.5 / (norms + 1e-3)[:, None] * unit
    added = shared.weight.grad - before
    torch.testing.assert_close(added, expected.view(16, 16), rtol=1e-4, atol=1e-5)
