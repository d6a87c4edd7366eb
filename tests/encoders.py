"""Small random encoders with zero blocks, and how inexact their results may be."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from pybsp import ops
from pybsp.blocks import expand_blocks
from pybsp.integrations.packed_file import PACKED_FILE
from pybsp.nn import BlockSparseLinear, pack_

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 90,
}
BERT = {**COMMON, "max_position_embeddings": 512, "type_vocab_size": 2}
#: Positions begin behind the id of padding.
ROBERTA = {**COMMON, "max_position_embeddings": 514, "type_vocab_size": 2}
DISTILBERT = {
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": 90,
}
MODERNBERT = {
    **COMMON,
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 3,
    "local_attention": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
VIT = {**COMMON, "image_size": 32, "patch_size": 8}
VIT.pop("vocab_size")

#: name -> prefix of the classes, arguments of the config
ARCHITECTURES = {
    "bert": ("Bert", BERT),
    "bert-relu": ("Bert", {**BERT, "hidden_act": "relu"}),
    "bert-tanh-gelu": ("Bert", {**BERT, "hidden_act": "gelu_new"}),
    "bert-silu": ("Bert", {**BERT, "hidden_act": "silu", "num_attention_heads": 2}),
    "roberta": ("Roberta", ROBERTA),
    "xlm-roberta": ("XLMRoberta", ROBERTA),
    "camembert": ("Camembert", ROBERTA),
    "electra": ("Electra", {**BERT, "embedding_size": 64}),
    "electra-projected": ("Electra", {**BERT, "embedding_size": 32}),
    "distilbert": ("DistilBert", DISTILBERT),
    "mpnet": ("MPNet", ROBERTA),
    "modernbert": ("ModernBert", MODERNBERT),
    "vit": ("ViT", VIT),
    "deit": ("DeiT", VIT),
}
TEXT = [name for name in ARCHITECTURES if name not in ("vit", "deit")]


def build(name: str, head: str = "Model", seed: int = 0, **options: Any) -> nn.Module:
    """A dense model whose encoder has zero blocks, with weights of the usual size."""
    prefix, arguments = ARCHITECTURES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**arguments, **options})
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, prefix + head)(config)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layer" in path:
            prune(module)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.Embedding):
            # Large enough that a wrong row or sign is no rounding error.
            nn.init.normal_(module.weight)
    return model.eval()


@torch.no_grad()
def prune(linear: nn.Linear, density: float = 0.3) -> None:
    nn.init.normal_(linear.weight, std=(density * linear.in_features) ** -0.5)
    grid = linear.out_features // 8, linear.in_features
    linear.weight *= expand_blocks(torch.rand(grid) < density, (8, 1))
    if linear.bias is not None:
        nn.init.normal_(linear.bias, std=0.1)


def packed(model: nn.Module, **options: Any) -> nn.Module:
    """A copy of ``model``, packed."""
    model = copy.deepcopy(model)
    pack_(model, block_shape=(8, 1), min_gain=0, **options)
    return model


def text(batch: int, length: int, mask: str = "none", seed: int = 0) -> dict[str, Any]:
    """Arguments of a text model. Padding is ``right``, ``left``, ``holes`` or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    if mask == "none":
        return {"input_ids": ids}
    rows = torch.arange(length)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    kept = {
        "right": rows < lengths,
        "left": rows >= length - lengths,
        "holes": torch.rand(batch, length, generator=generator) < 0.6,
    }[mask]
    kept[:, length // 2] = True
    return {"input_ids": ids.where(kept, 1), "attention_mask": kept.long()}


def image(batch: int = 3, size: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}


def arguments_for(name: str) -> dict[str, Any]:
    return text(2, 12, "right") if name in TEXT else image()


def kept_tokens(arguments: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    mask = arguments.get("attention_mask")
    shape = hidden.shape[:2]
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0


def as_float64(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """The last hidden states in double precision."""
    wide = {
        key: value.double() if value.is_floating_point() else value
        for key, value in arguments.items()
    }
    with torch.inference_mode():
        hidden: torch.Tensor = copy.deepcopy(model).double()(**wide)[0]
    return hidden


def assert_rounding(
    found: torch.Tensor, dense: torch.Tensor, exact: torch.Tensor, what: str = ""
) -> None:
    """``found`` errs like the dense float32 model, relative to each token's norm.

    Both evaluate the same formulas in float32, so the condition of the model is in the
    error of the dense one, the largest of all tokens. What differs is the order of the
    sums: in sequence, ``n`` terms err by ``sqrt(n) eps``; in the blocks of 16 or more
    that torch adds up, by ``sqrt(n / 16) eps``. That is the factor 4. The second term
    is one rounding in each of the about 16 results that a token passes through, should
    the dense model be exact by chance.
    """
    errors = [
        ((y.double() - exact).norm(dim=-1) / exact.norm(dim=-1)) for y in (found, dense)
    ]
    eps = torch.finfo(torch.float32).eps
    bound = 4 * float(errors[1].max()) + 4 * eps
    worst = float(errors[0].max())
    assert worst <= bound, f"{what}: relative error {worst:.2e}, bound {bound:.2e}"


@dataclass
class Calls:
    """How often native encoders ran."""

    native: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Calls]:
    calls = Calls()
    compute = ops.Encoder.__call__

    def call(self: ops.Encoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.native += 1
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.Encoder, "__call__", call)
        yield calls


def stock(model: nn.Module, **arguments: Any) -> Any:
    """What the model computes by its own modules."""
    return type(model).forward(model, **arguments)


def packed_layers(model: nn.Module, dtype: str) -> dict[str, BlockSparseLinear]:
    """The packed layers with weights of this type, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparseLinear) and module.dtype == dtype
    }


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Of two texts, one of them padded."""
    result: torch.Tensor = model(**text(2, 12, "right"))[0]
    return result


def record_in(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says about packing."""
    config = json.loads((folder / "config.json").read_text())
    record: dict[str, Any] = config["quantization_config"]
    return record


def header(file: Path) -> dict[str, str]:
    """The metadata of a checkpoint."""
    with safe_open(file, framework="pt") as checkpoint:
        found: dict[str, str] = checkpoint.metadata()
    return found


def pack_all_on_loading(folder: Path) -> None:
    """Leaves the dense file alone, of which every layer is packed."""
    (folder / PACKED_FILE).unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["min_gain"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
