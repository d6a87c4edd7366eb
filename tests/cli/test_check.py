import json

import pytest
from safetensors.torch import load_file, save_file

from pybsp.nn import pack, plan

LAYER = "bert.encoder.layer.1.output.dense"


@pytest.fixture
def change(own_pruned):
    """Rewrite the dense weights or the record of a checkpoint."""

    def apply(weights=None, record=None):
        if weights is not None:
            path = own_pruned / "model.safetensors"
            tensors = load_file(path)
            weights(tensors)
            save_file(tensors, path, {"format": "pt"})
        if record is not None:
            path = own_pruned / "config.json"
            config = json.loads(path.read_text())
            record(config["quantization_config"])
            path.write_text(json.dumps(config))
        return own_pruned

    return apply


def problems(run):
    assert run.status == 1, run.stdout
    assert run.data["ok"] is False
    return "; ".join(run.data["problems"])


def test_a_sound_checkpoint(cli, pruned):
    run = cli("check", pruned, "--json")
    assert run.status == 0
    assert run.data["ok"] is True
    assert run.data["problems"] == []
    assert run.data["packed_agrees"] is True
    assert run.data["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert run.data["expected_speedup_of_linear_layers"] > 0
    assert run.data["environment"]["isa"]
    results = json.loads((pruned / "results.json").read_text())
    found = {row["name"]: row["density"] for row in run.data["layers"]}
    assert found == {row["name"]: row["density"] for row in results["layers"]}


def test_the_table_for_people(cli, pruned):
    run = cli("check", pruned)
    assert run.status == 0
    assert LAYER in run.stdout
    assert "sound; " in run.stdout
    assert "in use" in run.stdout


def test_when_loading_finds_nothing_worth_packing(cli, change, monkeypatch):
    def refill(tensors):
        tensors[f"{LAYER}.weight"] += 0.01

    def nothing(*_, **__):
        raise plan.NothingToPack("no layer would be faster")

    monkeypatch.setattr(pack, "pack_", nothing)
    found = problems(cli("check", change(weights=refill), "--json"))
    assert "were trained on without masks" in found


def test_trained_on_without_masks(cli, change):
    def refill(tensors):
        tensors[f"{LAYER}.weight"] += 0.01

    folder = change(weights=refill)
    found = problems(cli("check", folder, "--json"))
    assert "were trained on without masks" in found


def test_zeros_that_are_not_in_blocks(cli, change):
    def transpose(tensors):
        weight = tensors[f"{LAYER}.weight"]
        tensors[f"{LAYER}.weight"] = weight.flatten()[
            __import__("torch").randperm(weight.numel())
        ].reshape(weight.shape)

    found = problems(cli("check", change(weights=transpose), "--json"))
    assert f"'{LAYER}'" in found
    assert "do not lie in these blocks" in found


def test_weights_that_are_not_finite(cli, change):
    def spoil(tensors):
        tensors[f"{LAYER}.weight"][0, 0] = float("nan")

    assert "NaN" in problems(cli("check", change(weights=spoil), "--json"))


def test_the_packed_file_of_another_model(cli, own_pruned):
    path = own_pruned / "model.pybsp.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    # Not in a row that loading samples to notice files that do not belong together.
    tensors["bert.embeddings.word_embeddings.weight"][5] += 1
    save_file(tensors, path, metadata)
    found = problems(cli("check", own_pruned, "--json"))
    assert "differs from the dense file in 1 tensors" in found
    assert "bert.embeddings.word_embeddings.weight" in found


@pytest.mark.parametrize("name", ["model.safetensors", "model.pybsp.safetensors"])
def test_a_truncated_file(cli, own_pruned, name):
    path = own_pruned / name
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot load" in problems(cli("check", own_pruned, "--json"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda r: r["modules"].update({LAYER: [8]}), "damaged"),
        (lambda r: r["modules"].update({LAYER: [7, 1]}), "does not divide"),
        (lambda r: r["modules"].update({"bert.nothing": [8, 1]}), "bert.nothing"),
        (lambda r: r.update(modules={}), "names no modules"),
        (lambda r: r.update(sparsity=0.5), "records a sparsity of 0.5"),
    ],
)
def test_a_record_that_is_wrong(cli, change, record, message):
    assert message in problems(cli("check", change(record=record), "--json"))


def test_what_is_missing_is_told(cli, own_pruned):
    (own_pruned / "model.pybsp.safetensors").unlink()
    run = cli("check", own_pruned, "--json")
    assert run.status == 0
    assert any("pybsp pack" in hint for hint in run.data["hints"])


def test_a_dense_model(cli, model):
    found = problems(cli("check", model, "--json"))
    assert "no linear layer has blocks of zeros" in found


def test_a_forced_isa_is_told(cli, pruned, monkeypatch):
    monkeypatch.setenv("PYBSP_ISA", "generic")
    run = cli("check", pruned, "--json")
    assert any("PYBSP_ISA=generic" in hint for hint in run.data["hints"])


def test_config_that_is_no_json(cli, own_pruned):
    (own_pruned / "config.json").write_text("{")
    run = cli("check", own_pruned)
    assert run.status == 1
    assert "not JSON" in run.stderr
