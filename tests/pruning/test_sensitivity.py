"""``output_gains`` against derivatives by every output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pybsp.pruning import sensitivity
from pybsp.pruning.sensitivity import output_gains


class Network(nn.Module):
    """Tokens through two layers; ``returns`` shapes the result."""

    def __init__(self, returns: Any = lambda z: z, *, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10)
        self.act = nn.Tanh() if not inplace else nn.ReLU(inplace=True)
        self.second = nn.Linear(10, 4)
        self.aside = nn.Linear(6, 3)
        self.returns = returns

    def forward(self, x: torch.Tensor) -> Any:
        self.aside(x)
        return self.returns(self.second(self.act(self.first(x))))


class Mixing(Network):
    """Every token looks at all others, as far as they are no padding."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Any:
        z = self.second(self.act(self.first(x)))
        kept = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        return self.returns(z + (z * kept.unsqueeze(2)).sum(1, keepdim=True))


NAMES = ("first", "second")


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, 7, 6, generator=generator)} for _ in range(3)]


def exact(model: Network, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Sum over tokens and outputs of the squared derivatives by ``first``'s outputs,
    one at a time."""
    total = torch.zeros(10, dtype=torch.float64)
    for batch in inputs:
        for token in batch["x"].reshape(-1, 6):
            y = model.first(token).detach()
            jacobian = torch.autograd.functional.jacobian(
                lambda y: model.second(model.act(y.clone())), y
            )
            total += jacobian.double().square().sum(0)
    return total


@pytest.mark.parametrize("inplace", [False, True])
def test_the_mean_over_probes_is_the_jacobian(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "PROBES", 300)
    model = Network(inplace=inplace)
    gains = output_gains(model, NAMES, batches())
    torch.testing.assert_close(
        gains["first"], exact(model, batches()), rtol=0.1, atol=0
    )
    # each of 105 tokens moves its own output by as much
    torch.testing.assert_close(
        gains["second"], torch.full((4,), 105.0).double(), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_does_not_count(
    per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that of the outputs nor that of the layer: the gains are those of texts
    that were never padded. One logit for each token is padded as well."""
    monkeypatch.setattr(sensitivity, "PROBES", 600)
    model = Mixing(lambda z: z[..., 0] if per_token else z)
    inputs = [{"x": batch["x"][:, :2]} for batch in batches()]
    expected = output_gains(model, NAMES, inputs)
    padded = batches()
    for batch in padded:
        batch["attention_mask"] = torch.ones(5, 7, dtype=torch.long)
        batch["attention_mask"][:, 2:] = 0
    gains = output_gains(model, NAMES, padded)
    for name in NAMES:
        torch.testing.assert_close(gains[name], expected[name], rtol=0.2, atol=1e-9)


def test_frozen_and_without_a_trace() -> None:
    model = Network()
    expected = output_gains(model, NAMES, batches())
    model.requires_grad_(False)
    with torch.no_grad():
        frozen = output_gains(model, NAMES, batches())
    for name in NAMES:
        torch.testing.assert_close(frozen[name], expected[name])
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "returns",
    [
        lambda z: {"loss": z.mean(), "logits": z, "hidden_states": (z,)},
        lambda z: (z.mean(), z),
        lambda z: {"states": 100 * z, "logits": z},
        lambda z: {"start_logits": z[..., :2], "end_logits": z[..., 2:]},
        lambda z: (z, 100 * z),
        lambda z: [torch.zeros(3, dtype=torch.long), z],
    ],
    ids=["loss", "loss first", "states", "two logits", "tuple", "integers"],
)
def test_which_outputs_count(returns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "PROBES", 300)
    model = Network(returns)
    gains = output_gains(model, NAMES, batches())
    torch.testing.assert_close(
        gains["first"], exact(model, batches()), rtol=0.1, atol=0
    )


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda z: {"loss": z.mean()}, "returns no tensor of floating point"),
        (lambda _: None, "returns no tensor of floating point"),
        (lambda z: z.detach(), "no derivatives lead .* to 'first'.*error='layer'"),
        (lambda z: z / 0 * 0, "'first' are not finite"),
    ],
)
def test_outputs_that_say_nothing_are_refused(returns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        output_gains(Network(returns), NAMES, batches())


def test_a_layer_that_does_not_reach_the_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"to 'aside', .* exclude it"):
        output_gains(Network(), ("first", "aside"), batches())


def test_inference_mode_and_checkpoints() -> None:
    model = Network()
    expected = output_gains(model, NAMES, batches())
    with torch.inference_mode():
        found = output_gains(model, NAMES, batches())
    inner = model.first.forward
    model.first.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
    again = output_gains(model, NAMES, batches())
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(again[name], expected[name])
