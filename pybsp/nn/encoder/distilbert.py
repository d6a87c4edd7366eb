"""DistilBERT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...ops import (
    AttentionSpec,
    EmbeddingsSpec,
    EncoderSpec,
    FeedForwardSpec,
    LayerSpec,
)
from .bert import bert_inputs
from .forward import Inputs, Reading
from .reader import Reader


def read_distilbert(model: nn.Module, reader: Reader) -> Reading:
    stack = reader.child(model, "transformer", "=Transformer")
    reader.expect_children(stack, "layer")
    layers = reader.layers(stack, "layer", "=TransformerBlock")
    spec = EncoderSpec(
        features=reader.config.dim,
        layers=tuple(_read_layer(layer, reader) for layer in layers),
        embeddings=_read_embeddings(model, reader),
    )
    return Reading(spec, distilbert_inputs, reader.stock("BaseModelOutput"))


def distilbert_inputs(
    model: nn.Module,
    input_ids: Any = None,
    attention_mask: Any = None,
    inputs_embeds: Any = None,
    position_ids: Any = None,
    *others: Any,
    **options: Any,
) -> Inputs:
    return bert_inputs(
        model, input_ids, attention_mask, None, position_ids, inputs_embeds, *others,
        **options,
    )  # fmt: skip


def _read_embeddings(model: nn.Module, reader: Reader) -> EmbeddingsSpec:
    embeddings = reader.child(model, "embeddings", "=Embeddings")
    tables = ("word_embeddings", "position_embeddings")
    reader.expect_children(embeddings, *tables, "LayerNorm", "dropout")
    reader.dropout(embeddings, "dropout")
    words, positions = (reader.embedding(embeddings, name) for name in tables)
    places = reader.buffer(embeddings, "position_ids")
    usual = torch.arange(places.shape[-1], device=places.device)
    reader.expect(torch.equal(places[0], usual), "it has its own position_ids")
    return EmbeddingsSpec(words, positions, None, reader.norm(embeddings, "LayerNorm"))


def _read_layer(layer: Any, reader: Reader) -> LayerSpec:
    names = ("attention", "sa_layer_norm", "ffn", "output_layer_norm")
    reader.expect_children(layer, *names)
    attention = reader.child(layer, "attention", "SelfAttention")
    projections = ("q_lin", "k_lin", "v_lin")
    reader.expect_children(attention, *projections, "out_lin", "dropout")
    reader.dropout(attention, "dropout")
    reader.drops(attention, attention.dropout.p)
    query, key, value = (reader.linear(attention, name) for name in projections)
    return LayerSpec(
        AttentionSpec(
            (query, key, value),
            reader.linear(attention, "out_lin"),
            heads=reader.heads(attention, attention.attention_head_size, *projections),
            scale=reader.setting(attention, "scaling"),
        ),
        reader.norm(layer, "sa_layer_norm"),
        _read_feed_forward(layer, reader),
        reader.norm(layer, "output_layer_norm"),
    )


def _read_feed_forward(layer: Any, reader: Reader) -> FeedForwardSpec:
    ffn = reader.child(layer, "ffn", "=FFN")
    chunk = ffn.chunk_size_feed_forward
    reader.expect(chunk == 0, f"its feed-forward runs in chunks of {chunk}")
    linears = ("lin1", "lin2", "dropout")
    reader.expect_children(ffn, *linears, *reader.present(ffn, "activation"))
    reader.dropout(ffn, "dropout")
    activation, fused = reader.feed_forward_activation(ffn, "activation", ffn.lin1)
    return FeedForwardSpec(
        reader.linear(ffn, "lin1", fused), activation, reader.linear(ffn, "lin2")
    )
