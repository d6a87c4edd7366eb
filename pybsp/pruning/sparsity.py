"""How sparse a model is: the numbers and the printed table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..blocks import BlockShape
from .record import count_zero_blocks, recorded_block_shape
from .targets import unwrap_model


@dataclass(frozen=True)
class LayerSparsity:
    """One layer. ``zeros`` counts single weights, ``zero_blocks`` whole blocks;
    ``block_shape`` is None where none is recorded, and the block counts are 0 then."""

    name: str
    shape: tuple[int, int]
    block_shape: BlockShape | None
    zeros: int
    blocks: int
    zero_blocks: int

    @property
    def weights(self) -> int:
        """Weights of the layer's matrix, bias not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Zero fraction of the layer's weights."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class ModelSparsity:
    """Linear layers of a model, its pruned embeddings, and its parameters overall."""

    layers: tuple[LayerSparsity, ...]
    parameters: int

    @property
    def pruned_layers(self) -> tuple[LayerSparsity, ...]:
        """Layers with a recorded block shape."""
        return tuple(layer for layer in self.layers if layer.block_shape is not None)

    @property
    def sparsity(self) -> float:
        """Zero fraction of the pruned layers' weights; of all linear weights when no
        layer has a recorded block shape."""
        counted = self.pruned_layers or self.layers
        weights = sum(layer.weights for layer in counted)
        return sum(layer.zeros for layer in counted) / weights if weights else 0.0

    def summary(self) -> str:
        """One line in the manner of ``print_trainable_parameters``."""
        counted = self.pruned_layers or self.layers
        what = "pruned layers" if self.pruned_layers else "linear layers"
        zeros = sum(layer.zeros for layer in counted)
        weights = sum(layer.weights for layer in counted)
        whole = 100 * zeros / self.parameters if self.parameters else 0.0
        return (
            f"zero weights: {zeros:,} || weights of {len(counted)} {what}: {weights:,} "
            f"|| sparsity: {100 * self.sparsity:.2f} % || of all {self.parameters:,} "
            f"parameters: {whole:.2f} %"
        )


def model_sparsity(model: nn.Module) -> ModelSparsity:
    """Count zeros and zero blocks in every linear layer, dense or packed, and in the
    embeddings that were pruned.

    A weight that several modules share is counted once. In a packed model the removed
    blocks count as zero weights, also among the parameters.
    """
    model = unwrap_model(model)
    layers: list[LayerSparsity] = []
    seen: set[int] = set()
    removed = 0
    for name, module in model.named_modules():
        values = getattr(module, "weight_values", None)
        shape = recorded_block_shape(module)
        kinds = nn.Linear if shape is None else (nn.Linear, nn.Embedding)
        if isinstance(module, kinds) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers.append(_dense_layer(name, module.weight.detach(), shape))
        elif isinstance(values, torch.Tensor):
            layers.append(_packed_layer(name, module, values))
            # int8 values are no parameters, but what they stand for is.
            counted = values.numel() if isinstance(values, nn.Parameter) else 0
            removed += layers[-1].weights - counted
    parameters = sum(p.numel() for p in model.parameters()) + removed
    return ModelSparsity(tuple(layers), parameters)


def print_sparsity(model: nn.Module, console: Console | None = None) -> None:
    """Print a table of the sparse layers and one line for the whole model."""
    report = model_sparsity(model)
    shown = [layer for layer in report.layers if layer.zeros or layer.block_shape]
    console = console or Console()
    if shown:
        table = Table("layer", "shape", "block", "zero blocks", "sparsity")
        for column in table.columns[1:]:
            column.justify = "right"
        for layer in shown:
            table.add_row(*_row(layer))
        console.print(table)
    console.print(report.summary(), highlight=False, soft_wrap=True)


def _row(layer: LayerSparsity) -> tuple[str, ...]:
    block = zero_blocks = "-"
    if layer.block_shape is not None:
        block = "x".join(map(str, layer.block_shape))
        zero_blocks = f"{layer.zero_blocks:,} / {layer.blocks:,}"
    shape = "x".join(map(str, layer.shape))
    return layer.name, shape, block, zero_blocks, f"{100 * layer.sparsity:.2f} %"


def _dense_layer(
    name: str, weight: torch.Tensor, block_shape: BlockShape | None
) -> LayerSparsity:
    shape = (weight.shape[0], weight.shape[1])
    blocks = zero_blocks = 0
    if block_shape is not None:
        blocks = weight.numel() // (block_shape[0] * block_shape[1])
        zero_blocks = count_zero_blocks(weight, block_shape)
    zeros = weight.numel() - int(weight.count_nonzero())
    return LayerSparsity(name, shape, block_shape, zeros, blocks, zero_blocks)


def _packed_layer(name: str, module: nn.Module, values: torch.Tensor) -> LayerSparsity:
    kept, rows, cols = values.shape
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    blocks = shape[0] * shape[1] // (rows * cols)
    zeros = shape[0] * shape[1] - int(values.detach().count_nonzero())
    return LayerSparsity(name, shape, (rows, cols), zeros, blocks, blocks - kept)
