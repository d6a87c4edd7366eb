"""MPNet: BERT's layers with a bias on the scores by the distance of query and key."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...ops import AttentionSpec, EmbeddingsSpec, EncoderSpec, LayerSpec
from .bert import bert_inputs, positions_after_padding, read_intermediate
from .forward import Inputs, Reading
from .reader import Deviation, Reader


def read_mpnet(model: nn.Module, reader: Reader) -> Reading:
    embeddings = reader.child(model, "embeddings", "Embeddings")
    tables = ("word_embeddings", "position_embeddings")
    reader.expect_children(embeddings, *tables, "LayerNorm", "dropout")
    reader.dropout(embeddings, "dropout")
    words, positions = (reader.embedding(embeddings, name) for name in tables)
    encoder = reader.child(model, "encoder", "Encoder")
    reader.expect_children(encoder, "layer", "relative_attention_bias")
    bias = _relative_bias(encoder, positions.shape[0], reader)
    layers = reader.layers(encoder, "layer", "Layer")
    spec = EncoderSpec(
        features=reader.config.hidden_size,
        layers=tuple(_read_layer(layer, bias, reader) for layer in layers),
        embeddings=EmbeddingsSpec(
            words, positions, None, reader.norm(embeddings, "LayerNorm")
        ),
    )
    output = reader.stock("BaseModelOutputWithPooling")
    return Reading(spec, mpnet_inputs, output, pools=True)


def mpnet_inputs(
    model: nn.Module,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    *others: Any,
    **options: Any,
) -> Inputs:
    ids, _, mask, _, positions = bert_inputs(
        model, input_ids, attention_mask, None, position_ids, *others, **options
    )
    assert ids is not None
    embeddings: Any = model._modules["embeddings"]
    if ids.shape[1] > embeddings.position_embeddings.weight.shape[0]:
        # Padding may reach further than the positions of tokens.
        raise Deviation("it was called with more tokens than it has positions")
    if positions is None:
        positions = positions_after_padding(ids, embeddings.padding_idx)
    return ids, None, mask, None, positions


def _relative_bias(encoder: Any, rows: int, reader: Reader) -> torch.Tensor:
    """``(heads, 2 rows - 1)`` by ``query - key + rows - 1``."""
    # A copy, which does not see a change in place: that is watched too.
    table = reader.embedding(encoder, "relative_attention_bias")
    reader.copied(table)
    # The stock buckets count ``key - query``.
    distances = torch.arange(rows - 1, -rows, -1, device=table.device)
    buckets = encoder.relative_position_bucket(distances)
    return table.detach()[buckets].t().contiguous()


def _read_layer(layer: Any, bias: torch.Tensor, reader: Reader) -> LayerSpec:
    reader.expect_children(layer, "attention", "intermediate", "output")
    outer = reader.child(layer, "attention", "Attention")
    reader.expect_children(outer, "attn", "LayerNorm", "dropout")
    reader.dropout(outer, "dropout")
    attention = reader.child(outer, "attn", "SelfAttention")
    reader.expect_children(attention, "q", "k", "v", "o", "dropout")
    reader.dropout(attention, "dropout")
    query, key, value = (reader.linear(attention, name) for name in "qkv")
    size = attention.attention_head_size
    return LayerSpec(
        AttentionSpec(
            (query, key, value),
            reader.linear(attention, "o"),
            heads=reader.heads(attention, size, *"qkv"),
            scale=size**-0.5,
            relative_bias=bias,
        ),
        reader.norm(outer, "LayerNorm"),
        *read_intermediate(layer, reader),
    )
