import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pybsp.cli.models import load_classifier


@pytest.fixture
def foreign(own_pruned):
    """A checkpoint with zero blocks from elsewhere: no packed file, no record."""
    (own_pruned / "model.pybsp.safetensors").unlink()
    path = own_pruned / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    return own_pruned


def test_packs_beside_the_dense_file(cli, foreign):
    dense = (foreign / "model.safetensors").read_bytes()
    run = cli("pack", foreign, "--json")
    assert run.status == 0, run.stderr
    assert run.data["packed_file_bytes"] < run.data["dense_file_bytes"] == len(dense)
    assert run.data["report"]["layers_packed"] == 12
    assert (foreign / "model.pybsp.safetensors").is_file()
    assert {tuple(row["block_shape"]) for row in run.data["report"]["layers"][:12]} == {
        (8, 1)
    }
    packed, _ = load_classifier(str(foreign), 2)
    weights = load_file(foreign / "model.safetensors")
    for name, value in packed.dequantize().state_dict().items():
        assert torch.equal(value, weights[name])


def test_packs_a_copy(cli, foreign, tmp_path):
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    out = tmp_path / "copy"
    run = cli("pack", foreign, "--out", out, "--block-shape", "4,1")
    assert run.status == 0, run.stderr
    assert "pybsp bench" in run.stdout
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before
    names = {path.name for path in out.iterdir()}
    assert {"model.pybsp.safetensors", "tokenizer.json", "config.json"} <= names
    record = json.loads((out / "config.json").read_text())["quantization_config"]
    assert record["modules"]["bert.encoder.layer.0.output.dense"] == [4, 1]


def test_a_model_without_zeros(cli, model, tmp_path):
    run = cli("pack", model, "--out", tmp_path / "copy")
    assert run.status == 1
    assert "cannot be packed" in run.stderr
    assert not (tmp_path / "copy").exists()


def test_an_out_that_is_taken(cli, foreign):
    run = cli("pack", foreign, "--out", foreign)
    assert run.status == 2
    assert "not an empty directory" in run.stderr


def test_only_packed_weights(cli, own_pruned):
    (own_pruned / "model.safetensors").unlink()
    run = cli("pack", own_pruned)
    assert run.status == 1
    assert "no dense weights" in run.stderr


def test_a_block_shape_that_does_not_divide(cli, foreign):
    run = cli("pack", foreign, "--block-shape", "7,1")
    assert run.status == 1
    assert "does not divide" in run.stderr
    assert not (foreign / "model.pybsp.safetensors").exists()


def test_not_finite(cli, foreign):
    path = foreign / "model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.0.output.dense.weight"][
        weights["bert.encoder.layer.0.output.dense.weight"] != 0
    ] = float("nan")
    save_file(weights, path, {"format": "pt"})
    run = cli("pack", foreign)
    assert run.status == 1
    assert "NaN" in run.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounded(cli, foreign, tmp_path, dtype):
    out = tmp_path / "copy"
    run = cli("pack", foreign, "--out", out, "--dtype", dtype, "--json")
    assert run.status == 0, run.stderr
    layers = run.data["report"]["layers"]
    assert [row["dtype"] for row in layers].count(dtype) == 12
    record = json.loads((out / "config.json").read_text())["quantization_config"]
    assert record["dtype"] == dtype
    stored = load_file(out / "model.pybsp.safetensors")
    values = stored["bert.encoder.layer.0.output.dense.weight_values"]
    assert values.dtype == getattr(torch, dtype)
    assert cli("check", out).status == 0
    # The record is followed, and the same bytes found again.
    assert cli("pack", out).status == 0
    again = load_file(out / "model.pybsp.safetensors")
    assert set(again) == set(stored)
    for name in stored:
        if not name.endswith("weight_scales"):
            assert torch.equal(again[name], stored[name]), name
    assert f"packed, {dtype}" in cli("pack", out, "--dtype", dtype).stdout


def test_an_unknown_type(cli, foreign):
    run = cli("pack", foreign, "--dtype", "int4")
    assert run.status == 2
    assert "int4" in run.stderr


def test_a_copy_has_the_modules_in_folders(cli, foreign, tmp_path):
    """As in a checkpoint of SentenceTransformers."""
    kept = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
    for name in kept:
        (foreign / name).parent.mkdir(exist_ok=True)
        (foreign / name).write_text(name)
    (foreign / "modules.json").write_text("[]")
    (foreign / "pytorch_model.bin").write_bytes(b"other weights")
    for out in (tmp_path / "copy", foreign / "2_Dense" / "copy"):
        assert cli("pack", foreign, "--out", out).status == 0
        assert {name: (out / name).read_text() for name in kept} == {
            name: name for name in kept
        }
        assert (out / "modules.json").is_file()
        assert not (out / "pytorch_model.bin").exists()
        assert not (out / "2_Dense" / "copy").exists()
        assert "quantization_config" in json.loads((out / "config.json").read_text())
