"""Bytes of a checkpoint by what they are for."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import size
from pybsp import pack_, save_packed
from pybsp.nn import BlockSparseLinear


def test_bytes_by_kind_add_up_to_the_file(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, vocab_size=50, max_position_embeddings=16,
        )
    )  # fmt: skip
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.weight.data[:32] = 0
    pack_(model, (8, 1), "int8", min_gain=0, fuse=False, shrink=False)
    save_packed(model, tmp_path)
    packed = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert len(packed) == 12
    found = size.sizes(tmp_path)
    assert found["values"] == sum(m.matrix.values.numel() for m in packed)
    assert found["scales"] == sum(4 * m.out_features for m in packed)
    counts = (m.matrix.nnz + m.out_features // 8 + 1 for m in packed)
    assert found["indices"] == sum(2 * count for count in counts)
    biases, norms = sum(m.out_features for m in packed), 2 * 2 * 2 * 32
    assert found["other"] == 4 * (biases + norms)
    head = 4 * (32 * 32 + 32 + 2 * 32 + 2)
    parts = ("encoder", "embeddings", "header")
    assert found["file"] == head + sum(found[part] for part in parts)
