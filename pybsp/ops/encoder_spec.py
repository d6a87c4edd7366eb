"""What a native encoder computes, in the tensors of the model that it serves.

Every tensor is float32 on the CPU and used where it lies: no weight is copied, and a
weight that is changed in place is seen by the next call. int8 matrices are the
exception: they hold a copy of their numbers. Block-sparse values may be bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LinearSpec:
    """``x W^T + bias`` with a ``BlockSparseMatrix`` or a dense contiguous ``(out, in)``
    tensor as ``weight``.

    With an int8 matrix ``input_scale`` is the size of the whole numbers that ``x`` is
    rounded to; 0: one for each token, as in ``block_sparse_linear``.
    """

    weight: Any
    bias: torch.Tensor | None = None
    input_scale: float = 0.0


@dataclass(frozen=True)
class NormSpec:
    """LayerNorm over the features: ``(x - mean) / sqrt(var + eps) weight + bias``."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class AttentionSpec:
    """``softmax(scale Q K^T + bias) V`` in each head, and the output projection.

    ``projections`` are query, key and value, or one matrix whose outputs are the three
    after each other. ``window``: a token sees the tokens at most so many positions
    away. ``cos``, ``sin`` ``(positions, head_dim / 2)``: query and key are rotated, the
    first half of a head against its second (Su et al. 2021). ``relative_bias``
    ``(heads, 2 P - 1)``: entry ``query - key + P - 1`` is added to a score.
    """

    projections: tuple[LinearSpec, ...]
    output: LinearSpec
    heads: int
    scale: float
    window: int | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    relative_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class FeedForwardSpec:
    """``down(activation(up x))``; ``gated``: ``up`` gives ``a`` and then ``b``, and the
    product is ``down(activation(a) b)`` (Shazeer 2020)."""

    up: LinearSpec
    activation: str
    down: LinearSpec
    gated: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """Attention and feed-forward, each with its residual and LayerNorm: after the sum,
    or before the part (``EncoderSpec.norm_first``, where None is no norm)."""

    attention: AttentionSpec
    attention_norm: NormSpec | None
    feed_forward: FeedForwardSpec
    feed_forward_norm: NormSpec | None


@dataclass(frozen=True)
class EmbeddingsSpec:
    """The sum of rows of up to three tables ``(rows, features)`` and its LayerNorm."""

    words: torch.Tensor
    positions: torch.Tensor | None
    token_types: torch.Tensor | None
    norm: NormSpec | None


@dataclass(frozen=True)
class EncoderSpec:
    """A stack of layers. ``embeddings`` None: the input is hidden states."""

    features: int
    layers: tuple[LayerSpec, ...]
    norm_first: bool = False
    embeddings: EmbeddingsSpec | None = None
    final_norm: NormSpec | None = None

    def multiply_adds(self, lengths: Iterable[int]) -> int:
        """Of all kept weights, and of attention, for sequences of so many tokens."""
        weights = sum(_kept(linear.weight) for linear in self._linears())
        return sum(
            weights * length
            + sum(
                2 * _pairs(length, layer.attention.window) * _width(layer.attention)
                for layer in self.layers
            )
            for length in lengths
        )

    def int8_multiply_adds(self, lengths: Iterable[int]) -> int:
        """Those of them that are 8-bit products."""
        return sum(lengths) * sum(
            _kept(linear.weight)
            for linear in self._linears()
            if getattr(linear.weight, "scales", None) is not None
        )

    def _linears(self) -> Iterator[LinearSpec]:
        for layer in self.layers:
            yield from layer.attention.projections
            yield layer.attention.output
            yield layer.feed_forward.up
            yield layer.feed_forward.down


def _kept(weight: Any) -> int:
    """Weights that are multiplied: of whole blocks, zeros within them too."""
    values = weight if isinstance(weight, torch.Tensor) else weight.values
    return int(values.numel())


def _width(attention: AttentionSpec) -> int:
    return int(attention.output.weight.shape[1])


def _pairs(length: int, window: int | None) -> int:
    """Queries and keys that see each other."""
    beyond = 0 if window is None else max(length - 1 - window, 0)
    return length * length - beyond * (beyond + 1)
