"""Whether a packed file and the dense file beside it are the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import build, header, packed
from safetensors.torch import load_file, save_file
from torch import nn

import pybsp
from pybsp.integrations.outdated import same_weights
from pybsp.integrations.packed_file import (
    ALIGNMENT,
    PACKED_FILE,
    SAMPLES_KEY,
    dense_files,
)


def same(folder: Path) -> bool:
    return same_weights(folder / PACKED_FILE, dense_files(folder))


def saved(name: str, folder: Path, dtype: str = "float32") -> nn.Module:
    # ViT and DeiT are dense under other names than the modules of transformers have.
    model = packed(build(name, "ForImageClassification"), dtype=dtype, fuse=False)
    pybsp.save_packed(model, folder)
    return model


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("part", ["query.weight", "output.dense.bias"])
def test_only_encoder_weights_were_changed(name, dtype, part, tmp_path, caplog):
    model = saved(name, tmp_path, dtype)
    assert same(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if "layer.1." in key and key.endswith(part))
    assert key not in load_file(tmp_path / PACKED_FILE)
    weights[key] *= 1.5
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert not same(tmp_path)
    with caplog.at_level("WARNING"):
        loaded = type(model).from_pretrained(tmp_path)
    assert "holds other weights" in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    if dtype == "float32":
        assert torch.equal(again[key], weights[key])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_saved_again_as_it_was(dtype, shard, tmp_path):
    model = saved("vit", tmp_path / "a", dtype)
    loaded = type(model).from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b", max_shard_size=shard)
    files = dense_files(tmp_path / "b")
    assert (len(files) > 1) == (shard == "40KB")
    assert same_weights(tmp_path / "a" / PACKED_FILE, files)


def test_a_zero_of_the_other_sign_is_the_same(tmp_path):
    saved("vit", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for weight in weights.values():
        weight[weight == 0] *= -1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(tmp_path)


def test_files_without_samples_load_as_before(tmp_path, caplog):
    model = saved("vit", tmp_path)
    metadata = header(tmp_path / PACKED_FILE)
    del metadata[SAMPLES_KEY]
    save_file(load_file(tmp_path / PACKED_FILE), tmp_path / PACKED_FILE, metadata)
    assert same(tmp_path)
    type(model).from_pretrained(tmp_path)
    assert not caplog.text


def test_only_other_names_are_sampled(tmp_path):
    file = pybsp.save_packed(build("bert"), tmp_path / "bert")
    assert SAMPLES_KEY not in header(file)
    file = pybsp.save_packed(build("vit"), tmp_path / "vit", dense=False)
    assert SAMPLES_KEY not in header(file)


def test_tensors_begin_aligned_after_samples(tmp_path):
    saved("vit", tmp_path)
    assert SAMPLES_KEY in header(tmp_path / PACKED_FILE)
    size = int.from_bytes((tmp_path / PACKED_FILE).read_bytes()[:8], "little")
    assert (8 + size) % ALIGNMENT == 0


@pytest.mark.parametrize("samples", ["{", "[]"])
def test_damaged_samples_are_one_line(samples, tmp_path):
    saved("vit", tmp_path)
    metadata = {**header(tmp_path / PACKED_FILE), SAMPLES_KEY: samples}
    save_file(load_file(tmp_path / PACKED_FILE), tmp_path / PACKED_FILE, metadata)
    with pytest.raises(ValueError, match="save the model again"):
        same(tmp_path)
