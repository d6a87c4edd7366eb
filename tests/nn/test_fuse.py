import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pybsp.blocks import expand_blocks
from pybsp.nn import pack_, unpack_
from pybsp.nn.fuse import FusedActivation, activation_of


class Intermediate(nn.Module):
    """The children that BERT's module has."""

    def __init__(self, activation):
        super().__init__()
        self.dense = nn.Linear(16, 32)
        self.intermediate_act_fn = activation

    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x))


class Normed(Intermediate):
    """The same names, but something happens before the activation."""

    def __init__(self, activation):
        super().__init__(activation)
        self.LayerNorm = nn.LayerNorm(32)

    def forward(self, x):
        return self.intermediate_act_fn(self.LayerNorm(self.dense(x)))


class FeedForward(nn.Module):
    """The children that DistilBERT's module has."""

    def __init__(self, activation):
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.lin1 = nn.Linear(16, 32)
        self.lin2 = nn.Linear(32, 16)
        self.activation = activation

    def forward(self, x):
        return self.dropout(self.lin2(self.activation(self.lin1(x))))


def model_with(parent, zeros_in=("dense", "lin1", "lin2")):
    torch.manual_seed(0)
    for name, child in parent.named_children():
        if isinstance(child, nn.Linear) and name in zeros_in:
            mask = torch.rand(child.out_features // 8, child.in_features) < 0.5
            child.weight.data *= expand_blocks(mask, (8, 1))
    return nn.ModuleDict({"parent": parent}).eval()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.GELU(), "gelu"),
        (F.gelu, "gelu"),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (nn.ReLU6(), None),
        (nn.Threshold(0.03, 0.0), None),
        (nn.Tanh(), None),
        (nn.Identity(), None),
        (nn.Softmax(0), None),
        (lambda x: x * torch.sigmoid(1.702 * x), None),
        (lambda x: F.gelu(x).clamp(-10, 10), None),
        (lambda x: x.sum(), None),
        (None, None),
    ],
)
def test_activations_are_known_by_what_they_compute(function, name):
    assert activation_of(function) == name


def test_one_thread_makes_the_first_call_of_a_vector_function(monkeypatch):
    sizes, erf = [], torch.erf

    def record(x):
        sizes.append(x.numel())
        return erf(x)

    monkeypatch.setattr(torch, "erf", record)
    assert activation_of(lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))) == "gelu"
    assert sizes[0] == 1 < sizes[1]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.ReLU6(inplace=True), None),
        (nn.Hardtanh(0.0, 3.0, inplace=True), None),
        (nn.SiLU(inplace=True), "silu"),
    ],
)
def test_an_activation_that_works_in_place_is_told_apart(function, name):
    assert activation_of(function) == name


@pytest.mark.parametrize("activation", [nn.GELU(), F.gelu, nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("kind", [Intermediate, FeedForward])
def test_fusing_keeps_the_result_and_is_undone(kind, activation):
    model = model_with(kind(activation))
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = model["parent"](x)
        report = pack_(model, min_gain=0)
        packed = model["parent"](x)
        torch.testing.assert_close(packed, before)
        attribute = "intermediate_act_fn" if kind is Intermediate else "activation"
        first = "dense" if kind is Intermediate else "lin1"
        assert report.fused == (f"parent.{first}",)
        assert isinstance(getattr(model["parent"], attribute), FusedActivation)
        assert getattr(model["parent"], first).activation is not None
        unpack_(model)
        assert getattr(model["parent"], attribute) is activation
        assert torch.equal(model["parent"](x), before)


def test_not_fused_when_told_not_to():
    model = model_with(Intermediate(nn.GELU()))
    assert pack_(model, min_gain=0, fuse=False).fused == ()
    assert isinstance(model["parent"].intermediate_act_fn, nn.GELU)


def test_not_fused_when_that_layer_stays_dense():
    model = model_with(FeedForward(nn.GELU()), zeros_in=("lin2",))
    assert pack_(model, min_gain=0).fused == ()
    assert isinstance(model["parent"].activation, nn.GELU)


def test_not_fused_across_other_modules_or_unknown_activations():
    for parent in (Normed(nn.GELU()), Intermediate(nn.Tanh())):
        model = model_with(parent)
        x = torch.randn(3, 16)
        before = parent(x)
        assert pack_(model, min_gain=0).fused == ()
        torch.testing.assert_close(parent(x), before)


def test_not_fused_when_somebody_watches_the_activation():
    model = model_with(Intermediate(nn.GELU()))
    seen = []
    model["parent"].intermediate_act_fn.register_forward_hook(
        lambda *args: seen.append(args)
    )
    assert pack_(model, min_gain=0).fused == ()
    model["parent"](torch.randn(3, 16))
    assert len(seen) == 1


def test_a_layer_that_two_modules_share_is_not_fused() -> None:
    """Its activation would be computed twice in the second."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2,
                        num_hidden_layers=2, vocab_size=50)  # fmt: skip
    model = BertModel(config).eval()
    layers = model.encoder.layer
    with torch.no_grad():
        layers[0].intermediate.dense.weight[8:] = 0
    layers[1].intermediate.dense = layers[0].intermediate.dense
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        expected = model(ids)[0]
        pack_(model, block_shape=(8, 1), min_gain=0)
        assert layers[0].intermediate.dense.activation is None
        torch.testing.assert_close(model(ids)[0], expected)
