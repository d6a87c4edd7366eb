"""What ``pack_`` did with each layer and why."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..blocks import BlockShape
from .shrink import Removed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, and the type of its weights as they are now. Times are
    microseconds for one call, None when not measured. ``input_scale``: 0 where the
    inputs of an int8 layer are quantised token by token."""

    name: str
    shape: tuple[int, int]
    dense_bytes: int
    packed_bytes: int
    block_shape: BlockShape | None = None
    density: float = 1.0
    dense_us: float | None = None
    sparse_us: float | None = None
    packed: bool = False
    reason: str = ""
    dtype: str = "float32"
    input_scale: float = 0.0

    @property
    def gain(self) -> float | None:
        """``dense_us / sparse_us``."""
        if self.dense_us is None or self.sparse_us is None:
            return None
        return self.dense_us / self.sparse_us


@dataclass(frozen=True)
class EncoderReport:
    """One encoder; ``native`` when it runs as a whole, else ``reason`` says why not."""

    name: str
    architecture: str
    native: bool
    reason: str = ""

    def __str__(self) -> str:
        name = f"{self.name} ({self.architecture})" if self.name else self.architecture
        if self.native:
            return f"{name} runs natively as a whole"
        return f"{name} runs through its own modules: {self.reason}"


@dataclass(frozen=True)
class PackReport:
    """Every linear layer that ``pack_`` looked at; ``str()`` gives a table.

    ``fused`` names the packed layers that compute the activation after them,
    ``encoders`` the base models found, with what runs them, and ``removed`` the modules
    that have fewer neurons or heads now.
    """

    layers: tuple[LayerReport, ...]
    tokens: int
    fused: tuple[str, ...] = field(default=())
    encoders: tuple[EncoderReport, ...] = field(default=())
    removed: tuple[Removed, ...] = field(default=())

    @property
    def packed(self) -> tuple[LayerReport, ...]:
        """The layers that are block-sparse now."""
        return tuple(layer for layer in self.layers if layer.packed)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all these weights when stored dense in float32."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all these weights as they are now."""
        return sum(
            layer.packed_bytes if layer.packed else layer.dense_bytes
            for layer in self.layers
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, texts and lists, fit for JSON."""
        layers = [
            {
                **asdict(layer),
                "shape": list(layer.shape),
                "block_shape": layer.block_shape and list(layer.block_shape),
                "gain": layer.gain,
            }
            for layer in self.layers
        ]
        return {
            "layers": layers,
            "tokens": self.tokens,
            "fused": list(self.fused),
            "encoders": [asdict(encoder) for encoder in self.encoders],
            "removed": [asdict(entry) for entry in self.removed],
            "layers_packed": len(self.packed),
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(caption=self.summary(), caption_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("shape", "block", "density", "dense us", "packed us", "gain"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("result", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name,
                "{}x{}".format(*layer.shape),
                "{}x{}".format(*layer.block_shape) if layer.block_shape else "-",
                f"{layer.density:.3f}",
                _number(layer.dense_us, ".0f"),
                _number(layer.sparse_us, ".0f"),
                _number(layer.gain, ".2f"),
                _form(layer) + (f": {layer.reason}" if layer.reason else ""),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=140, no_color=True).print(self)
        return text.getvalue().rstrip()

    def summary(self) -> str:
        """What became of the layers, neurons and heads, and the encoders, in lines."""
        ratio = self.packed_bytes / self.dense_bytes if self.dense_bytes else 1.0
        rounded = Counter(
            layer.dtype for layer in self.layers if layer.dtype != "float32"
        )
        layers = (
            f"{len(self.packed)} of {len(self.layers)} linear layers packed, "
            + "".join(f"{n} of them in {kind}, " for kind, n in rounded.items())
            + f"{self.dense_bytes / 1e6:.2f} -> {self.packed_bytes / 1e6:.2f} MB "
            f"({ratio:.2f}x); times for {self.tokens} tokens"
            + "".join(
                f"\n{entry.name}: {entry.after} of {entry.before} {entry.kind} left"
                for entry in self.removed
            )
        )
        return "\n".join((layers, *map(str, self.encoders)))


def _form(layer: LayerReport) -> str:
    if not layer.packed:
        return "dense"
    static = ", static" if layer.input_scale else ""
    return "packed" if layer.dtype == "float32" else f"packed, {layer.dtype}{static}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
