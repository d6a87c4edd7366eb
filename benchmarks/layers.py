"""The layers that are measured: shapes, block shapes, random block-sparse weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import pybsp
from pybsp.blocks import BlockShape, expand_blocks, grid_shape

#: ``(out, in)``. The last four are of no published model: nothing was tuned on them.
SHAPES = {
    "minilm_attention": (384, 384),
    "minilm_ffn_up": (1536, 384),
    "minilm_ffn_down": (384, 1536),
    "bert_base_attention": (768, 768),
    "bert_base_ffn_up": (3072, 768),
    "bert_base_ffn_down": (768, 3072),
    "bert_large_attention": (1024, 1024),
    "bert_large_ffn_up": (4096, 1024),
    "bert_large_ffn_down": (1024, 4096),
    "odd_312_up": (1200, 312),
    "odd_312_down": (312, 1200),
    "odd_1152_up": (1728, 1152),
    "odd_1152_down": (1152, 1728),
}
#: What ``--quick`` measures.
FEW_SHAPES = ("minilm_ffn_down", "bert_base_ffn_up")
BLOCKS: tuple[BlockShape, ...] = ((8, 1), (16, 1), (16, 4), (32, 32), (1, 96), (1, 64))

EPS = torch.finfo(torch.float32).eps


def family(block_shape: BlockShape) -> str:
    """``"(1, n)"`` blocks have a kernel and targets of their own."""
    return "(1, n)" if block_shape[0] == 1 else "(r, c)"


@dataclass(frozen=True)
class Layer:
    """``y = x Wᵀ + bias``, dense with zero blocks and packed."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor
    matrix: pybsp.BlockSparseMatrix
    sparsity: float

    def operations(self, tokens: int) -> int:
        """Two for each kept weight and token; skipped zeros are no work."""
        return 2 * tokens * int(self.matrix.values.numel())

    def describe(self, tokens: int, peak: float) -> dict[str, Any]:
        """What every row of a result says of its case."""
        return {
            "layer": self.name,
            "M": tokens,
            "K": self.weight.shape[1],
            "N": self.weight.shape[0],
            "block_shape": list(self.matrix.block_shape),
            "sparsity": self.sparsity,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "isa": pybsp.ops.active_isa(),
            "peak_gflops": round(peak / 1e9, 1),
        }


def random_layer(
    name: str, shape: tuple[int, int], block_shape: BlockShape, sparsity: float
) -> Layer:
    """Normal weights; the kept blocks lie anywhere, as under a global ranking."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(grid_shape(shape, block_shape), generator=generator)
    mask = pybsp.ops.block_mask(scores, round((1 - sparsity) * scores.numel()))
    weight = torch.randn(shape, generator=generator) * expand_blocks(mask, block_shape)
    return Layer(
        name,
        weight,
        torch.randn(shape[0], generator=generator),
        pybsp.BlockSparseMatrix.from_mask(weight, mask, block_shape),
        sparsity,
    )


def random_tokens(count: int, features: int) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(1))


def check(what: str, found: Any, x: torch.Tensor, layer: Layer) -> None:
    """Raise unless ``found`` is the layer's output on ``x`` but for rounding.

    The bound is ``c eps (|x| |w| + |bias|)`` with Euclidean norms and
    ``c = 4 + 2 sqrt(n)`` for ``n`` nonzero weights of the output.
    """
    expected, bound = _expected(x, layer)
    error = (torch.as_tensor(found).double() - expected).abs()
    if error.shape != expected.shape or not bool((error <= bound).all()):
        worst = float((error / bound).max()) if error.shape == expected.shape else None
        raise AssertionError(
            f"{what} is wrong on {layer.name} {layer.matrix!r} with {len(x)} tokens: "
            f"shape {tuple(error.shape)}, error over bound {worst}"
        )


def check_int8(what: str, found: Any, x: torch.Tensor, layer: Layer) -> None:
    """Raise unless ``found`` is the output but for rounding to 8 bits: within 5 %."""
    expected, _ = _expected(x, layer)
    error = (torch.as_tensor(found).double() - expected).norm() / expected.norm()
    if not error < 0.05:
        raise AssertionError(f"{what} is wrong on {layer.name}: error {error:.1%}")


def _expected(x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.weight.double()
    expected = F.linear(x.double(), weight, layer.bias.double())
    constant = EPS * (4 + 2 * (layer.weight != 0).sum(1).double().sqrt())
    size = torch.outer(x.double().norm(dim=1), weight.norm(dim=1)) + layer.bias.abs()
    return expected, constant * size + 1e-30
