"""int8 checkpoints: saved, loaded by the stock calls, damaged."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from encoders import (
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
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertTokenizer,
    pipeline,
)

import pybsp
from pybsp.integrations.packed_file import PACKED_FILE, VERSION_KEY
from pybsp.nn import BlockSparseLinear, pack_

LAYER = "bert.encoder.layer.0.output.dense"


def int8_model(static=False, **options):
    model = build("bert", "ForSequenceClassification")
    batches = [text(2, 12, seed=seed) for seed in range(3)] if static else None
    return packed(model, dtype="int8", calibration=batches, **options)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_packed_file_loads_as_it_was(static, fuse, tmp_path):
    model = int8_model(static, fuse=fuse)
    expected = logits(model)
    file = pybsp.save_packed(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(packed_layers(loaded, "int8")) == 12
    if not fuse:
        pybsp.nn.encoder.unfuse_encoders_(loaded)
        pybsp.nn.fuse.unfuse_(loaded)
        pybsp.nn.fuse.unfuse_(model)
        expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    before = packed_layers(model, "int8")
    for name, layer in packed_layers(loaded, "int8").items():
        assert torch.equal(layer.weight_values, before[name].weight_values)
        assert torch.equal(layer.weight_scales, before[name].weight_scales)
        assert layer.static_scale == before[name].static_scale
        assert bool(layer.static_scale) == static
    record = record_in(tmp_path)
    assert record["dtype"] == "int8"
    assert set(record.get("input_scales", ())) == (set(before) if static else set())
    assert header(file)[VERSION_KEY] == "3"
    sizes = {k: v.nbytes for k, v in load_file(file).items() if k.startswith(LAYER)}
    values = before[LAYER].weight_values.numel()
    assert sizes[f"{LAYER}.weight_values"] == values
    assert sizes[f"{LAYER}.weight_scales"] == 4 * 64


@pytest.mark.parametrize("static", [False, True])
def test_the_dense_file_holds_the_same_numbers(static, tmp_path):
    model = int8_model(static, shrink=False)
    pybsp.save_packed(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("input_scale" in key for key in weights)
    for name, layer in packed_layers(model, "int8").items():
        assert torch.equal(weights[f"{name}.weight"], layer.weight)
    # Without the packed file the layers are quantised again while they load.
    pack_all_on_loading(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = packed_layers(model, "int8")
    assert set(packed_layers(loaded, "int8")) == set(before)
    for name, layer in packed_layers(loaded, "int8").items():
        assert torch.equal(layer.weight_values, before[name].weight_values)
        assert layer.static_scale == before[name].static_scale
        torch.testing.assert_close(
            layer.weight_scales, before[name].weight_scales, rtol=2e-7, atol=0
        )


def test_save_pretrained_and_dequantize(tmp_path):
    model = int8_model(static=True)
    pybsp.save_packed(model, tmp_path / "packed")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    loaded.save_pretrained(tmp_path / "dense")
    record = record_in(tmp_path / "dense")
    assert record["format"] == "dense"
    assert record["dtype"] == "int8"
    assert len(record["input_scales"]) == 12
    weights = load_file(tmp_path / "packed" / "model.safetensors")
    again = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(weights) == set(again)
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    dense = loaded.dequantize()
    assert not packed_layers(dense, "int8")
    assert type(dense.get_submodule(LAYER)) is torch.nn.Linear
    assert torch.equal(dense.get_submodule(LAYER).weight, weights[f"{LAYER}.weight"])


def test_heads_base_models_and_pipelines(tmp_path):
    model = int8_model(static=True)
    pybsp.save_packed(model, tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert len(packed_layers(base, "int8")) == 12
    assert all(layer.static_scale for layer in packed_layers(base, "int8").values())
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"]["min_gain"] = 0.0
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    head = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert all(layer.static_scale for layer in packed_layers(head, "int8").values())
    assert len(packed_layers(head, "int8")) == 12


def test_a_model_is_quantized_after_it_was_loaded_in_float32(tmp_path):
    model = build("bert", "ForSequenceClassification")
    direct = packed(model, dtype="int8", shrink=False)
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not packed_layers(loaded, "int8")
    report = pack_(loaded, dtype="int8", min_gain=0, shrink=False)
    assert sum(layer.dtype == "int8" for layer in report.layers) == 12
    assert torch.equal(logits(loaded), logits(direct))
    pybsp.save_packed(loaded, tmp_path / "int8")
    assert record_in(tmp_path / "int8")["dtype"] == "int8"
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_both_types_in_one_model(form, tmp_path):
    model = build("bert", "ForSequenceClassification")
    mixed = packed(model, dtype="int8", float32_modules=["layer.0.output.dense"])
    assert not mixed.get_submodule(LAYER).is_int8
    pybsp.save_packed(mixed, tmp_path)
    if form == "dense":
        (tmp_path / PACKED_FILE).unlink()
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["min_gain"] = 0.0
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert record_in(tmp_path)["float32_modules"] == [LAYER]
    for loaded in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
    ):
        assert len(packed_layers(loaded, "int8")) == 11
        layer = loaded.base_model.encoder.layer[0].output.dense
        assert isinstance(layer, BlockSparseLinear)
        assert not layer.is_int8
        loaded.save_pretrained(tmp_path / "again")
        assert len(record_in(tmp_path / "again")["float32_modules"]) == 1


def test_float32_files_stay_of_their_version(tmp_path):
    file = pybsp.save_packed(build("bert"), tmp_path)
    assert header(file)[VERSION_KEY] == "2"
    assert "dtype" not in record_in(tmp_path)


def test_the_dense_file_was_changed_without_pybsp(tmp_path, caplog):
    pybsp.save_packed(int8_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{LAYER}.weight"] *= 2
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("WARNING"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "holds other weights" in caplog.text
    assert torch.equal(
        loaded.state_dict()[f"{LAYER}.weight"], weights[f"{LAYER}.weight"]
    )


def test_neurons_are_left_out_and_saved_as_they_were(tmp_path):
    model = build("bert", "ForSequenceClassification")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, :24] = 0  # not needed
        layer.intermediate.dense.weight[24:40] = 0  # constant
        layer.intermediate.dense.bias[24:40] = 1.5
    whole = packed(model, dtype="int8", shrink=False, fuse=False)
    small = copy.deepcopy(model)
    report = pack_(small, (8, 1), "int8", min_gain=0, fuse=False)
    assert report.removed
    kept = small.bert.encoder.layer[0]
    assert kept.intermediate.dense.out_features == 56
    assert kept.output.dense.is_int8
    state, expected = small.state_dict(), whole.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    # A constant is added in float32 and not rounded to the input's 8 bits.
    error = (logits(small) - logits(whole)).norm() / logits(whole).norm()
    assert error < 0.05
    with torch.no_grad():
        before = logits(small)
        small.load_state_dict(state)
        assert torch.equal(logits(small), before)
    pybsp.save_packed(small, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[0].intermediate.dense.out_features == 56
    for name, part in packed_layers(loaded, "int8").items():
        assert torch.equal(part.weight_values, small.get_submodule(name).weight_values)
        assert torch.equal(part.weight_scales, small.get_submodule(name).weight_scales)
    saved = loaded.state_dict()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    pybsp.nn.unpack_(loaded)
    saved = loaded.state_dict()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_and_pickles_compute_the_same(clone):
    model = int8_model(static=True)
    twin = clone(model)
    assert torch.equal(logits(twin), logits(model))
    layer = twin.get_submodule(LAYER)
    layer.weight_scales.zero_()
    assert not torch.equal(logits(twin), logits(model))


def test_what_is_around_frozen_int8_layers_is_trained(tmp_path):
    pybsp.save_packed(int8_model(), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = {
        name: m.weight_values.clone()
        for name, m in packed_layers(model, "int8").items()
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(**text(2, 12), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    for name in ("classifier.weight", "bert.embeddings.word_embeddings.weight"):
        assert name in moved
    assert f"{LAYER}.bias" in moved
    for name, layer in packed_layers(model, "int8").items():
        assert torch.equal(layer.weight_values, values[name])
    # Natively again, with what was learned.
    assert torch.isfinite(logits(model.eval())).all()


HARM = {
    "no scales": lambda t: t.pop(f"{LAYER}.weight_scales"),
    "scales of another size": lambda t: t.update(
        {f"{LAYER}.weight_scales": torch.ones(63)}
    ),
    "scales of another type": lambda t: t.update(
        {f"{LAYER}.weight_scales": torch.ones(64, dtype=torch.float16)}
    ),
    "negative scales": lambda t: t.update({f"{LAYER}.weight_scales": -torch.ones(64)}),
    "infinite scales": lambda t: t.update(
        {f"{LAYER}.weight_scales": torch.full((64,), torch.inf)}
    ),
    "input scale of another size": lambda t: t.update(
        {f"{LAYER}.input_scale": torch.ones(2)}
    ),
    "input scale NaN": lambda t: t.update(
        {f"{LAYER}.input_scale": torch.tensor(torch.nan)}
    ),
    "input scale negative": lambda t: t.update(
        {f"{LAYER}.input_scale": torch.tensor(-1.0)}
    ),
    "no values": lambda t: t.pop(f"{LAYER}.weight_values"),
    "fewer values": lambda t: t.update(
        {f"{LAYER}.weight_values": t[f"{LAYER}.weight_values"][:-1].clone()}
    ),
    "values of another type": lambda t: t.update(
        {f"{LAYER}.weight_values": t[f"{LAYER}.weight_values"].to(torch.int16)}
    ),
    "wild indices": lambda t: t[f"{LAYER}.weight_col_indices"].add_(1000),
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_files_are_one_line(harm, tmp_path):
    file = pybsp.save_packed(int8_model(static=True), tmp_path, dense=False)
    tensors = load_file(file)
    HARM[harm](tensors)
    save_file(tensors, file, header(file))
    with pytest.raises(ValueError, match=PACKED_FILE) as caught:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert LAYER in str(caught.value)


def test_a_truncated_file_is_one_line(tmp_path):
    file = pybsp.save_packed(int8_model(), tmp_path)
    content = file.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 9, 0):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="damaged or truncated"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_newer_version_is_named(tmp_path):
    file = pybsp.save_packed(int8_model(), tmp_path)
    save_file(load_file(file), file, {**header(file), VERSION_KEY: "4"})
    with pytest.raises(ValueError, match="version 4; this pybsp reads versions 1 to 3"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("dtype", "int4", "'bfloat16' or 'int8'; got 'int4'"),
        ("input_scales", [1], "maps names to numbers"),
        ("input_scales", {LAYER: "1"}, "maps names to numbers"),
        ("input_scales", {LAYER: -1.0}, "input_scale must be"),
        ("float32_modules", [3], "lists names of layers"),
        ("float32_modules", LAYER, "lists names of layers"),
    ],
)
def test_a_wrong_record_is_named(entry, value, message, tmp_path):
    pybsp.save_packed(int8_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][entry] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_pipeline(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    model = int8_model()
    pybsp.save_packed(model, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    classify = pipeline(
        "text-classification", model=str(tmp_path / "out"), device="cpu"
    )
    assert len(packed_layers(classify.model, "int8")) == 12
    direct = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert classify("good film") == direct("good film")
