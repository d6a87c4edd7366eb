"""BERT, and what transformers derives from its modules: RoBERTa, XLM-R, CamemBERT and
ELECTRA."""

from __future__ import annotations

from collections.abc import Callable
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
from .forward import (
    Inputs,
    Reading,
    check_ids,
    check_mask,
    check_other_arguments,
    check_rows,
)
from .reader import Reader


def read_bert(model: nn.Module, reader: Reader) -> Reading:
    """Positions count from 0 in every row."""
    return _pooled_reading(model, reader, bert_inputs)


def read_roberta(model: nn.Module, reader: Reader) -> Reading:
    """Positions count the tokens that are not padding, from ``padding_idx + 1``."""
    reading = _pooled_reading(model, reader, roberta_inputs)
    padding = vars(model._modules["embeddings"]).get("padding_idx")
    reader.expect(isinstance(padding, int), "it has no padding_idx")
    return reading


def _pooled_reading(
    model: nn.Module, reader: Reader, inputs: Callable[..., Inputs]
) -> Reading:
    embeddings = _read_embeddings(model, reader)
    return Reading(
        _spec(model, reader, embeddings),
        inputs,
        reader.stock("BaseModelOutputWithPoolingAndCrossAttentions"),
        pools=True,
    )


def read_electra(model: nn.Module, reader: Reader) -> Reading:
    """With a projection behind them, the embeddings stay with torch."""
    output = reader.stock("BaseModelOutputWithPastAndCrossAttentions")
    if "embeddings_project" in model._modules:
        reader.expect_children(model, "embeddings", "embeddings_project", "encoder")
        return Reading(_spec(model, reader, None), electra_inputs, output)
    reader.expect_children(model, "embeddings", "encoder")
    spec = _spec(model, reader, _read_embeddings(model, reader))
    return Reading(spec, bert_inputs, output)


def bert_inputs(
    model: nn.Module,  # noqa: ARG001
    input_ids: Any = None,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    *others: Any,
    **options: Any,
) -> Inputs:
    if others or options:
        check_other_arguments(others, options)
    ids = check_ids(input_ids)
    shape = ids.shape
    return (
        ids,
        None,
        check_mask(attention_mask, shape),
        check_rows("token_type_ids", token_type_ids, shape),
        check_rows("position_ids", position_ids, shape),
    )


def roberta_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> Inputs:
    ids, _, mask, token_types, positions = bert_inputs(model, *args, **kwargs)
    assert ids is not None
    if positions is None:
        embeddings: Any = model._modules["embeddings"]
        positions = positions_after_padding(ids, embeddings.padding_idx)
    return ids, None, mask, token_types, positions


def positions_after_padding(ids: torch.Tensor, padding: int) -> torch.Tensor:
    """``padding`` at padding, elsewhere ``padding`` plus the tokens so far."""
    tokens = ids.ne(padding)
    return tokens.cumsum(1).mul_(tokens).add_(padding)


def electra_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> Inputs:
    ids, _, mask, token_types, positions = bert_inputs(model, *args, **kwargs)
    embeddings, project = (
        model._modules[name] for name in ("embeddings", "embeddings_project")
    )
    assert embeddings is not None
    assert project is not None
    hidden = embeddings(
        input_ids=ids, token_type_ids=token_types, position_ids=positions
    )
    return None, project(hidden), mask, None, None


def _read_embeddings(model: nn.Module, reader: Reader) -> EmbeddingsSpec:
    embeddings = reader.child(model, "embeddings", "Embeddings")
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    reader.expect_children(embeddings, *tables, "LayerNorm", "dropout")
    reader.dropout(embeddings, "dropout")
    words, positions, token_types = (
        reader.embedding(embeddings, name) for name in tables
    )
    # The defaults of both, which a checkpoint of old may hold otherwise.
    places = reader.buffer(embeddings, "position_ids")
    usual = torch.arange(places.shape[-1], device=places.device)
    reader.expect(torch.equal(places[0], usual), "it has its own position_ids")
    types = reader.buffer(embeddings, "token_type_ids")
    reader.copied(places)
    reader.copied(types)
    reader.expect(not bool(types.any()), "it has its own token_type_ids")
    norm = reader.norm(embeddings, "LayerNorm")
    return EmbeddingsSpec(words, positions, token_types, norm)


def _spec(
    model: nn.Module, reader: Reader, embeddings: EmbeddingsSpec | None
) -> EncoderSpec:
    kind = getattr(reader.config, "position_embedding_type", None) or "absolute"
    reader.expect(kind == "absolute", f"its position embeddings are {kind}")
    encoder = reader.child(model, "encoder", "Encoder")
    reader.expect_children(encoder, "layer")
    layers = reader.layers(encoder, "layer", "Layer")
    return EncoderSpec(
        features=reader.config.hidden_size,
        layers=tuple(_read_layer(layer, reader) for layer in layers),
        embeddings=embeddings,
    )


def _read_layer(layer: Any, reader: Reader) -> LayerSpec:
    reader.expect_children(layer, "attention", "intermediate", "output")
    chunk = layer.chunk_size_feed_forward
    reader.expect(chunk == 0, f"its feed-forward runs in chunks of {chunk}")
    reader.expect(not layer.is_decoder, "it is a decoder")
    attention = reader.child(layer, "attention", "Attention")
    reader.expect_children(attention, "self", "output")
    inner = reader.child(attention, "self", "SelfAttention")
    projections = ("query", "key", "value")
    reader.expect_children(inner, *projections, "dropout")
    reader.dropout(inner, "dropout")
    reader.drops(inner, inner.dropout.p)
    output = reader.child(attention, "output", "SelfOutput")
    reader.expect_children(output, "dense", "LayerNorm", "dropout")
    reader.dropout(output, "dropout")
    query, key, value = (reader.linear(inner, name) for name in projections)
    return LayerSpec(
        AttentionSpec(
            (query, key, value),
            reader.linear(output, "dense"),
            heads=reader.heads(inner, inner.attention_head_size, *projections),
            scale=reader.setting(inner, "scaling"),
        ),
        reader.norm(output, "LayerNorm"),
        *read_intermediate(layer, reader),
    )


def read_intermediate(layer: nn.Module, reader: Reader) -> tuple[Any, Any]:
    """The feed-forward part of BERT's layer and its LayerNorm."""
    up = reader.child(layer, "intermediate", "Intermediate")
    act = "intermediate_act_fn"
    reader.expect_children(up, "dense", *reader.present(up, act))
    activation, fused = reader.feed_forward_activation(up, act, up.dense)
    down = reader.child(layer, "output", "Output")
    reader.expect_children(down, "dense", "LayerNorm", "dropout")
    reader.dropout(down, "dropout")
    feed_forward = FeedForwardSpec(
        reader.linear(up, "dense", fused), activation, reader.linear(down, "dense")
    )
    return feed_forward, reader.norm(down, "LayerNorm")
