"""Fine-tuning a sparse model without losing its zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pybsp import preserve_sparsity
from pybsp.pruning.penalty import block_norms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def zero_blocks_(weight: torch.Tensor) -> torch.Tensor:
    """Zero every other (8, 1) block; returns which blocks live."""
    with torch.no_grad():
        weight.view(weight.shape[0] // 8, 8, -1)[:, :, ::2] = 0.0
    return block_norms(weight.detach(), (8, 1)) != 0


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for step in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()


@pytest.mark.parametrize("known", ["argument", "module", "config"])
def test_zero_blocks_stay_and_the_rest_learns(known: str) -> None:
    model = network()
    alive = zero_blocks_(model[0].weight)
    with torch.no_grad():
        model[0].weight[0, 1] = 0.0  # one zero in a living block
    if known == "module":
        model[0].pybsp_block_shape = (8, 1)
    elif known == "config":
        model.config = type("Config", (), {})()
        model.config.quantization_config = {"modules": {"0": [8, 1]}}
    optimizer = adam(model)
    shape = (8, 1) if known == "argument" else None
    handle = preserve_sparsity(model, optimizer, shape)
    assert handle.modules == ("0",)
    before = model[2].weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(block_norms(model[0].weight.detach(), (8, 1)) != 0, alive)
    assert model[0].weight[0, 1] != 0
    assert not torch.equal(model[2].weight, before)


def test_single_zeros_stay_where_no_block_shape_is_known() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[3, 4] = 0.0
    optimizer = adam(model)
    handle = preserve_sparsity(model, optimizer)
    train(model, optimizer)
    assert handle.modules == ("2",)
    assert (model[2].weight == 0).nonzero().tolist() == [[3, 4]]


def test_the_handle_ends_it() -> None:
    model = network()
    alive = zero_blocks_(model[0].weight)
    optimizer = adam(model)
    with preserve_sparsity(model, optimizer, (8, 1)) as handle:
        train(model, optimizer)
        assert torch.equal(block_norms(model[0].weight.detach(), (8, 1)) != 0, alive)
    train(model, optimizer)
    assert not (block_norms(model[0].weight.detach(), (8, 1)) == 0).any()
    handle.remove()


def test_an_all_zero_initialisation_may_learn() -> None:
    model = network()
    zero_blocks_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    optimizer = adam(model)
    assert preserve_sparsity(model, optimizer).modules == ("0",)
    train(model, optimizer)
    assert model[2].weight.count_nonzero() > 0


def test_momentum_from_before_does_not_revive_blocks() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    alive = zero_blocks_(model[0].weight)
    preserve_sparsity(model, optimizer, (8, 1))
    train(model, optimizer)
    assert torch.equal(block_norms(model[0].weight.detach(), (8, 1)) != 0, alive)


def test_nothing_to_preserve_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="has zeros to preserve"):
        preserve_sparsity(model, adam(model))
    zero_blocks_(model[0].weight)
    with pytest.raises(ValueError, match="module '0' has zeros, but block_shape"):
        preserve_sparsity(model, adam(model), (7, 1))
    with pytest.raises(ValueError, match="has zeros to preserve"):
        preserve_sparsity(model, adam(network()))
