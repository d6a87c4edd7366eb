"""The numbers and the record of a sparse model."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from pybsp import print_sparsity
from pybsp.nn.linear import BlockSparseLinear
from pybsp.pruning import model_sparsity, sparsity_record


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
