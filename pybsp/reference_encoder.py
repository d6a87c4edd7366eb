"""``pybsp.ops.Encoder`` in plain torch: what the kernels are tested against.

Computes in the type of its input, so that float64 inputs and weights give the exact
result; ``ops.encoder_spec`` says what the parts mean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .reference import ACTIVATIONS, block_sparse_linear_int8, gelu_short


def encoder(
    spec: Any,
    ids: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    token_types: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The last hidden states ``(batch, length, features)``; zero where masked."""
    source = ids if ids is not None else hidden
    assert source is not None
    batch, length = source.shape[:2]
    kept = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask != 0
    if ids is not None:
        x = _embed(spec.embeddings, ids, token_types, positions, dtype)
    else:
        assert hidden is not None
        x = hidden.to(dtype)
    for layer in spec.layers:
        x = _layer(layer, x, kept, spec.norm_first)
    x = _norm(spec.final_norm, x)
    return torch.where(kept[..., None], x, torch.zeros((), dtype=dtype))


def _embed(
    tables: Any,
    ids: torch.Tensor,
    token_types: torch.Tensor | None,
    positions: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    x = tables.words.to(dtype)[ids]
    if tables.positions is not None:
        rows = torch.arange(ids.shape[1]) if positions is None else positions
        x = x + tables.positions.to(dtype)[rows]
    if tables.token_types is not None:
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = x + tables.token_types.to(dtype)[types]
    return _norm(tables.norm, x)


def _layer(
    layer: Any, x: torch.Tensor, kept: torch.Tensor, norm_first: bool
) -> torch.Tensor:
    first, second = layer.attention_norm, layer.feed_forward_norm
    if norm_first:
        x = x + _attention(layer.attention, _norm(first, x), kept)
        return x + _feed_forward(layer.feed_forward, _norm(second, x))
    x = _norm(first, x + _attention(layer.attention, x, kept))
    return _norm(second, x + _feed_forward(layer.feed_forward, x))


def _attention(spec: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    outputs = [_linear(projection, x) for projection in spec.projections]
    query, key, value = outputs if len(outputs) == 3 else outputs[0].chunk(3, -1)
    q, k, v = (
        h.view(*h.shape[:-1], spec.heads, h.shape[-1] // spec.heads).transpose(1, 2)
        for h in (query, key, value)
    )
    if spec.cos is not None:
        q, k = (_rotate(h, spec.cos, spec.sin) for h in (q, k))
    scores = spec.scale * q @ k.transpose(-1, -2)
    rows = torch.arange(x.shape[1])
    distance = rows[:, None] - rows[None, :]
    if spec.relative_bias is not None:
        zero = spec.relative_bias.shape[1] // 2
        scores = scores + spec.relative_bias.to(x.dtype)[:, distance + zero]
    seen = kept[:, None, None, :].expand_as(scores)
    if spec.window is not None:
        seen = seen & (distance.abs() <= spec.window)
    # A padding query that sees nothing gives NaN, which the caller replaces by zero.
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    context = weights.nan_to_num() @ v
    return _linear(spec.output, context.transpose(1, 2).flatten(2))


def _rotate(h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = h.chunk(2, -1)
    cos, sin = (t[: h.shape[-2]].to(h.dtype) for t in (cos, sin))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _feed_forward(spec: Any, x: torch.Tensor) -> torch.Tensor:
    h, activation = _linear(spec.up, x), ACTIVATIONS[spec.activation]
    if spec.activation == "gelu" and _is_int8(spec.down):
        activation = gelu_short  # its outputs are rounded to 8 bits next
    if spec.gated:
        first, second = h.chunk(2, -1)
        return _linear(spec.down, activation(first) * second)
    return _linear(spec.down, activation(h))


def _is_int8(spec: Any) -> bool:
    weight = spec.weight
    return not isinstance(weight, torch.Tensor) and weight.scales is not None


def _linear(spec: Any, x: torch.Tensor) -> torch.Tensor:
    weight = spec.weight
    if _is_int8(spec):
        # Inputs are rounded as float32, whatever the type around.
        y = block_sparse_linear_int8(
            x.float(), weight.crow_indices, weight.col_indices, weight.values,
            weight.scales, weight.shape, spec.bias, None, spec.input_scale,
        )  # fmt: skip
        return y.to(x.dtype)
    if not isinstance(weight, torch.Tensor):
        weight = weight.to_dense()
    bias = None if spec.bias is None else spec.bias.to(x.dtype)
    return F.linear(x, weight.detach().to(x.dtype), bias)


def _norm(spec: Any, x: torch.Tensor) -> torch.Tensor:
    if spec is None:
        return x
    bias = None if spec.bias is None else spec.bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], spec.weight.to(x.dtype), bias, spec.eps)
