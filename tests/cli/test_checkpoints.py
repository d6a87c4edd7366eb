"""What ``config.json`` records, when a checkpoint is checked and packed again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoders import build, packed, packed_layers, record_in, text
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertModel

import pybsp
from pybsp.pruning.record import sparsity_record

LAYER = "bert.encoder.layer.0.output.dense"
TABLE = "bert.embeddings.word_embeddings"


def classifier() -> nn.Module:
    return build("bert", "ForSequenceClassification")


def encoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layer" in name
    }


def recorded(model: nn.Module) -> nn.Module:
    for linear in encoder_layers(model).values():
        linear.pybsp_block_shape = (8, 1)
    return model


@pytest.fixture
def rounded(tmp_path: Path) -> Path:
    """int8 with static scales, one layer in float32, and notes in the record."""
    model = classifier()
    with torch.no_grad():
        model.get_submodule(TABLE).weight[:45] = 0
    model.get_submodule(TABLE).pybsp_block_shape = (1, 64)
    model.config.quantization_config = {
        **sparsity_record(recorded(model)), "fuse": False, "min_gain": 0.5,
    }  # fmt: skip
    batches = [text(2, 12, seed=seed) for seed in range(2)]
    int8 = packed(model, dtype="int8", calibration=batches, float32_modules=[LAYER])
    pybsp.save_packed(int8, tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.parametrize("options", [(), ("--dtype", "int8")])
def test_packing_again_keeps_layers_scales_and_notes(cli, rounded, options):
    before = record_in(rounded)
    assert before["float32_modules"] == [LAYER]
    assert len(before["input_scales"]) == 11
    dense = load_file(rounded / "model.safetensors")
    run = cli("pack", rounded, *options)
    assert run.status == 0, run.stderr
    after = record_in(rounded)
    assert after["embeddings"] == {TABLE: [1, 64]}
    assert (after["fuse"], after["min_gain"]) == (False, 0.5)
    assert after == {**before, "sparsity": after["sparsity"]}
    again = load_file(rounded / "model.safetensors")
    assert torch.equal(again[f"{LAYER}.weight"], dense[f"{LAYER}.weight"])
    loaded = AutoModelForSequenceClassification.from_pretrained(rounded)
    static = packed_layers(loaded, "int8")
    assert len(static) == 11
    assert all(layer.static_scale for layer in static.values())
    assert cli("check", rounded).status == 0


def test_another_type_keeps_what_holds_for_it(cli, rounded):
    assert cli("pack", rounded, "--dtype", "bfloat16").status == 0
    record = record_in(rounded)
    assert record["float32_modules"] == [LAYER]
    assert "input_scales" not in record
    assert cli("pack", rounded, "--dtype", "float32").status == 0
    assert not {"dtype", "float32_modules"} & set(record_in(rounded))


def test_a_sparsity_is_counted_again(cli, rounded):
    path = rounded / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity"] = 0.1
    path.write_text(json.dumps(config))
    assert cli("pack", rounded, "--block-shape", "4,1").status == 0
    record = record_in(rounded)
    assert record["sparsity"] > 0.5
    assert record["block_shape"] == [4, 1]


@pytest.mark.parametrize(
    ("entry", "value"),
    [("input_scales", {LAYER: "one"}), ("float32_modules", 3), ("dtype", "int4")],
)
def test_a_damaged_record_is_one_line(cli, rounded, entry, value):
    path = rounded / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][entry] = value
    path.write_text(json.dumps(config))
    files = {file.name: file.read_bytes() for file in rounded.iterdir()}
    run = cli("pack", rounded)
    assert run.status == 1
    assert len(run.stderr.splitlines()) == 1
    assert entry in run.stderr
    assert {file.name: file.read_bytes() for file in rounded.iterdir()} == files


def check_and_pack(cli, folder: Path) -> dict:
    checked = cli("check", folder, "--json")
    assert checked.status == 0, checked.stdout
    assert len(checked.data["layers"]) == 12
    assert "encoder.layer.0.output.dense" in {
        row["name"] for row in checked.data["layers"]
    }
    run = cli("pack", folder)
    assert run.status == 0, run.stderr
    assert cli("check", folder).status == 0
    return record_in(folder)


def test_the_base_model_of_a_pruned_head_model(cli, tmp_path):
    model = recorded(classifier())
    model.get_submodule(TABLE).pybsp_block_shape = (1, 64)
    model.config.quantization_config = sparsity_record(model)
    model.bert.save_pretrained(tmp_path)
    assert LAYER in record_in(tmp_path)["modules"]
    record = check_and_pack(cli, tmp_path)
    assert set(record["modules"]) == set(encoder_layers(model.bert))
    assert record["embeddings"] == {TABLE.removeprefix("bert."): [1, 64]}


def test_the_base_model_of_a_head_model_whose_head_was_pruned(cli, tmp_path):
    model = recorded(classifier())
    model.classifier.pybsp_block_shape = (1, 1)
    model.config.quantization_config = sparsity_record(model)
    model.bert.save_pretrained(tmp_path)
    assert "classifier" in record_in(tmp_path)["modules"]
    record = check_and_pack(cli, tmp_path)
    assert set(record["modules"]) == set(encoder_layers(model.bert))


class Sentences(nn.Sequential):
    """As a SentenceTransformer holds its model and hands out its config."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(nn.ModuleDict({"auto_model": model}))

    @property
    def config(self):
        return self[0]["auto_model"].config


def test_a_record_made_of_a_model_around_it(cli, tmp_path):
    around = Sentences(recorded(build("bert")))
    around.config.quantization_config = sparsity_record(around)
    around[0]["auto_model"].save_pretrained(tmp_path)
    assert (
        f"0.auto_model.{LAYER.removeprefix('bert.')}" in record_in(tmp_path)["modules"]
    )
    check_and_pack(cli, tmp_path)
    assert isinstance(BertModel.from_pretrained(tmp_path), BertModel)


def test_a_layer_that_the_model_has_not(cli, tmp_path):
    model = recorded(build("bert"))
    record = sparsity_record(model)
    record["modules"]["encoder.layer.7.output.dense"] = [8, 1]
    model.config.quantization_config = record
    model.save_pretrained(tmp_path)
    run = cli("pack", tmp_path)
    assert run.status == 1
    assert "names 'encoder.layer.7.output.dense', which BertModel has not" in run.stderr
