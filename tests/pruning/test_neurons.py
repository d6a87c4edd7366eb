"""The order of feed-forward neurons: free, and made use of by ``prune_one_shot``."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from encoders import ARCHITECTURES, build, text
from torch import nn

from pybsp import BlockPruningConfig, pack_, prune_one_shot
from pybsp.pruning import one_shot
from pybsp.pruning.neurons import find_feed_forward, order_neurons_
from pybsp.pruning.reconstruction import InputMoments
from pybsp.pruning.targets import select_targets

KNOWN = ["bert", "roberta", "electra", "distilbert", "modernbert", "mpnet", "vit"]


def dense(name: str, head: str = "Model") -> nn.Module:
    """An encoder of random weights, without zeros."""
    model = build(name, head)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def inputs(name: str) -> Any:
    if name in ("vit", "deit"):
        return {"pixel_values": torch.randn(4, 3, 32, 32)}
    return text(4, 16, "right")


def facts(model: nn.Module, cfg: BlockPruningConfig) -> Any:
    """Targets, random gains and the moments of random inputs."""
    torch.manual_seed(2)
    targets = {t.name: t for t in select_targets(model, cfg)}
    gains, moments = {}, {}
    for name, target in targets.items():
        rows, columns = target.weight_shape
        gains[name] = torch.rand(rows, dtype=torch.float64)
        moments[name] = InputMoments()
        x = torch.randn(50, columns) * torch.rand(columns)
        moments[name].add(x, x)
    return targets, gains, moments


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_the_order_falls_and_changes_no_result(name: str) -> None:
    model, batch = dense(name), inputs(name)
    wanted = model(**batch)[0]
    targets, gains, moments = facts(model, BlockPruningConfig())
    known = copy.deepcopy(gains)
    parts = list(find_feed_forward(model))
    assert len(parts) == ARCHITECTURES[name][1].get("num_hidden_layers", 2)
    before = copy.deepcopy(model)
    order_neurons_(model, targets, gains, moments)
    torch.testing.assert_close(model(**batch)[0], wanted, rtol=1e-4, atol=1e-5)
    for part in parts:
        first, second = (model.get_submodule(n) for n in (part.first, part.second))
        centred = second.bias is not None
        variance = moments[part.second].covariance(centred).diagonal()
        matter = (gains[part.second] @ second.weight.double().square()) * variance
        assert (matter.diff() <= 0).all()
        # what is known of a row of the first layer went with it
        old = before.get_submodule(part.first)
        assert not torch.equal(first.weight, old.weight)
        rows = torch.cdist(first.weight, old.weight).argmin(1)
        assert torch.equal(gains[part.first], known[part.first][rows])


def test_parts_that_stay_as_they_are() -> None:
    """Cut before, half of a part targeted, or blocks of one neuron."""
    model = dense("bert")
    first, second = (f"encoder.layer.{i}.intermediate.dense" for i in (0, 1))
    with torch.no_grad():
        model.get_submodule(first).weight[:8, 3] = 0
    for cfg in (
        BlockPruningConfig(),
        BlockPruningConfig(exclude_modules=["output", "pooler"]),
        BlockPruningConfig(block_shape=(1, 1)),
    ):
        ordered = copy.deepcopy(model)
        order_neurons_(ordered, *facts(ordered, cfg))
        same = {
            name: torch.equal(
                ordered.get_submodule(name).weight, model.get_submodule(name).weight
            )
            for name in (first, second)
        }
        moves = cfg.exclude_modules is None and cfg.block_shape == (8, 1)
        assert same == {first: True, second: not moves}


@torch.no_grad()
def test_weights_of_neurons_that_hardly_matter_go_first() -> None:
    """In both layers, whole groups of them, so that less is left of the error."""
    ratios = []
    for seed in range(4):
        model = dense("bert", "ForSequenceClassification")
        generator = torch.Generator().manual_seed(seed)
        for layer in model.bert.encoder.layer:
            columns = torch.randperm(96, generator=generator)[:48]
            layer.output.dense.weight[:, columns] *= 0.01
        *batches, unseen = [text(16, 16, "right", seed) for seed in range(5)]
        wanted = model(**unseen).logits
        errors, early = {}, {}
        for error in ("model", "layer"):
            pruned = copy.deepcopy(model)
            cfg = BlockPruningConfig(target_sparsity=0.6)
            prune_one_shot(pruned, cfg, batches, error=error)
            shapes = {n: p.shape for n, p in pruned.named_parameters()}
            assert shapes == {n: p.shape for n, p in model.named_parameters()}
            errors[error] = float((pruned(**unseen).logits - wanted).square().mean())
            kept = torch.stack([
                layer.intermediate.dense.weight != 0
                for layer in pruned.bert.encoder.layer
            ])  # fmt: skip
            early[error] = float(kept[:, :48].sum() / kept.sum())
            if error == "model":
                removed = pack_(pruned, min_gain=0).removed
                assert sum(r.after for r in removed if r.kind == "neurons") <= 112
        assert early["model"] > 0.95
        assert early["layer"] < 0.6
        ratios.append(errors["model"] / errors["layer"])
    assert statistics.geometric_mean(ratios) < 0.8


class Remembering(nn.Module):
    """Keeps what it computed, as models with a hook of their user do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        self.last = self.model(**inputs).logits
        return self.last


def test_what_the_model_keeps_and_a_late_failure_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Remembering(dense("bert", "ForSequenceClassification"))
    batches = [text(16, 16, "right", seed) for seed in range(4)]
    before = copy.deepcopy(model.state_dict())

    def fail(*_: Any) -> None:
        raise RuntimeError("late")

    cfg = BlockPruningConfig()
    with monkeypatch.context() as patched:
        patched.setattr(one_shot, "_refit_all", fail)
        with pytest.raises(RuntimeError, match="late"):
            prune_one_shot(model, cfg, batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert prune_one_shot(model, cfg, batches)["sparsity"] == pytest.approx(0.8, 1e-3)


@pytest.mark.parametrize("scope", ["global", "layer", "balanced"])
@pytest.mark.parametrize("weak", [1.0, 1e-3])
def test_a_second_cut_keeps_the_order_and_the_zeros(scope: str, weak: float) -> None:
    """Also where neurons cost nothing any more, whose columns are gone."""
    model = dense("bert", "ForSequenceClassification")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight *= weak
    batches = [text(16, 16, "right", seed) for seed in range(4)]
    gone: dict[str, torch.Tensor] = {}
    for sparsity in (0.5, 0.8, 0.9):
        cfg = BlockPruningConfig(target_sparsity=sparsity, scope=scope)  # type: ignore[arg-type]
        prune_one_shot(model, cfg, batches)
        for name, parameter in model.named_parameters():
            if name in gone:
                assert (parameter[gone[name]] == 0).all(), (name, sparsity)
        gone = {n: p == 0 for n, p in model.named_parameters() if "layer." in n}


@torch.no_grad()
def test_neurons_are_found_on_every_device() -> None:
    model = dense("bert")
    expected = list(find_feed_forward(model))
    assert list(find_feed_forward(model.to("meta"))) == expected
