"""What the native encoder does not serve goes through the stock modules, unchanged."""

import logging

import pytest
import torch
from encoders import (
    ARCHITECTURES,
    arguments_for,
    build,
    counted,
    packed,
    stock,
    text,
)
from torch import nn

from pybsp.nn import BlockSparseLinear, pack_
from pybsp.nn.encoder import forward

LOGGER = "pybsp.nn.encoder.forward"


def tensors(result):
    found = result if isinstance(result, tuple) else result.to_tuple()
    return [
        t
        for part in found
        for t in (part if isinstance(part, tuple) else (part,))
        if isinstance(t, torch.Tensor)
    ]


def assert_stock(native, **arguments):
    """The stock forward gives the result, bit by bit, and no other ran."""
    with counted() as calls:
        torch.manual_seed(0)
        found = native(**arguments)
        torch.manual_seed(0)
        expected = stock(native, **arguments)
    assert calls.native == 0
    assert type(found) is type(expected)
    found, expected = tensors(found), tensors(expected)
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def notices(caplog):
    return [r.getMessage() for r in caplog.records if r.name == LOGGER]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients(name):
    native = packed(build(name))
    arguments = arguments_for(name)
    assert_stock(native, **arguments)
    native(**arguments)[0].sum().backward()
    layers = [m for m in native.modules() if isinstance(m, BlockSparseLinear)]
    assert any(layer.weight_values.grad is not None for layer in layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_draws_the_same_dropout(name):
    native = packed(build(name)).train()
    with torch.no_grad():
        assert_stock(native, **arguments_for(name))


@torch.no_grad()
def test_dropout_that_is_in_training_in_a_model_that_is_not():
    native = packed(build("bert"))
    for module in native.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert_stock(native, **text(2, 9))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_and_attentions(name, caplog):
    native = packed(build(name, attn_implementation="eager"))
    arguments = arguments_for(name)
    for _ in range(2):
        assert_stock(native, **arguments, output_hidden_states=True)
        assert_stock(native, **arguments, output_attentions=True)
    assert len(notices(caplog)) == 2
    assert "output_hidden_states" in notices(caplog)[0]
    assert "output_attentions" in notices(caplog)[1]
    # What recorded them stays registered, and does not stand in the way.
    with counted() as calls:
        native(**arguments)
    assert calls.native == 1
    assert len(native(**arguments, output_hidden_states=True).hidden_states) > 2


@torch.no_grad()
def test_hidden_states_by_the_config():
    native = packed(build("bert"))
    native.config.output_hidden_states = True
    assert_stock(native, **text(2, 9))
    native.config.output_hidden_states = False
    with counted() as calls:
        native(**text(2, 9), output_hidden_states=False, return_dict=True)
    assert calls.native == 1


@pytest.mark.parametrize("name", ["bert", "mpnet", "distilbert", "vit"])
@torch.no_grad()
def test_tuples(name):
    native = packed(build(name))
    assert_stock(native, **arguments_for(name), return_dict=False)
    native.config.return_dict = False
    assert_stock(native, **arguments_for(name))


@torch.no_grad()
def test_inputs_that_the_encoder_does_not_take():
    native = packed(build("bert"))
    arguments = text(2, 9, "right")
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    assert_stock(native, inputs_embeds=torch.randn(2, 9, 64), attention_mask=mask)
    assert_stock(native, input_ids=ids.int(), attention_mask=mask)
    square = mask[:, None, None, :].bool().expand(2, 1, 9, 9)
    assert_stock(native, input_ids=ids, attention_mask=square)
    assert_stock(native, input_ids=ids, is_causal=True)
    modern = packed(build("modernbert"))
    positions = torch.arange(9)[None] * 2
    assert_stock(modern, input_ids=ids, position_ids=positions)


@torch.no_grad()
def test_more_tokens_than_modernbert_was_made_for():
    native = packed(build("modernbert", seed=1))
    native.config.max_position_embeddings = 8
    assert_stock(native, **text(2, 9))


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook"]
)
@torch.no_grad()
def test_hooks_within_are_called(register, caplog):
    native = packed(build("bert"))
    inner = native.encoder.layer[1].attention.output.dense
    seen = []
    handle = getattr(inner, register)(lambda *args: seen.append(args) or None)
    native(**text(2, 9))
    native(**text(2, 9))
    assert len(seen) == 2
    assert len(notices(caplog)) == 1
    handle.remove()
    with counted() as calls:
        native(**text(2, 9))
    assert calls.native == 1
    assert len(seen) == 2


@torch.no_grad()
def test_hooks_on_the_model_itself_and_its_pooler_are_called_natively():
    native = packed(build("bert"))
    seen = []
    for module in (native, native.pooler):
        module.register_forward_hook(lambda *args: seen.append(args[0]))
    with counted() as calls:
        native(**text(2, 9))
    assert calls.native == 1
    assert seen == [native.pooler, native]


@torch.no_grad()
def test_hooks_on_every_module():
    native = packed(build("bert"))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module)
    )
    try:
        native(**text(2, 9))
    finally:
        handle.remove()
    assert native.encoder.layer[0] in seen


@torch.no_grad()
def test_a_forward_that_somebody_put_on_a_module():
    native = packed(build("bert"))
    inner = native.encoder.layer[0].output
    stocks, seen = inner.forward, []
    inner.forward = lambda *args: seen.append(1) or stocks(*args)
    native(**text(2, 9))
    assert seen == [1]


@torch.no_grad()
def test_autocast():
    native = packed(build("bert"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_stock(native, **text(2, 9))


@torch.no_grad()
def test_compile_and_export():
    model = build("bert")
    native = packed(model)
    arguments = text(2, 9, "right")
    expected = model(**arguments)[0]
    compiled = torch.compile(native, backend="eager")
    with counted() as calls:
        torch.testing.assert_close(compiled(**arguments)[0], expected)
        exported = torch.export.export(native, (), arguments).module()
        torch.testing.assert_close(exported(**arguments)[0], expected)
    assert calls.native == 0


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of constants
@torch.no_grad()
def test_trace():
    native = packed(build("bert"))
    arguments = text(2, 9, "right")
    expected = native(**arguments)[0]
    kept = arguments["attention_mask"] != 0
    with counted() as calls:
        traced = torch.jit.trace(
            native, example_kwarg_inputs=arguments, strict=False, check_trace=False
        )
        found = traced(**arguments)["last_hidden_state"]
    assert calls.native == 0
    torch.testing.assert_close(found[kept], expected[kept])


@torch.no_grad()
def test_other_weights_for_one_call():
    model = build("bert")
    native = packed(model)
    arguments = text(2, 9)
    before = native(**arguments)[0]
    name = "encoder.layer.0.output.LayerNorm.weight"
    other = {name: torch.zeros(64)}
    found = torch.func.functional_call(native, other, (), arguments)[0]
    model.get_parameter(name).zero_()
    torch.testing.assert_close(found, model(**arguments)[0])
    assert torch.equal(native(**arguments)[0], before)


def test_other_weights_everywhere_for_one_call():
    model = build("bert")
    native = packed(model)
    arguments = text(2, 9)
    before = native(**arguments)[0]
    other = {name: 1.1 * p.detach() for name, p in native.named_parameters()}
    found = torch.func.functional_call(native, other, (), arguments)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(found, model(**arguments)[0])
    assert torch.equal(native(**arguments)[0], before)


@torch.inference_mode()
def test_padding_beyond_the_positions_of_mpnet():
    model = build("mpnet", max_position_embeddings=40)
    native = packed(model)
    ids = torch.randint(3, 90, (2, 48))
    ids[:, 30:] = model.config.pad_token_id
    mask = (ids != model.config.pad_token_id).long()
    found, expected = (m(ids, attention_mask=mask)[0] for m in (native, model))
    torch.testing.assert_close(found[:, :30], expected[:, :30])


@torch.inference_mode()
def test_wrong_ids_are_index_errors():
    native = packed(build("bert"))
    with pytest.raises(IndexError):
        native(input_ids=torch.full((1, 3), 90))
    with pytest.raises((IndexError, RuntimeError)):
        native(input_ids=torch.zeros(1, 513, dtype=torch.int64))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        native()
    with pytest.raises(TypeError):
        native(*[None] * 20)


@torch.no_grad()
def test_a_notice_for_calls_with_gradients_is_given_once(caplog):
    native = packed(build("bert"))
    with torch.enable_grad():
        for _ in range(3):
            native(**text(2, 9))
    (notice,) = notices(caplog)
    assert "gradients are on" in notice
    assert caplog.records[0].levelno == logging.WARNING


def reason(model):
    report = pack_(model, block_shape=(8, 1), min_gain=0)
    assert len(report.packed) > 0
    (encoder,) = report.encoders
    assert not encoder.native
    assert encoder.reason in " ".join(str(report).split())
    assert "forward" not in vars(model.get_submodule(encoder.name))
    return encoder.reason


def test_architectures_that_are_not_known_say_so():
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(hidden_size=64, embedding_size=32, intermediate_size=96,
                          num_attention_heads=4, vocab_size=90)  # fmt: skip
    model = AlbertModel(config).eval()
    with torch.no_grad():
        model.encoder.albert_layer_groups[0].albert_layers[0].ffn.weight[8:] = 0
    report = pack_(model, min_gain=0)
    assert [layer.name for layer in report.packed] == [
        "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    ]
    assert "AlbertModel runs through its own modules" in str(report)
    assert "not known" in str(report)
    plain = nn.Sequential(nn.Linear(8, 8))
    nn.init.constant_(plain[0].weight[:4], 0)
    assert pack_(plain, block_shape=(4, 1), min_gain=0).encoders == ()


class Scaled(nn.Module):
    """Stands for adapters of every kind."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def test_modules_that_are_not_as_expected():
    assert "decoder" in reason(build("bert", is_decoder=True))
    assert "chunks of 4" in reason(build("bert", chunk_size_feed_forward=4))
    assert "chunks of 4" in reason(build("distilbert", chunk_size_feed_forward=4))

    model = build("bert")
    output = model.encoder.layer[1].output
    output.dense = Scaled(output.dense)
    assert reason(model) == "encoder.layer.1.output.dense is a Scaled"

    model = build("bert")
    model.encoder.layer[0].extra = nn.Linear(2, 2)
    assert reason(model) == "encoder.layer.0 has other children: extra"

    model = build("bert")
    model.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(model)

    model = build("bert")
    model.encoder.layer[0].output.forward = lambda *_: None
    assert reason(model) == "encoder.layer.0.output has another forward"

    model = build("bert")
    model.forward = lambda *_: None
    with pytest.raises(AssertionError):
        reason(model)
    assert "forward was replaced" in str(pack_(model, min_gain=0))


def test_modules_of_another_version():
    model = build("bert")
    del model.encoder.layer[0].attention.self.scaling
    assert "no attribute 'scaling'" in reason(model)
    del model.embeddings.token_type_ids
    assert "token_type_ids" in reason(model)


def test_what_the_native_encoder_refuses(monkeypatch):
    def refuse(*_):
        raise ValueError("heads are at most 4")

    monkeypatch.setattr(forward, "Encoder", refuse)
    assert reason(build("bert")) == "heads are at most 4"


def test_other_classes_parameters_and_numbers():
    model = build("bert")
    norm = model.encoder.layer[0].output.LayerNorm
    model.encoder.layer[0].output.LayerNorm = type("Norm", (nn.LayerNorm,), {})(64)
    assert reason(model) == "encoder.layer.0.output.LayerNorm is a Norm"
    model.encoder.layer[0].output.LayerNorm = norm
    model.embeddings.word_embeddings.max_norm = 1.0
    assert "max_norm" in reason(model)
    model.embeddings.word_embeddings.max_norm = None
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.Tanh()
    assert reason(model) == "the activation Tanh is not known"
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.PReLU(init=0.0)
    assert "has parameters" in reason(model)


def test_a_subclass_may_compute_anything():
    model = build("bert")

    class BertModel(type(model)):
        pass

    model.__class__ = BertModel
    assert "not known" in reason(model)


def test_nothing_packed_in_the_encoder():
    model = build("bert")
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    with torch.no_grad():
        model.pooler.dense.weight[8:] = 0
    assert reason(model) == "none of its linear layers is packed"


def test_types_of_rotation():
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    model = build(
        "modernbert",
        rope_parameters={
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert reason(model) == "its rotations are of type 'linear'"
