"""The twin of the native encoder against torch's own encoder layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pybsp import ops, reference_encoder


def spec_of(layers: list[nn.TransformerEncoderLayer], first: bool) -> ops.EncoderSpec:
    def norm(one: nn.LayerNorm) -> ops.NormSpec:
        return ops.NormSpec(one.weight.data, one.bias.data, one.eps)

    def linear(one: nn.Linear) -> ops.LinearSpec:
        return ops.LinearSpec(one.weight.data, one.bias.data)

    return ops.EncoderSpec(
        32,
        tuple(
            ops.LayerSpec(
                ops.AttentionSpec(
                    (ops.LinearSpec(layer.self_attn.in_proj_weight.data,
                                    layer.self_attn.in_proj_bias.data),),
                    linear(layer.self_attn.out_proj), 4, 8**-0.5,
                ),
                norm(layer.norm1),
                ops.FeedForwardSpec(linear(layer.linear1), "gelu",
                                    linear(layer.linear2)),
                norm(layer.norm2),
            )
            for layer in layers
        ),
        first,
    )  # fmt: skip


@pytest.mark.parametrize("first", [False, True])
def test_equals_the_encoder_layers_of_torch(first: bool) -> None:
    layers = [
        nn.TransformerEncoderLayer(
            32, 4, 48, 0.0, "gelu", batch_first=True, norm_first=first,
            dtype=torch.float64,
        )
        for _ in range(3)
    ]  # fmt: skip
    x = torch.randn(3, 11, 32, dtype=torch.float64)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 2:5] = 0
    expected = x
    for layer in layers:
        expected = layer(expected, src_key_padding_mask=mask == 0)
    expected = expected.masked_fill((mask == 0)[..., None], 0.0)
    found = reference_encoder.encoder(
        spec_of(layers, first), hidden=x, mask=mask, dtype=torch.float64
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
