"""Int8 training: the arithmetic of the int8 product, its gradients, and no traces."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from helpers import EPS, assert_within, block_sparse_weight
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from pybsp import QuantizationAwareTraining
from pybsp.nn import BlockSparseLinear
from pybsp.quantization import quantize_rows, quantize_tokens
from pybsp.quantization.linear import FakeQuantizedLinear, fake_quantize_, restore_


def sparse_linear(out: int = 24, inputs: int = 40, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, out, bias=bias)
    linear.weight.data = block_sparse_weight((out, inputs), (8, 1), 0.4)
    return linear


def int8_product(linear: nn.Linear, x: torch.Tensor, scale: float) -> torch.Tensor:
    """The contract in exact integers."""
    q_w, rows = quantize_rows(linear.weight, "max")
    q_x, tokens = quantize_tokens(x, scale)
    sums = (q_x.long() @ q_w.long().t()).float()
    y = (sums * rows) * tokens[..., None]
    return y if linear.bias is None else y + linear.bias.detach()


@pytest.mark.parametrize("scale", [0.0, 0.02])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 5, 40), (2, 3, 4, 40)])
def test_forward_is_the_int8_product(shape, bias, scale):
    linear, x = sparse_linear(bias=bias), torch.randn(shape)
    expected = int8_product(linear, x, scale)
    fake_quantize_(linear, input_scale=scale)
    y = linear(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)  # the sums are below 2^24
    exact = nn.functional.linear(x, linear.weight, linear.bias)
    assert not torch.equal(y, exact)


def test_forward_with_sums_that_float32_rounds():
    linear = nn.Linear(5000, 8)
    linear.weight.data.uniform_(0.9, 1.0)
    x = torch.rand(4, 5000) * 0.1 + 0.9
    expected = int8_product(linear, x, 0.0)
    assert float(expected.min()) * 127**2 > 1.1 * 2**24
    fake_quantize_(linear)
    bound = EPS * (4 + math.sqrt(5000)) * expected.abs()
    assert_within(linear(x), expected, bound)


@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_gradients_are_straight_through(scale):
    linear, x = sparse_linear(), torch.randn(6, 40, requires_grad=True)
    q_w, rows = quantize_rows(linear.weight, "max")
    q_x, tokens = quantize_tokens(x, scale)
    wide_w = q_w.double() * rows.double()[:, None]
    wide_x = q_x.double() * tokens.double()[:, None]
    fake_quantize_(linear, input_scale=scale)
    grad = torch.randn(6, 24)
    linear(x).backward(grad)
    inside = torch.ones_like(x, dtype=torch.bool)
    if scale:
        inside = x.detach().abs() / scale <= 127.5
        assert 0 < int((~inside).sum()) < x.numel()
    expected_x = (grad.double() @ wide_w) * inside
    expected_w = (grad.double().t() @ wide_x) * (linear.weight != 0)
    eps = 8 * EPS
    bound_x = eps * (grad.double().abs() @ wide_w.abs())
    bound_w = eps * (grad.double().abs().t() @ wide_x.abs())
    assert_within(x.grad, expected_x, bound_x, "x")
    assert_within(linear.weight.grad, expected_w, bound_w, "weight")
    bound = eps * grad.double().abs().sum(0)
    assert_within(linear.bias.grad, grad.double().sum(0), bound, "bias")


def test_only_wanted_gradients():
    linear, x = sparse_linear(), torch.randn(2, 40)
    linear.weight.requires_grad_(False)
    fake_quantize_(linear)
    linear(x).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is not None
    with torch.inference_mode():
        assert not linear(x).requires_grad


def test_a_token_that_is_not_finite_stays_visible():
    linear, x = sparse_linear(), torch.randn(3, 40)
    x[1, 0] = math.inf
    fake_quantize_(linear)
    assert linear(x).isnan().all(1).tolist() == [False, True, False]


def test_autocast():
    linear, x = sparse_linear(), torch.randn(4, 40, requires_grad=True)
    expected = int8_product(linear, x, 0.0)
    fake_quantize_(linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
        low = linear(x.bfloat16())
    assert (y.dtype, low.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(y, expected.bfloat16())
    y.sum().backward()
    assert x.grad.dtype == linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(sparse_linear(40, 40), nn.GELU(), sparse_linear(8, 40))
        fake_quantize_(model[0])
        fake_quantize_(model[2])
        x = torch.randn(5, 40, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# torch 2.13's own; it concerns every autograd.Function that is compiled
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph():
    linear, x = sparse_linear(), torch.randn(4, 40, requires_grad=True)
    fake_quantize_(linear)
    linear(x).sum().backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, linear(x))
    assert torch.equal(x.grad, expected)


def test_copies_and_pickles():
    linear, x = sparse_linear(), torch.randn(2, 40)
    fake_quantize_(linear, input_scale=0.03)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(twin(x), linear(x))
        twin.weight.data.zero_()
        assert not torch.equal(twin(x), linear(x))
        restore_(twin)
        assert type(twin) is nn.Linear
    assert type(linear) is FakeQuantizedLinear
    assert "int8, input_scale=0.03" in repr(linear)


def test_what_cannot_be_trained_is_refused():
    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"forward of nn.Linear; got a Own"):
        fake_quantize_(Own(3, 3))
    with pytest.raises(ValueError, match=r"float32 weights .* torch.bfloat16"):
        fake_quantize_(nn.Linear(3, 3).bfloat16())


# ------------------------------------------------------------ QuantizationAwareTraining


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "encoder" in name:
            shape = (module.out_features, module.in_features)
            module.weight.data *= block_sparse_weight(shape, (8, 1), 0.5) != 0
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    ids = torch.arange(64).reshape(8, 8) % 20
    for _ in range(count):
        model(input_ids=ids, labels=torch.arange(8) % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("momentum", [False, True])
def test_a_run_locks_the_zeros_and_leaves_no_trace(momentum):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    zeros = {n: p == 0 for n, p in model.named_parameters() if "encoder" in n}
    qat = QuantizationAwareTraining(model)
    assert len(qat.modules) == 12
    assert all(".encoder." in f".{name}" for name in qat.modules)
    keys, plain = list(model.state_dict()), repr(model)
    if momentum:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    qat.begin()
    qat.begin()
    assert list(model.state_dict()) == keys
    assert repr(model) != plain
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer)
    moved = 0
    for name in qat.modules:
        weight = model.get_submodule(name).weight
        assert bool((weight[zeros[f"{name}.weight"]] == 0).all()), name
        moved += int((weight != before[f"{name}.weight"]).sum())
    assert moved > 0
    model.eval()
    ids = torch.arange(16).reshape(2, 8)
    trained = model(ids).logits
    scales = qat.finalize()
    assert scales == dict.fromkeys(qat.modules, 0.0)
    assert qat.finalize() == scales
    assert repr(model) == repr(model.train().eval()) == plain
    assert not any("clip" in vars(m) for m in model.modules())
    # The int8 form of what is left is the one that was trained.
    again = QuantizationAwareTraining(model)
    again.begin()
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-5, atol=1e-6)
    again.remove()
    for name in qat.modules:
        weight = model.get_submodule(name).weight
        for clip in ("mse", "max"):
            q, rows = quantize_rows(weight, clip)
            assert_within(q * rows[:, None], weight, 4 * EPS * weight.abs(), name)


def test_training_learns_through_the_rounding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(256, 16)
    target = x[:, :1] * x[:, 1:2]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(x), target)

    first = float(loss().detach())
    with QuantizationAwareTraining(model, modules=["0", "2"]) as qat:
        for _ in range(300):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert qat.active
        last = float(loss().detach())
    assert last < 0.2 * first
    assert not qat.active
    assert type(model[0]) is nn.Linear


def test_an_error_inside_the_block_restores_the_layers():
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight.detach().clone()
    with (
        pytest.raises(RuntimeError, match="inside"),
        QuantizationAwareTraining(model, modules=["0"]),
    ):
        raise RuntimeError("inside")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)


def test_begin_changes_all_or_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qat = QuantizationAwareTraining(model)
    model[1].bfloat16()
    with pytest.raises(ValueError, match="module '1': int8 training needs float32"):
        qat.begin()
    assert type(model[0]) is nn.Linear
    assert not qat.active


def test_state_is_json_and_resumes():
    model = tiny_bert()
    qat = QuantizationAwareTraining(model, modules=["query", "key"])
    assert len(qat.modules) == 4
    idle = json.loads(json.dumps(qat.state_dict()))
    qat.begin()
    state = json.loads(json.dumps(qat.state_dict()))
    other = QuantizationAwareTraining(tiny_bert(), modules=["query", "key"])
    other.load_state_dict(state)
    assert other.active
    other.load_state_dict(idle)
    assert not other.active
    with pytest.raises(ValueError, match="written with another modules"):
        QuantizationAwareTraining(model).load_state_dict(state)
    del state["active"]
    with pytest.raises(ValueError, match="lacks 'active'"):
        other.load_state_dict(state)


def test_static_scales():
    model = tiny_bert()
    name = "bert.encoder.layer.0.intermediate.dense"
    qat = QuantizationAwareTraining(model, input_scales={name: 0.05})
    qat.begin()
    assert model.get_submodule(name).input_scale == 0.05
    assert qat.finalize()[name] == 0.05
    with pytest.raises(ValueError, match="names 'classifier'"):
        QuantizationAwareTraining(model, input_scales={"classifier": 0.05})
    for scale in (-1.0, math.nan, math.inf, 1e-40, None, "0.1"):
        with pytest.raises(ValueError, match="input_scale must be a number") as caught:
            QuantizationAwareTraining(model, input_scales={name: scale})
        assert str(caught.value).startswith(f"module '{name}': ")


def test_a_packed_layer_among_others_is_refused():
    model = nn.Sequential(sparse_linear(40), nn.Linear(40, 8))
    model[0] = BlockSparseLinear.from_linear(model[0], (8, 1))
    with pytest.raises(ValueError, match="'0' is packed"):
        QuantizationAwareTraining(model)
    assert QuantizationAwareTraining(model, exclude_modules=["0"]).modules == ("1",)


def test_meaning_errors():
    with pytest.raises(ValueError, match="matches no prunable linear layer"):
        QuantizationAwareTraining(nn.Sequential(nn.Linear(4, 4)), modules=["query"])
    model = nn.Sequential(nn.Linear(4, 4))
    qat = QuantizationAwareTraining(model, modules=["0"])
    with pytest.raises(ValueError, match="int8 training has not begun"):
        qat.finalize()
    qat.begin()
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="'0' became NaN or infinite"):
        qat.finalize()
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match="exchanged for a Identity"):
        qat.remove()
