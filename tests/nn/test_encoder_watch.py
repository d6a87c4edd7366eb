"""The native encoder follows every change of the model it serves."""

import copy
import gc
import io
import pickle
import sys
import weakref

import pytest
import torch
from encoders import (
    ARCHITECTURES,
    arguments_for,
    build,
    counted,
    packed,
    prune,
    stock,
    text,
)
from torch import nn

from pybsp.nn import BlockSparseLinear, pack_, unpack_
from pybsp.nn.encoder import FusedForward

LOGGER = "pybsp.nn.encoder.forward"


@torch.inference_mode()
def assert_native(native, arguments=None, calls=1):
    """The encoder runs (or does not), and gives what the modules give now."""
    arguments = text(2, 11, "right") if arguments is None else arguments
    with counted() as count:
        found = native(**arguments)[0]
    assert count.native == calls
    expected = stock(native, **arguments)[0]
    if "attention_mask" in arguments:
        kept = arguments["attention_mask"] != 0
        found, expected = found[kept], expected[kept]
    torch.testing.assert_close(found, expected)


@pytest.fixture
def native():
    """Packed, and called before: what is changed later was bound already."""
    model = packed(build("bert"))
    assert_native(model)
    return model


def test_weights_changed_in_place(native):
    with torch.no_grad():
        native.encoder.layer[0].output.dense.weight_values.mul_(2)
        native.embeddings.word_embeddings.weight.neg_()
        native.encoder.layer[1].output.LayerNorm.bias.add_(1)
    assert_native(native)


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.bias",
        "encoder.layer.0.attention.self.key.weight_values",
        "encoder.layer.0.attention.self.value.bias",
        "encoder.layer.1.output.LayerNorm.weight",
    ],
)
@pytest.mark.parametrize("how", ["data", "parameter"])
def test_tensors_replaced(native, name, how):
    parent, _, key = name.rpartition(".")
    module = native.get_submodule(parent)
    value = torch.randn_like(getattr(module, key))
    if how == "data":
        getattr(module, key).data = value
    else:
        setattr(module, key, nn.Parameter(value))
    assert_native(native)
    assert_native(native)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numbers_kept_beside_the_tensors(name):
    native, arguments = packed(build(name)), arguments_for(name)
    assert_native(native, arguments)
    for module in native.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    assert_native(native, arguments)
    for module in native.modules():
        if isinstance(vars(module).get("scaling"), float):
            module.scaling *= 2
    assert_native(native, arguments)


def test_other_views_of_the_same_memory():
    model = build("bert")
    key = model.encoder.layer[0].attention.self.key
    nn.init.normal_(key.weight, std=0.1)
    native = packed(model)
    assert_native(native)
    words = native.embeddings.word_embeddings.weight
    words.data = words.data[:50]
    with torch.inference_mode(), pytest.raises(IndexError):
        native(torch.tensor([[3, 50]]))
    arguments = {"input_ids": torch.tensor([[3, 49]])}
    assert_native(native, arguments)
    weight = native.encoder.layer[0].attention.self.key.weight
    weight.data = weight.data.t()
    assert_native(native, arguments, calls=0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["model", "attention", "norm"])
def test_a_forward_that_somebody_put_on_a_class(what, when, monkeypatch):
    model = build("bert")
    attention = model.encoder.layer[0].attention.self
    cls = {"model": type(model), "attention": type(attention), "norm": nn.LayerNorm}
    own = cls[what].forward

    def forward(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        return 2 * found if what == "norm" else found

    def put():
        monkeypatch.setattr(cls[what], "forward", forward)

    if when == "before":
        put()
    native = packed(model)
    if when == "after":
        assert_native(native)
        put()
    assert_native(native, calls=0)
    monkeypatch.undo()
    assert isinstance(native.forward, FusedForward) == (when == "after")
    assert_native(native, calls=int(when == "after"))


def test_another_pattern_is_loaded(native):
    other = build("bert", seed=5)
    native.load_state_dict(other.state_dict())
    assert_native(native)
    arguments = text(2, 11)
    with torch.inference_mode():
        torch.testing.assert_close(native(**arguments)[0], other(**arguments)[0])


def test_other_numbers_of_blocks_are_in_the_same_parameters(native):
    """An optimizer holds them."""
    parameters = dict(native.named_parameters())
    native.load_state_dict(build("bert", seed=5).state_dict())
    assert all(found is parameters[name] for name, found in native.named_parameters())


def test_the_window_of_modernbert():
    native = packed(build("modernbert"))
    assert_native(native, text(1, 40))
    native.config.sliding_window = 4
    native.layers[1].attention_type = "full_attention"
    assert_native(native, text(1, 40))


def test_the_positions_of_modernbert():
    native = packed(build("modernbert", max_position_embeddings=16))
    assert_native(native, text(1, 12))
    native.config.max_position_embeddings = 64
    assert_native(native, text(1, 40))


def test_default_token_types_written_to(native):
    native.embeddings.token_type_ids.fill_(1)
    assert_native(native, calls=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_as_many_other_blocks_are_loaded(dtype):
    """Schedules of (1, n) blocks are made of the indices."""
    one, other = build("bert"), build("bert", seed=5)
    for model in (one, other):
        torch.manual_seed(7 if model is one else 8)
        for layer in model.encoder.layer:
            for linear in (layer.intermediate.dense, layer.output.dense):
                nn.init.normal_(linear.weight, std=0.1)
                blocks = linear.weight.detach().view(linear.out_features, -1, 16)
                kept = torch.rand(blocks.shape[:2])
                kept = kept <= kept.flatten().kthvalue(kept.numel() // 2).values
                blocks *= kept[..., None]
    pack_(one, block_shape=(1, 16), min_gain=0, dtype=dtype)
    assert_native(one)
    one.load_state_dict(other.state_dict())
    assert_native(one)


def test_assigned_state(native):
    native.load_state_dict(build("bert", seed=5).state_dict(), assign=True)
    assert_native(native)


def test_resized_embeddings(native):
    native.resize_token_embeddings(200)
    ids = torch.tensor([[150, 199, 3]])
    assert_native(native, {"input_ids": ids})


def test_a_packed_layer_replaced_by_a_dense_one(native):
    dense = nn.Linear(96, 64)
    native.encoder.layer[0].output.dense = dense
    assert_native(native)
    native.encoder.layer[0].output.dense = BlockSparseLinear.from_linear(dense, (8, 1))
    assert_native(native)


def test_more_and_fewer_layers(native):
    layers = native.encoder.layer
    layers.append(copy.deepcopy(layers[0]))
    assert_native(native)
    del layers[0]
    assert_native(native)
    native.encoder.layer = layers[:1]
    assert_native(native)


def test_fewer_heads(native):
    attention = native.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        linear = nn.Linear(64, 32)
        prune(linear)
        setattr(attention.self, name, linear)
    attention.output.dense = nn.Linear(32, 64)
    assert_native(native)


def test_an_adapter_put_in_and_taken_out(native, caplog):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    parent = native.encoder.layer[1].attention.self
    parent.query = Adapter(parent.query)
    assert_native(native, calls=0)
    assert_native(native, calls=0)
    (record,) = (r for r in caplog.records if r.name == LOGGER)
    assert "encoder.layer.1.attention.self.query is an Adapter" in record.getMessage()
    parent.query = parent.query.base
    assert_native(native)


def test_other_types_and_back(native):
    native.double()
    with counted() as calls, torch.inference_mode(), pytest.raises(TypeError):
        native(**text(2, 11))
    assert calls.native == 0
    nn.Module.float(native)
    assert_native(native)


def test_a_copied_table_that_changes_in_place():
    native = packed(build("mpnet"))
    assert_native(native)
    with torch.no_grad():
        native.encoder.relative_attention_bias.weight.neg_()
    assert_native(native)


@pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0), reason="its dictionaries have no versions"
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_that_did_not_change_is_not_looked_into(name):
    native, arguments = packed(build(name)), arguments_for(name)
    with torch.inference_mode():
        native(**arguments)
        seen = native.forward._bound.watch._seen
        native(**arguments)
    assert native.forward._bound.watch._seen is seen
    states = native.forward._bound.watch._states
    next(m for m in native.modules() if any(vars(m) is s for s in states)).note = "new"
    assert_native(native, arguments)
    assert native.forward._bound.watch._seen is not seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_place_that_was_read(name):
    watch = packed(build(name)).forward._bound.watch
    assert watch.look()
    assert len(watch._slots) > 20
    for place, key, found in watch._slots:
        place[key] = object()
        assert not watch.look(), key
        assert not watch.look(), key
        place[key] = found
        assert watch.look()
        kept = dict(place)
        del place[key]
        assert not watch.look(), key
        place.update(kept)
        assert watch.look()
    for stack, _ in watch._stacks:
        stack["more"] = nn.Identity()
        assert not watch.look()
        del stack["more"]
        assert watch.look()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_module_with_a_hook_or_in_training(name):
    model = packed(build(name))
    watch = model.forward._bound.watch

    def seen():
        return watch.look()[1:]

    assert seen() == (False, False)
    modules = [m for m in model.modules() if any(vars(m) is s for s in watch._states)]
    assert len(modules) > 10
    for module in modules:
        for register in (
            module.register_forward_hook,
            module.register_forward_pre_hook,
        ):
            handle = register(lambda *_: None)
            assert seen() == (True, False)
            handle.remove()
            assert seen() == (False, False)
        module.forward = type(module).forward
        assert seen() == (True, False)
        del module.forward
        assert seen() == (False, False)
        module.training = True
        assert seen() == (False, any(module is one for one in watch._random))
        module.training = False
        assert seen() == (False, False)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("how", ["copy", "pickle", "save"])
def test_copies_have_their_own_encoder(name, how):
    native = packed(build(name))
    arguments = arguments_for(name)
    assert_native(native, arguments)
    if how == "copy":
        other = copy.deepcopy(native)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(native))
    else:
        file = io.BytesIO()
        torch.save(native, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert isinstance(other.forward, FusedForward)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert_native(other, arguments)
    assert_native(native, arguments)
    with torch.inference_mode():
        assert not torch.equal(native(**arguments)[0], other(**arguments)[0])


def test_unpacking_gives_the_forward_back(native):
    unpack_(native)
    assert "forward" not in vars(native)
    assert_native(native, calls=0)
    report = pack_(native, block_shape=(8, 1), min_gain=0)
    assert report.encoders[0].native
    assert_native(native)


def test_packing_what_became_sparse_later(native):
    prune(native.pooler.dense)
    report = pack_(native, block_shape=(8, 1), min_gain=0)
    assert report.encoders[0].native
    assert_native(native)


def test_nothing_but_the_model_keeps_it_alive():
    native = packed(build("bert"))
    assert_native(native)
    alive = weakref.ref(native)
    del native
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("how", ["in place", "replaced", "loaded", "input scale"])
def test_int8_weights_that_change(static, how):
    batches = [text(2, 11)] if static else None
    native = packed(build("bert"), dtype="int8", calibration=batches)
    arguments = text(2, 11)
    with torch.inference_mode(), counted() as calls:
        before = native(**arguments)[0]
        for layer in (native.encoder.layer[0].output.dense,):
            with torch.inference_mode(False):
                change_int8(layer, how)
        after = native(**arguments)[0]
        assert calls.native == 2
        native.forward = None
        del native.forward
        # The modules compute the same but for roundings that fall the other way.
        expected = native(**arguments)[0]
    error = (after - expected).norm() / expected.norm()
    assert error < 0.01
    assert (before - expected).norm() / expected.norm() > 10 * error


def change_int8(layer, how):
    if how == "in place":
        layer.weight_values.neg_()
    elif how == "replaced":
        layer.weight_scales = 3 * layer.weight_scales
    elif how == "loaded":
        layer.load_state_dict({"weight": -layer.weight, "bias": layer.bias})
    else:
        layer.input_scale = torch.tensor(0.5)
