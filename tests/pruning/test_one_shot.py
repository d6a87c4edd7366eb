"""``prune_one_shot`` on small networks."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pybsp import BlockPruner, BlockPruningConfig, prune_one_shot
from pybsp.pruning import model_sparsity, one_shot
from pybsp.pruning.penalty import block_norms
from pybsp.pruning.sensitivity import output_gains
from pybsp.pruning.targets import select_targets


class Network(nn.Module):
    """Two layers that share their input, and one behind them; tokens with a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 64)
        self.gate = nn.Linear(32, 64)
        self.last = nn.Linear(64, 32, bias=False)
        self.spare = nn.Linear(32, 32)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        assert not self.training
        return self.last(self.first(x).relu() * self.gate(x).sigmoid())


def config(**settings: Any) -> BlockPruningConfig:
    return BlockPruningConfig(
        **{"target_sparsity": 0.5, "exclude_modules": ["spare"], "method": "magnitude",
           "phases": (0, 0, 1.0), **settings}
    )  # fmt: skip


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(32, 32, generator=generator)
    x = torch.randn(count, 4, 40, 32, generator=generator) @ mixed
    return [{"x": part} for part in x]


def error(model: nn.Module, dense: nn.Module) -> float:
    """Of the outputs on inputs that were not seen, relative to their size."""
    x = batches(6)[-1]["x"]
    with torch.no_grad():
        wanted = dense.eval()(x)
        return float((model.eval()(x) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("error_of", ["model", "layer"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (1, "in/8")])
def test_exact_sparsity_and_a_smaller_error_than_a_cut(
    scope: str, block_shape: Any, error_of: str
) -> None:
    cfg = config(scope=scope, block_shape=block_shape)
    dense, fitted, cut = Network(), Network(), Network()
    record = prune_one_shot(fitted, cfg, batches(), error=error_of)
    assert fitted.training
    BlockPruner(cut, cfg, total_steps=10).cut()
    assert record["sparsity"] == 0.5
    layers = {layer.name: layer for layer in model_sparsity(fitted).layers}
    if scope == "layer":
        assert all(layers[name].sparsity == 0.5 for name in ("first", "gate", "last"))
    assert layers["spare"].zeros == 0
    assert error(fitted, dense) < 0.5 * error(cut, dense)
    assert record["modules"].keys() == {"first", "gate", "last"}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_outputs_that_matter_to_the_model_keep_their_weights(scope: str) -> None:
    """Half of the outputs of the first layer hardly reach the model's."""
    dense = Network()
    with torch.no_grad():
        dense.last.weight[:, :32] *= 0.01
    errors, kept = {}, {}
    for of in ("model", "layer"):
        model = copy.deepcopy(dense)
        prune_one_shot(model, config(scope=scope), batches(), error=of)
        errors[of] = error(model, dense)
        nonzero = (model.first.weight != 0).float()
        kept[of] = float(nonzero[32:].sum() / nonzero.sum())
    assert errors["model"] < 0.5 * errors["layer"]
    assert kept["model"] > 0.95
    assert kept["layer"] == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
def test_costs_are_changes_of_the_outputs() -> None:
    """Where inputs are independent, and outputs of a layer move those of the model in
    directions at right angles, the cost of a column is the change without it: in layers
    whose outputs differ in size by a thousand, and in what they matter."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    turns = [torch.linalg.qr(torch.randn(8, 8)).Q for _ in range(2)]
    model[0].weight.copy_(1e-3 * turns[0])
    model[1].weight.copy_(1e3 * torch.diag(1 + torch.rand(8))[torch.randperm(8)])
    model[2].weight.copy_(turns[1] * torch.logspace(-1, 1, 8))
    x = torch.randn(20000, 8)
    cfg = config(exclude_modules=["2"], block_shape=("out", 1))
    targets = {t.name: t for t in select_targets(model, cfg)}
    moments = one_shot._moments(model, [("0",), ("1",)], [x])
    gains = output_gains(model, list(targets), [x])
    costs = one_shot._costs(model, targets, moments, gains)
    for name, cost in costs.items():
        seen = x if name == "0" else model[0](x)
        for column in range(8):
            cut = copy.deepcopy(model)
            layer = cut[int(name)]
            layer.bias += layer.weight[:, column] * seen[:, column].mean()
            layer.weight[:, column] = 0
            change = float((cut(x) - model(x)).square().sum())
            assert float(8 * cost[0, column]) == pytest.approx(change, rel=0.1)


def test_later_layers_make_up_for_earlier_ones() -> None:
    """The last layer is fitted to what the pruned layers before it give."""
    cfg = config(exclude_modules=["spare", "last"], target_sparsity=0.8)
    dense, model = Network(), Network()
    prune_one_shot(model, cfg, batches())
    before = error(model, dense)
    last = config(
        target_sparsity=0.8,
        overrides={"last": {"target_sparsity": 0.01}},
    )
    whole = Network()
    prune_one_shot(whole, last, batches())
    assert error(whole, dense) < 0.9 * before


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_second_cut_goes_on_from_what_is_left(scope: str) -> None:
    model = Network()
    left = []
    for sparsity in (0.5, 0.8):
        prune_one_shot(model, config(target_sparsity=sparsity, scope=scope), batches())
        names = ("first", "gate", "last")
        left.append(
            torch.cat([
                block_norms(model.get_submodule(name).weight, (8, 1)).flatten() != 0
                for name in names
            ])
        )  # fmt: skip
    assert not (left[1] & ~left[0]).any()
    assert int(left[1].sum()) == pytest.approx(0.2 * left[1].numel(), abs=2)


def test_what_reconstruction_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="which a threshold of norms does not fit"):
        prune_one_shot(Network(), config(threshold=0.1), batches())
    with pytest.raises(ValueError, match="error must be 'model' or 'layer'; got 'x'"):
        prune_one_shot(Network(), config(), batches(), error="x")
    with pytest.raises(ValueError, match="embedding tables are none"):
        prune_one_shot(Network(), config(embedding_modules=["words"]), batches())


def test_padding_does_not_count() -> None:
    padded, models = batches(), []
    for filling in (0.0, 100.0):
        model = Network()
        for batch in padded:
            batch["attention_mask"] = torch.ones(4, 40, dtype=torch.long)
            batch["attention_mask"][:, 30:] = 0
            batch["x"][:, 30:] = filling
        prune_one_shot(model, config(), padded)
        models.append(model)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_training_goes_on_with_the_same_blocks() -> None:
    model, cfg = Network(), config(target_sparsity=0.8, max_layer_sparsity=0.85)
    prune_one_shot(model, cfg, batches())
    kept = {n: block_norms(p, (8, 1)) != 0 for n, p in pruned_weights(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = BlockPruner(model, cfg, total_steps=3).attach(optimizer)
    model.eval()
    for batch in batches(3):
        optimizer.zero_grad()
        model(**batch).square().mean().backward()
        optimizer.step()
    pruner.finalize()
    for name, weight in pruned_weights(model):
        assert torch.equal(block_norms(weight, (8, 1)) != 0, kept[name])


def pruned_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, p.detach())
        for name, p in model.named_parameters()
        if p.dim() == 2 and "spare" not in name
    ]


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, [], "batches is empty"),
        ({"exclude_modules": ()}, batches(1), "'spare' ran 0 times"),
    ],
)
def test_refusals_change_nothing(settings: Any, inputs: Any, message: str) -> None:
    model = Network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_one_shot(model, config(**settings), inputs)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Opaque(Network):
    """Its outputs have no derivatives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x).detach()


def test_a_model_without_derivatives_is_charged_by_layer() -> None:
    model, expected = Opaque(), Network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="pass error='layer'"):
        prune_one_shot(model, config(), batches())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    prune_one_shot(model, config(), batches(), error="layer")
    prune_one_shot(expected, config(), batches(), error="layer")
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


class Turning(Network):
    """Runs its layers in an order that depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.first, self.gate][:: 1 if x.shape[0] == 4 else -1]
        return self.last(parts[0](x) * parts[1](x.tanh()))


def test_an_order_that_changes_is_refused() -> None:
    first, second = batches(2)
    second["x"] = second["x"][:2]
    with pytest.raises(ValueError, match="'gate' runs before 'first'"):
        prune_one_shot(Turning(), config(), [first, second])


def threads_now() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("Threads:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forward_takes_one_thread() -> None:
    """Not a team of threads each; and the caller computes with as many as before."""
    model, before = Network(), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = threads_now()
        inputs = [{"x": torch.randn(4, 400, 32)} for _ in range(40)]
        with ThreadPoolExecutor(1) as sampler:
            done = threading.Event()

            def sample() -> int:
                largest = 0
                while not done.wait(0.001):
                    largest = max(largest, threads_now())
                return largest

            sampled = sampler.submit(sample)
            try:
                prune_one_shot(model, config(), inputs)
            finally:
                done.set()
            most = sampled.result()
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(before)
    assert most - first <= 2 * 40 + 8


@pytest.mark.parametrize(
    "inputs",
    [
        [torch.zeros(4, 32)],
        [torch.ones(1, 32)],
        [100 + 0.01 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))],
        [torch.full((64, 32), 1e4)],
    ],
    ids=["zeros", "one example", "far from zero", "constant"],
)
def test_inputs_that_hardly_vary(inputs: list[torch.Tensor]) -> None:
    dense, model = Network(), Network()
    record = prune_one_shot(model, config(), inputs)
    assert record["sparsity"] == 0.5
    with torch.no_grad():
        wanted, got = dense.eval()(inputs[0]), model.eval()(inputs[0])
    assert float((got - wanted).norm()) <= 0.05 * float(wanted.norm()) + 1e-6


@pytest.mark.parametrize("failing", ["nan", "unsolvable"])
def test_what_cannot_be_fitted_names_the_layer_and_changes_nothing(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Network()
    inputs = batches()
    if failing == "nan":
        inputs[1]["x"][0, 0, 0] = torch.nan
        message = "'first' cannot be fitted: they are not finite"
    else:
        refit, calls = one_shot.refit, iter(range(3))

        def fail_in_the_last(*arguments: Any) -> Any:
            if next(calls) == 2:
                torch.linalg.cholesky(-torch.eye(2))
            return refit(*arguments)

        monkeypatch.setattr(one_shot, "refit", fail_in_the_last)
        message = "'last' cannot be fitted; exclude it"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_one_shot(model, config(), inputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class ByKeyword(Network):
    """Calls its layers by keyword, on two arguments of its own."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        hidden = self.first(input=x).relu() * self.gate(input=gate).sigmoid()
        return self.last(input=hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [tuple, list])
def test_arguments_by_keyword_and_several_of_them(kind: Any) -> None:
    expected, model = Network(), ByKeyword()
    prune_one_shot(expected, config(), batches())
    prune_one_shot(model, config(), [kind([b["x"], b["x"]]) for b in batches()])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_every_module_keeps_its_mode() -> None:
    model = Network().train()
    model.gate.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    prune_one_shot(model, config(), batches(1))
    assert {n: m.training for n, m in model.named_modules()} == modes


class Skipping(Network):
    """Leaves its last layer out, depending on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        hidden = self.first(x) * self.gate(x)
        return self.last(hidden) if x.shape[0] == 4 else hidden


def test_a_layer_that_one_batch_leaves_out_is_refused() -> None:
    first, second = batches(2)
    second["x"] = second["x"][:2]
    with pytest.raises(ValueError, match="'last' does not run in one of the batches"):
        prune_one_shot(Skipping(), config(), [first, second])
