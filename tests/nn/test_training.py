"""Training on packed layers against the same training with masks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pybsp
from pybsp.blocks import BlockShape, expand_blocks
from pybsp.nn import BlockSparseLinear, PackedTraining, pack_for_training_

Optimizers = dict[str, tuple[Any, dict[str, Any]]]
OPTIMIZERS: Optimizers = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "fused": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "fused": True}),
    "foreach": (torch.optim.Adam, {"lr": 1e-3, "foreach": True, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
}


def network(block_shape: BlockShape = (8, 1), seed: int = 0) -> nn.Sequential:
    """Three quarters of the blocks of both linear layers are zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    for linear in (model[0], model[2]):
        grid = (
            linear.out_features // block_shape[0],
            linear.in_features // block_shape[1],
        )
        mask = torch.rand(grid) < 0.25
        mask[0, 0], mask[-1, -1] = True, False
        with torch.no_grad():
            linear.weight *= expand_blocks(mask, block_shape)
        linear.pybsp_block_shape = block_shape
    return model


def make_optimizer(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    make, options = OPTIMIZERS[kind]
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights}]
    result: torch.optim.Optimizer = make(groups, **options)
    return result


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    states = optimizer.state_dict()["state"]
    return [states[index] for index in sorted(states)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (1, 8)], ids=str)
def test_steps_equal_those_with_masks(kind: str, block_shape: BlockShape) -> None:
    masked, packed = network(block_shape), network(block_shape)
    one, other = make_optimizer(masked, kind), make_optimizer(packed, kind)
    kept = pybsp.preserve_sparsity(masked, one)
    first = pybsp.preserve_sparsity(packed, other)
    assert train(masked, one, range(3)) == train(packed, other, range(3))
    first.remove()
    handle = pack_for_training_(packed, other)
    assert handle.modules == ("0", "2") == kept.modules
    assert all(isinstance(packed[i], BlockSparseLinear) for i in (0, 2))
    losses = train(masked, one, range(3, 15)), train(packed, other, range(3, 15))
    # Rounding of single steps, which differ in the order of additions alone.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for check in ("packed", "unpacked"):
        for name, weight in masked.state_dict().items():
            found = packed.state_dict()[name]
            assert torch.equal(found == 0, weight == 0), (check, name)
            torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(moments(other), moments(one), strict=True):
            for key, value in theirs.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)
        handle.unpack()
    assert type(packed[0]) is type(packed[2]) is nn.Linear
    train(masked, one, range(15, 17))
    pybsp.preserve_sparsity(packed, other)
    train(packed, other, range(15, 17))
    torch.testing.assert_close(packed[0].weight, masked[0].weight, rtol=1e-4, atol=1e-5)


def test_modules_and_parameters_come_back_as_they_were() -> None:
    model = network()
    optimizer = make_optimizer(model)
    linear, parameters = model[0], list(model.parameters())
    groups = [list(group["params"]) for group in optimizer.param_groups]
    with pybsp.preserve_sparsity(model, optimizer):
        train(model, optimizer, range(2))
    with pack_for_training_(model, optimizer) as handle:
        assert model[0].bias is linear.bias
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert model[0].weight_values.grad is not None  # of the step before
        train(model, optimizer, range(2))
        model.eval()
    handle.unpack()
    assert model[0] is linear
    assert not linear.training
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for before, group in zip(groups, optimizer.param_groups, strict=True):
        assert all(a is b for a, b in zip(before, group["params"], strict=True))
    assert set(optimizer.state) == set(parameters)
    assert not optimizer._optimizer_state_dict_post_hooks


def test_gradients_need_no_copy() -> None:
    model = network((4, 4))
    optimizer = make_optimizer(model)
    pack_for_training_(model, optimizer)
    train(model, optimizer, range(2))
    values = model[0].weight_values
    assert values.grad.stride() == values.stride() == (16, 1, 4)
    assert optimizer.state[values]["exp_avg"].stride() == values.stride()


def test_what_is_saved_is_dense_and_resumes_either_way() -> None:
    model = network()
    optimizer = make_optimizer(model)
    pack_for_training_(model, optimizer)
    train(model, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    losses = train(model, optimizer, range(5, 9))
    for packed_before_loading in (False, True):
        buffer.seek(0)
        weights, state = torch.load(buffer)
        assert state["state"][2]["exp_avg"].shape == (32, 16)
        twin = copy.deepcopy(state)
        again = network(seed=0)
        optimizer = make_optimizer(again)
        if packed_before_loading:
            pack_for_training_(again, optimizer)
        again.load_state_dict(weights)
        optimizer.load_state_dict(state)
        if not packed_before_loading:
            pack_for_training_(again, optimizer)
        for index, entry in twin["state"].items():  # the caller's is not changed
            assert torch.equal(entry["exp_avg"], state["state"][index]["exp_avg"])
        assert train(again, optimizer, range(5, 9)) == losses


def test_a_schedule_and_accumulated_gradients_go_on() -> None:
    results = []
    for pack in (False, True):
        model = network()
        optimizer = make_optimizer(model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
        kept = pybsp.preserve_sparsity(model, optimizer)
        F.mse_loss(model(x[:12]), x[:12].flip(1)).backward()
        if pack:  # in the middle of a step
            kept.remove()
            pack_for_training_(model, optimizer)
        F.mse_loss(model(x[12:]), x[12:].flip(1)).backward()
        for _ in range(3):
            optimizer.step()
            schedule.step()
        results.append((model.state_dict()["0.weight"], schedule.get_last_lr()))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)


def test_what_cannot_train_packed_is_refused_and_nothing_changed() -> None:
    def refused(model: nn.Module, optimizer: Any, match: str) -> None:
        before = list(model.modules())
        with pytest.raises(ValueError, match=match):
            pack_for_training_(model, optimizer)
        assert all(a is b for a, b in zip(before, model.modules(), strict=True))

    model = network()
    refused(model, torch.optim.LBFGS(model.parameters()), "LBFGS is not known")
    refused(model, torch.optim.SGD(network().parameters()), "trains none of the layers")
    refused(nn.DataParallel(model), make_optimizer(model), "inside DataParallel")
    compiled = torch.compile(model, backend="eager")
    refused(compiled, make_optimizer(model), "inside OptimizedModule")  # type: ignore[arg-type]
    odd = make_optimizer(model)
    odd.state[model[0].weight]["row"] = torch.zeros(32)
    refused(model, odd, "row of '0' has shape")
    model[0].weight.register_hook(lambda grad: grad)
    refused(model, make_optimizer(model), "gradient hooks")
    shared = network()
    shared.append(nn.Linear(16, 32))
    shared[3].weight = shared[0].weight
    refused(shared, make_optimizer(shared), "'0' cannot train packed: .* with '3'")
    dense = nn.Sequential(nn.Linear(8, 8))
    refused(dense, make_optimizer(dense), "zero blocks")


def test_only_what_the_optimizer_trains_is_packed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    handle = pack_for_training_(model, optimizer)
    assert isinstance(handle, PackedTraining)
    assert handle.modules == ("2",)
    assert type(model[0]) is nn.Linear
