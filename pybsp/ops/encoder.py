"""A whole encoder as one native call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from .arguments import check_activation, check_cpu
from .codes import CODES
from .encoder_spec import (
    AttentionSpec,
    EncoderSpec,
    FeedForwardSpec,
    LayerSpec,
    LinearSpec,
    NormSpec,
)
from .fields import bind_pattern
from .int8 import check_input_scale


class Encoder:
    """Computes an ``EncoderSpec`` natively, on the tokens that are not padding only.

    ``ValueError`` or ``TypeError`` for parts that do not fit each other. Safe to call
    from several threads; a call releases the GIL.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._kept: list[Any] = []
        first = spec.embeddings
        words, positions, token_types, norm = (
            (None, None, None, None)
            if first is None
            else (first.words, first.positions, first.token_types, first.norm)
        )
        self._native = _core.Encoder(
            spec.features,
            spec.norm_first,
            [self._layer(f"layer {i}", layer) for i, layer in enumerate(spec.layers)],
            self._table("words", words),
            self._table("positions", positions),
            self._table("token types", token_types),
            self._norm("the embeddings", norm),
            self._norm("the result", spec.final_norm),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy computes with the tensors of its own specification.
        return type(self), (self.spec,)

    def __call__(
        self,
        ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden states ``(batch, length, features)``, float32.

        Parameters
        ----------
        ids : int64 ``(batch, length)``, for a spec with embeddings; else
        hidden : float32 ``(batch, length, features)``
        mask : ``(batch, length)``, zero where a token is padding, anywhere in a row.
            The result is zero there.
        token_types, positions : int64 ``(batch, length)`` rows of their tables; default
            0, and the place in the row. Windows, rotations and relative biases always
            go by the place in the row.

        ``IndexError`` for a row that a table does not have.
        """
        inputs = (ids, hidden, mask, token_types, positions)
        y, _ = self._compute(self._native.run, *inputs)
        return y

    def profile(
        self,
        ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The result of a call, and the seconds that each part of it took.

        The parts are sums over the layers and together the whole native call:
        ``embeddings``, ``query_key_value`` with rotations, ``attention``, ``output``
        (its projection), ``norms``, ``up`` with the activation, ``down``, ``storing``
        and the ``rest``, such as dividing the tokens. With several threads it is the
        time of the calling one, waits included.
        """
        inputs = (ids, hidden, mask, token_types, positions)
        return self._compute(self._native.profile, *inputs)

    def _compute(
        self,
        native: Callable[..., Any],
        ids: torch.Tensor | None,
        hidden: torch.Tensor | None,
        mask: torch.Tensor | None,
        token_types: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Any]:
        """The hidden states, and what ``native`` returns."""
        spec = self.spec
        if spec.embeddings is None:
            source = _input("hidden", hidden, "ids", ids, torch.float32)
            batch, length = _sizes("hidden", source, (spec.features,))
        else:
            source = _input("ids", ids, "hidden", hidden, torch.int64)
            batch, length = _sizes("ids", source, ())
        if mask is not None:
            mask = _checked("mask", mask, mask.dtype, (batch, length)).ne(0)
        token_types, positions = (
            None if rows is None else _checked(name, rows, torch.int64, (batch, length))
            for name, rows in (("token_types", token_types), ("positions", positions))
        )
        y = torch.empty(batch, length, spec.features, dtype=torch.float32, device="cpu")
        address = source.data_ptr()
        result = native(
            batch, length,
            0 if spec.embeddings is None else address,
            address if spec.embeddings is None else 0,
            0 if mask is None else mask.data_ptr(),
            0 if token_types is None else token_types.data_ptr(),
            0 if positions is None else positions.data_ptr(),
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y, result

    def _layer(self, name: str, spec: LayerSpec) -> Any:
        return _core.EncoderLayer(
            self._attention(f"the attention of {name}", spec.attention),
            self._norm(f"the attention of {name}", spec.attention_norm),
            self._feed_forward(f"the feed-forward part of {name}", spec.feed_forward),
            self._norm(f"the feed-forward part of {name}", spec.feed_forward_norm),
        )

    def _attention(self, name: str, spec: AttentionSpec) -> Any:
        features = self.spec.features
        output_shape = _shape(spec.output)
        width, heads = output_shape[1], spec.heads
        if heads < 1 or width % heads:
            raise ValueError(f"{name}: {heads} heads do not divide its width, {width}")
        count = len(spec.projections)
        if count not in (1, 3):
            raise ValueError(
                f"{name} has {count} projections; give query, key and value, or one "
                "matrix with the outputs of all three"
            )
        each = width if count == 3 else 3 * width
        projections = [
            self._linear(name, one, (each, features)) for one in spec.projections
        ]
        head_dim = width // heads
        rotary_positions, rotation = 0, (0, 0)
        if (spec.cos is None) != (spec.sin is None):
            raise ValueError(f"{name}: give both cos and sin, or neither")
        if spec.cos is not None and spec.sin is not None:
            if head_dim % 2:
                raise ValueError(f"{name}: heads of {head_dim} features have no halves")
            rotary_positions = spec.cos.shape[0]
            wanted = (rotary_positions, head_dim // 2)
            rotation = (
                self._keep(f"{name}, cos", spec.cos, wanted),
                self._keep(f"{name}, sin", spec.sin, wanted),
            )
        bias, bias_positions = 0, 0
        if spec.relative_bias is not None:
            bias_positions = (spec.relative_bias.shape[-1] + 1) // 2
            wanted = (heads, 2 * bias_positions - 1)
            bias = self._keep(f"{name}, relative_bias", spec.relative_bias, wanted)
        if spec.window is not None and spec.window < 0:
            raise ValueError(f"{name}: window must be 0 or more; got {spec.window}")
        # No two tokens are further apart, and sums with positions stay in range.
        window = -1 if spec.window is None else min(spec.window, 2**31)
        return _core.SelfAttention(
            projections,
            self._linear(name, spec.output, (features, width)),
            heads, spec.scale, window, *rotation,
            rotary_positions, bias, bias_positions,
        )  # fmt: skip

    def _feed_forward(self, name: str, spec: FeedForwardSpec) -> Any:
        check_activation(spec.activation)
        features = self.spec.features
        inner = _shape(spec.down)[1]
        up = self._linear(name, spec.up, ((2 if spec.gated else 1) * inner, features))
        down = self._linear(name, spec.down, (features, inner))
        return _core.FeedForward(up, CODES[spec.activation], down, spec.gated)

    def _linear(
        self, name: str, spec: LinearSpec, shape: tuple[int, int]
    ) -> tuple[Any, Any, int]:
        """The native matrix, the address of its values or, for int8 ones, the scale of
        the input, and the address of the bias."""
        if _shape(spec) != shape:
            raise ValueError(
                f"{name}: a weight has shape {_shape(spec)} and the parts around it "
                f"want {shape}"
            )
        weight = spec.weight
        if isinstance(weight, torch.Tensor):
            second: Any = self._keep(f"{name}, weight", weight, shape)
            pattern = _dense_pattern(weight)
        elif weight.scales is not None:
            check_input_scale(spec.input_scale)
            pattern, second = weight.pattern, spec.input_scale
        else:
            # Detached, for the data of a parameter may be replaced.
            values = weight.values.detach()
            check_cpu(**{f"{name}, values": values})
            pattern, second = weight.pattern, values.data_ptr()
            self._kept.append(values)
        self._kept.append(pattern)
        bias = spec.bias
        return (
            pattern,
            second,
            0 if bias is None else self._keep(f"{name}, bias", bias, shape[:1]),
        )

    def _norm(self, name: str, spec: NormSpec | None) -> tuple[int, int, float]:
        if spec is None:
            return 0, 0, 0.0
        shape, bias = (self.spec.features,), spec.bias
        return (
            self._keep(f"the norm of {name}", spec.weight, shape),
            0 if bias is None else self._keep(f"the norm of {name}", bias, shape),
            spec.eps,
        )

    def _table(self, name: str, table: torch.Tensor | None) -> tuple[int, int]:
        if table is None:
            return 0, 0
        shape = (table.shape[0], self.spec.features)
        return self._keep(f"the table of {name}", table, shape), shape[0]

    def _keep(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> int:
        """The address of ``tensor``, which must be usable where it lies."""
        tensor = tensor.detach()
        if _checked(name, tensor, torch.float32, shape) is not tensor:
            raise ValueError(f"{name}: the tensor must be contiguous")
        self._kept.append(tensor)
        return tensor.data_ptr()


def _input(
    name: str,
    given: torch.Tensor | None,
    other_name: str,
    other: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if given is None or other is not None:
        raise ValueError(
            f"this encoder starts from {name}: give {name} and not {other_name}"
        )
    return _checked(name, given, dtype, tuple(given.shape))


def _sizes(name: str, tensor: torch.Tensor, rest: tuple[int, ...]) -> tuple[int, int]:
    if tensor.dim() != 2 + len(rest) or tuple(tensor.shape[2:]) != rest:
        wanted = ", ".join(["batch", "length", *map(str, rest)])
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be ({wanted})"
        )
    return tensor.shape[0], tensor.shape[1]


def _shape(spec: LinearSpec) -> tuple[int, int]:
    return spec.weight.shape[0], spec.weight.shape[1]


def _dense_pattern(weight: torch.Tensor) -> Any:
    """A dense matrix is one of single-row blocks as wide as itself: its rows as they
    lie are the values."""
    rows = weight.shape[0]
    crow_indices = torch.arange(rows + 1, dtype=torch.int32)
    col_indices = torch.zeros(rows, dtype=torch.int32)
    shape = (rows, weight.shape[1])
    return bind_pattern(crow_indices, col_indices, weight.unsqueeze(1), shape)


def _checked(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}"
        )
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; move it to the CPU")
    return tensor.contiguous()
