"""ModernBERT: rotated queries and keys, windows, gated feed-forward parts."""

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
from .reader import Deviation, Reader

#: cos and sin ``(positions, head_dim / 2)`` of a type of layer.
Rotation = tuple[torch.Tensor, torch.Tensor]


def read_modernbert(model: nn.Module, reader: Reader) -> Reading:
    embeddings = reader.child(model, "embeddings", "Embeddings")
    reader.expect_children(embeddings, "tok_embeddings", "norm", "drop")
    reader.dropout(embeddings, "drop")
    layers = reader.layers(model, "layers", "EncoderLayer")
    kinds = {layer.attention_type for layer in layers}
    rotations = {kind: _read_rotation(model, kind, reader) for kind in kinds}
    spec = EncoderSpec(
        features=reader.config.hidden_size,
        layers=tuple(
            _read_layer(layer, rotations[layer.attention_type], reader)
            for layer in layers
        ),
        norm_first=True,
        embeddings=EmbeddingsSpec(
            reader.embedding(embeddings, "tok_embeddings"),
            None,
            None,
            reader.norm(embeddings, "norm"),
        ),
        final_norm=reader.norm(model, "final_norm"),
    )
    return Reading(spec, modernbert_inputs, reader.stock("BaseModelOutput"))


def modernbert_inputs(
    model: nn.Module,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    *others: Any,
    **options: Any,
) -> Inputs:
    # Rotations and windows of the native encoder go by the place in the row.
    inputs = bert_inputs(
        model, input_ids, attention_mask, None, None, position_ids, *others, **options
    )
    ids, config = inputs[0], vars(model)["config"]
    assert ids is not None
    if ids.shape[1] > vars(config)["max_position_embeddings"]:
        raise Deviation("it was called with more than max_position_embeddings tokens")
    return inputs


def _read_rotation(model: Any, kind: str, reader: Reader) -> Rotation:
    rotary = reader.child(model, "rotary_emb", "RotaryEmbedding")
    type_ = rotary.rope_type.get(kind)
    reader.expect(type_ == "default", f"its rotations are of type {type_!r}")
    frequencies = reader.buffer(rotary, f"{kind}_inv_freq")
    reader.expect(
        frequencies.is_cpu and frequencies.dtype == torch.float32,
        f"its rotary frequencies are {frequencies.dtype} on {frequencies.device}",
    )
    reader.copied(frequencies)
    length = reader.setting(reader.config, "max_position_embeddings")
    rows = torch.arange(length, device=frequencies.device)
    # Twice the same, for both halves of a head.
    cos, sin = rotary(frequencies, rows[None], kind)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _read_layer(layer: Any, rotation: Rotation, reader: Reader) -> LayerSpec:
    reader.expect_children(layer, "attn_norm", "attn", "mlp_norm", "mlp")
    first = type(layer.attn_norm) is nn.Identity
    if first:
        reader.child(layer, "attn_norm", nn.Identity)
    return LayerSpec(
        _read_attention(layer, rotation, reader),
        None if first else reader.norm(layer, "attn_norm"),
        _read_mlp(layer, reader),
        reader.norm(layer, "mlp_norm"),
    )


def _read_attention(layer: Any, rotation: Rotation, reader: Reader) -> AttentionSpec:
    attention = reader.child(layer, "attn", "Attention")
    reader.expect_children(attention, "Wqkv", "Wo", "out_drop")
    if type(attention.out_drop) is nn.Identity:
        reader.child(attention, "out_drop", nn.Identity)
    else:
        reader.dropout(attention, "out_drop")
    reader.drops(attention, attention.attention_dropout)
    window = None
    type_ = reader.setting(layer, "attention_type")
    if type_ == "sliding_attention":
        reader.setting(reader.config, "local_attention")  # twice the window
        window = reader.config.sliding_window
    else:
        full = type_ == "full_attention"
        reader.expect(full, f"its attention is of type {type_!r}")
    return AttentionSpec(
        (reader.linear(attention, "Wqkv"),),
        reader.linear(attention, "Wo"),
        heads=reader.heads(attention, 3 * attention.head_dim, "Wqkv"),
        scale=attention.head_dim**-0.5,
        window=window,
        cos=rotation[0],
        sin=rotation[1],
    )


def _read_mlp(layer: Any, reader: Reader) -> FeedForwardSpec:
    mlp = reader.child(layer, "mlp", "MLP")
    reader.expect_children(mlp, "Wi", "Wo", "drop", *reader.present(mlp, "act"))
    reader.dropout(mlp, "drop")
    activation, fused = reader.feed_forward_activation(mlp, "act", mlp.Wi)
    # Only the first half of what Wi computes passes through the activation.
    reader.expect(fused is None, "its gated layer computes an activation of its own")
    up, down = reader.linear(mlp, "Wi"), reader.linear(mlp, "Wo")
    return FeedForwardSpec(up, activation, down, gated=True)
