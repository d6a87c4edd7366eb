"""The numbers and the record of a sparse model."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import pybsp
from pybsp import print_sparsity
from pybsp.nn.linear import BlockSparseLinear
from pybsp.pruning import model_sparsity, sparsity_record
from pybsp.pruning.record import by_layer, layer_recorded


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight.view(4, 8, 16)[:, :, :12] = 0.0
        model[2].weight[0, 0] = 0.0
    model[0].pybsp_block_shape = (8, 1)
    return model


def test_counts_by_layer() -> None:
    report = model_sparsity(pruned())
    first, second = report.layers
    assert (first.name, first.shape, first.block_shape) == ("0", (32, 16), (8, 1))
    assert (first.zeros, first.blocks, first.zero_blocks) == (384, 64, 48)
    assert first.sparsity == 0.75
    assert (second.block_shape, second.zeros, second.blocks) == (None, 1, 0)
    assert report.parameters == 32 * 16 + 32 + 32 * 8 + 8
    assert report.sparsity == 0.75


def test_without_block_shapes_all_linear_weights_count() -> None:
    model = pruned()
    del model[0].pybsp_block_shape
    report = model_sparsity(model)
    assert report.sparsity == 385 / (512 + 256)
    assert "weights of 2 linear layers: 768" in report.summary()


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert len(model_sparsity(model).layers) == 1


def test_a_packed_layer_counts_as_before() -> None:
    model = pruned()
    dense = model_sparsity(model)
    model[0] = BlockSparseLinear.from_linear(model[0], (8, 1))
    packed = model_sparsity(model)
    assert packed.layers == dense.layers
    assert packed.parameters == dense.parameters


def test_table_and_summary_are_printed() -> None:
    out = io.StringIO()
    print_sparsity(pruned(), Console(file=out, width=200))
    text = out.getvalue()
    assert "48 / 64" in text
    assert "75.00 %" in text
    assert "zero weights: 384 || weights of 1 pruned layers: 512" in text
    assert "of all 808 parameters: 47.52 %" in text


def test_record() -> None:
    model = pruned()
    record = sparsity_record(nn.DataParallel(model))
    assert record.pop("pybsp_version")
    assert record == {
        "quant_method": "pybsp",
        "format": "dense",
        "format_version": 1,
        "block_shape": [8, 1],
        "modules": {"0": [8, 1]},
        "sparsity": 0.75,
    }
    assert sparsity_record(model, (1, "in/8"))["block_shape"] == [1, "in/8"]


def test_record_of_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer carries a block shape"):
        sparsity_record(nn.Sequential(nn.Linear(4, 4)))


def test_an_int8_layer_counts_as_its_dense_form() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 3))
    with torch.no_grad():
        model[0].weight[:8] = 0
    model[0] = BlockSparseLinear.from_linear(model[0], (8, 1), dtype="int8")
    packed = model_sparsity(model)
    model[0] = model[0].to_linear()
    dense = model_sparsity(model)
    assert packed.layers == dense.layers
    assert packed.parameters == dense.parameters


class Owner(nn.Sequential):
    """Holds a config as transformers models do."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.config = Config()


class Config:
    def to_dict(self):
        return vars(self)


class Around(nn.Sequential):
    """As a SentenceTransformer hands out the config of the model inside of it."""

    @property
    def config(self):
        return self[0].config


def pruned_around(names="all-linear"):
    """A model around another one, pruned in these layers, and what pruning recorded."""
    torch.manual_seed(0)
    around = Around(Owner(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 16))
    cfg = pybsp.BlockPruningConfig(
        block_shape=(4, 1), target_modules=names, exclude_modules=(),
        method="magnitude", phases=(0, 0, 1),
    )  # fmt: skip
    pruner = pybsp.BlockPruner(around, cfg, total_steps=10)
    pruner.cut()
    return around, pruner.finalize()


def test_a_config_inside_of_the_model_has_its_own_names():
    around, record = pruned_around()
    assert list(record["modules"]) == ["0.0", "0.1", "1"]
    assert list(around.config.quantization_config["modules"]) == ["0", "1"]
    assert around.config.quantization_config == sparsity_record(around[0])


def test_a_config_inside_of_the_model_of_which_nothing_was_pruned():
    around, record = pruned_around("1")
    assert list(record["modules"]) == ["1"]
    assert not hasattr(around.config, "quantization_config")


def test_shapes_of_a_record_are_found_from_around_the_model():
    around, _ = pruned_around(r"0\.0")
    del around[0][0].pybsp_block_shape
    optimizer = torch.optim.SGD(around.parameters(), lr=0.1)
    with pybsp.preserve_sparsity(around, optimizer) as kept:
        assert [entry.block_shape for entry in kept._kept] == [(4, 1)]


def test_a_layer_of_a_record_is_not_another_whose_name_ends_so():
    names = ["enc.dense", "dense", "head", "a.out", "b.out", "bert.pooler"]
    recorded = {"enc.dense": 1, "out": 2, "pooler": 3, "model.head": 4, "x": 5}
    found = {"enc.dense": 1, "bert.pooler": 3, "head": 4}
    assert by_layer(recorded, names) == found
    assert layer_recorded("0.enc.dense", names) == "enc.dense"
    assert layer_recorded("out", names) is None


def test_a_new_head_is_not_taken_for_a_pruned_layer():
    model = nn.Module()
    model.enc, model.dense = nn.Module(), nn.Linear(16, 3)
    model.enc.dense = nn.Linear(16, 16)
    nn.init.zeros_(model.dense.weight)
    model.enc.dense.weight.data[:8] = 0
    modules = {"enc.dense": [8, 1]}
    model.config = SimpleNamespace(quantization_config={"modules": modules})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pybsp.preserve_sparsity(model, optimizer) as kept:
        assert [entry.name for entry in kept._kept] == ["enc.dense"]
