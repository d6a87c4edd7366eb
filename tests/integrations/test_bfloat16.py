"""bfloat16 checkpoints and encoders: saved, loaded by the stock calls, damaged."""

from __future__ import annotations

import copy

import pytest
import torch
from encoders import (
    ARCHITECTURES,
    arguments_for,
    build,
    header,
    logits,
    pack_all_on_loading,
    packed,
    packed_layers,
    record_in,
    text,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertTokenizer,
    pipeline,
)

import pybsp
from pybsp.integrations.packed_file import ALIGNMENT, VERSION_KEY
from pybsp.nn import BlockSparseLinear, pack_
from pybsp.nn.encoder import FusedForward

LAYER = "bert.encoder.layer.0.output.dense"


def rounded(model):
    """A copy with the weights that rounding to bfloat16 gives, still dense."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "layer" in name:
                module.weight.copy_(module.weight.bfloat16())
    return model


def classifier():
    return build("bert", "ForSequenceClassification")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoders_have_the_bits_of_float32(name):
    model = build(name)
    twin = packed(rounded(model))
    arguments = arguments_for(name)
    with torch.inference_mode():
        expected = twin(**arguments)[0]
        found = packed(model, dtype="bfloat16")
        native = [
            isinstance(vars(m).get("forward"), FusedForward) for m in (found, twin)
        ]
        assert native[0] == native[1]
        assert packed_layers(found, "bfloat16")
        assert torch.equal(found(**arguments)[0], expected)


@pytest.mark.parametrize("other", ["float32", "int8"])
def test_an_encoder_of_two_types_runs_natively(other, isa):
    modules = ["layer.0.output.dense", "layer.1.attention.self.key"]
    model = build("bert")
    if other == "float32":
        found = packed(model, dtype="bfloat16", float32_modules=modules)
        twin = rounded(model)
        for name, module in twin.named_modules():
            if any(name.endswith(one) for one in modules):
                module.weight = model.get_submodule(name).weight
        twin = packed(twin)
    else:
        # What stays float32 beside int8 is rounded after that.
        found = packed(model, dtype="int8", float32_modules=modules)
        pack_(found, dtype="bfloat16", min_gain=0)
        twin = packed(rounded(model), dtype="int8", float32_modules=modules)
        for name, module in twin.named_modules():
            if isinstance(module, BlockSparseLinear) and module.is_int8:
                one = found.get_submodule(name)
                module.load_state_dict({
                    "weight_values": one.weight_values,
                    "weight_crow_indices": one.weight_crow_indices,
                    "weight_col_indices": one.weight_col_indices,
                    "weight_scales": one.weight_scales,
                    "bias": one.bias,
                })  # fmt: skip
    kinds = {m.dtype for m in found.modules() if isinstance(m, BlockSparseLinear)}
    assert kinds == {"bfloat16", other}
    assert isinstance(vars(found)["forward"], FusedForward)
    with torch.inference_mode():
        arguments = text(3, 17, "holes")
        assert torch.equal(found(**arguments)[0], twin(**arguments)[0]), isa


def test_an_encoder_sees_what_changes():
    model = packed(build("bert"), dtype="bfloat16")
    arguments = text(2, 9)
    layer = model.encoder.layer[0].output.dense
    with torch.inference_mode():
        before = model(**arguments)[0]
        layer.weight_values.mul_(2)
        changed = model(**arguments)[0]
        assert not torch.equal(changed, before)
        layer.weight_values = layer.weight_values / 2
        assert torch.equal(model(**arguments)[0], before)
        for packed_layer in packed_layers(model, "bfloat16").values():
            packed_layer.float()
        assert not packed_layers(model, "bfloat16")
        assert torch.equal(model(**arguments)[0], before)


def test_the_packed_file_loads_as_it_was(tmp_path):
    model = packed(classifier(), dtype="bfloat16")
    expected = logits(model)
    file = pybsp.save_packed(model, tmp_path)
    before = packed_layers(model, "bfloat16")
    for loaded in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
    ):
        found = packed_layers(loaded, "bfloat16")
        assert len(found) == 12
        for name, layer in found.items():
            twin = before[name if name in before else f"bert.{name}"]
            assert torch.equal(layer.weight_values, twin.weight_values)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert record_in(tmp_path)["dtype"] == "bfloat16"
    assert "float32_modules" not in record_in(tmp_path)
    assert header(file)[VERSION_KEY] == "3"
    stored = load_file(file)
    values = before[LAYER].weight_values
    assert stored[f"{LAYER}.weight_values"].dtype == torch.bfloat16
    assert stored[f"{LAYER}.weight_values"].nbytes == 2 * values.numel()
    assert int.from_bytes(file.read_bytes()[:8], "little") % ALIGNMENT == ALIGNMENT - 8
    smaller = file.stat().st_size
    whole = pybsp.save_packed(classifier(), tmp_path / "float32").stat().st_size
    saved = 2 * sum(layer.weight_values.numel() for layer in before.values())
    assert abs(whole - smaller - saved) < 2 * ALIGNMENT


def test_the_dense_file_holds_the_same_numbers(tmp_path):
    model = packed(classifier(), dtype="bfloat16", shrink=False)
    pybsp.save_packed(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name, layer in packed_layers(model, "bfloat16").items():
        assert weights[f"{name}.weight"].dtype == torch.float32
        assert torch.equal(weights[f"{name}.weight"], layer.weight)
    pack_all_on_loading(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = packed_layers(model, "bfloat16")
    assert set(packed_layers(loaded, "bfloat16")) == set(before)
    for name, layer in packed_layers(loaded, "bfloat16").items():
        assert torch.equal(layer.weight_values, before[name].weight_values)
    assert torch.equal(logits(loaded), logits(model))
    dense = loaded.dequantize()
    assert not packed_layers(dense, "bfloat16")
    assert torch.equal(dense.get_submodule(LAYER).weight, weights[f"{LAYER}.weight"])


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("other", ["float32", "int8"])
def test_two_types_in_one_file(form, other, tmp_path):
    model = packed(classifier(), dtype="bfloat16" if other == "float32" else "int8",
                   float32_modules=["layer.0.output.dense"])  # fmt: skip
    if other == "int8":
        pack_(model, dtype="bfloat16", min_gain=0)
    expected = logits(model)
    pybsp.save_packed(model, tmp_path)
    assert record_in(tmp_path)["float32_modules"] == [LAYER]
    if form == "dense":
        pack_all_on_loading(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    layer = loaded.get_submodule(LAYER)
    kinds = {m.dtype for m in loaded.modules() if isinstance(m, BlockSparseLinear)}
    if other == "int8":
        # A dense file says which are int8; the others have their numbers in float32.
        assert kinds == {"int8", "bfloat16" if form == "packed" else "float32"}
        assert torch.equal(layer.weight, model.get_submodule(LAYER).weight)
    else:
        assert kinds == {"bfloat16", "float32"}
        assert layer.dtype == "float32"
        assert torch.equal(logits(loaded), expected)


def test_neurons_are_left_out_and_saved_as_they_were(tmp_path):
    model = classifier()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, :24] = 0  # not needed
        layer.intermediate.dense.weight[24:40] = 0  # constant
        layer.intermediate.dense.bias[24:40] = 1.5
    whole = packed(model, dtype="bfloat16", shrink=False, fuse=False)
    small = copy.deepcopy(model)
    report = pack_(small, (8, 1), "bfloat16", min_gain=0, fuse=False)
    assert report.removed
    kept = small.bert.encoder.layer[0]
    assert kept.intermediate.dense.out_features == 56
    assert kept.output.dense.dtype == "bfloat16"
    torch.testing.assert_close(logits(small), logits(whole))
    state, expected = small.state_dict(), whole.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    before = logits(small)
    small.load_state_dict(state)
    assert torch.equal(logits(small), before)
    pybsp.save_packed(small, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[0].intermediate.dense.out_features == 56
    assert len(packed_layers(loaded, "bfloat16")) == 12
    pybsp.nn.unpack_(loaded)
    saved = loaded.state_dict()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_the_dense_file_was_changed_without_pybsp(tmp_path, caplog):
    pybsp.save_packed(packed(classifier(), dtype="bfloat16"), tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "holds other weights" not in caplog.text
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{LAYER}.weight"] *= 3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("WARNING"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "holds other weights" in caplog.text


HARM = {
    "half floats": lambda values: values.half(),
    "double precision": lambda values: values.double(),
    "fewer": lambda values: values[:-1].clone(),
    "not finite": lambda values: values.fill_(float("nan")),
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_files_are_one_line(harm, tmp_path):
    model = packed(classifier(), dtype="bfloat16")
    file = pybsp.save_packed(model, tmp_path, dense=False)
    tensors = load_file(file)
    tensors[f"{LAYER}.weight_values"] = HARM[harm](tensors[f"{LAYER}.weight_values"])
    save_file(tensors, file, header(file))
    with pytest.raises(ValueError, match=LAYER) as caught:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_version_1_hold_no_bfloat16(tmp_path):
    model = packed(classifier(), dtype="bfloat16")
    file = pybsp.save_packed(model, tmp_path, dense=False)
    save_file(load_file(file), file, {"format": "pt", VERSION_KEY: "1"})
    with pytest.raises(ValueError, match="is no block-sparse weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_pipeline(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    model = packed(classifier(), dtype="bfloat16")
    pybsp.save_packed(model, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    classify = pipeline(
        "text-classification", model=str(tmp_path / "out"), device="cpu"
    )
    assert len(packed_layers(classify.model, "bfloat16")) == 12
    direct = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert classify("good film") == direct("good film")
