"""ViT and DeiT: the patches are embedded by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...ops import AttentionSpec, EncoderSpec, FeedForwardSpec, LayerSpec
from .forward import Inputs, Reading, check_other_arguments
from .reader import Deviation, Reader


def read_vit(model: nn.Module, reader: Reader) -> Reading:
    layers = reader.layers(model, "layers", "Layer")
    spec = EncoderSpec(
        features=reader.config.hidden_size,
        layers=tuple(_read_layer(layer, reader) for layer in layers),
        norm_first=True,
        final_norm=reader.norm(model, "layernorm"),
    )
    output = reader.stock("BaseModelOutputWithPooling")
    return Reading(spec, vit_inputs, output, pools=True)


def vit_inputs(
    model: nn.Module,
    pixel_values: Any = None,
    bool_masked_pos: Any = None,
    interpolate_pos_encoding: Any = None,
    attention_mask: Any = None,
    *others: Any,
    **options: Any,
) -> Inputs:
    check_other_arguments((attention_mask, *others), options)
    if type(pixel_values) is not torch.Tensor or not pixel_values.is_cpu:
        raise Deviation("it was called without pixel_values")
    embeddings: Any = model._modules["embeddings"]
    # As the stock forward does.
    dtype = embeddings.patch_embeddings.projection.weight.dtype
    hidden = embeddings(
        pixel_values.to(dtype),
        bool_masked_pos=bool_masked_pos,
        interpolate_pos_encoding=interpolate_pos_encoding,
    )
    if hidden.dtype is not torch.float32:
        raise Deviation("its embeddings are not float32")
    return None, hidden, None, None, None


def _read_layer(layer: Any, reader: Reader) -> LayerSpec:
    names = ("attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
    reader.expect_children(layer, *names)
    reader.dropout(layer, "dropout")
    attention = reader.child(layer, "attention", "Attention")
    projections = ("q_proj", "k_proj", "v_proj")
    reader.expect_children(attention, *projections, "o_proj")
    reader.drops(attention, attention.attention_dropout)
    query, key, value = (reader.linear(attention, name) for name in projections)
    return LayerSpec(
        AttentionSpec(
            (query, key, value),
            reader.linear(attention, "o_proj"),
            heads=reader.heads(attention, attention.head_dim, *projections),
            scale=reader.setting(attention, "scaling"),
        ),
        reader.norm(layer, "layernorm_before"),
        _read_mlp(layer, reader),
        reader.norm(layer, "layernorm_after"),
    )


def _read_mlp(layer: Any, reader: Reader) -> FeedForwardSpec:
    mlp = reader.child(layer, "mlp", "MLP")
    present = reader.present(mlp, "activation_fn")
    reader.expect_children(mlp, "fc1", "fc2", *present)
    activation, fused = reader.feed_forward_activation(mlp, "activation_fn", mlp.fc1)
    return FeedForwardSpec(
        reader.linear(mlp, "fc1", fused), activation, reader.linear(mlp, "fc2")
    )
