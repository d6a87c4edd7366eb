"""Models with neurons and heads left out against the whole models in float64."""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import pybsp
from pybsp.blocks import BlockShape, block_view, expand_blocks
from pybsp.nn import BlockSparseLinear, pack_, unpack_
from pybsp.nn.chains import Chain, find_chains, layers
from pybsp.nn.shrink import layout, shrink_, unshrink_

HIDDEN, INNER, HEADS = 64, 128, 4
BERT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
TEXT: dict[str, Any] = {**BERT, "vocab_size": 64, "max_position_embeddings": 40}
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": lambda **o: BertModel(BertConfig(**TEXT, **o)),
    "bert-relu": lambda **o: BertModel(BertConfig(**TEXT, hidden_act="relu", **o)),
    "roberta": lambda **o: RobertaModel(RobertaConfig(**TEXT, **o)),
    "xlm-roberta": lambda **o: XLMRobertaModel(XLMRobertaConfig(**TEXT, **o)),
    "electra": lambda **o: ElectraModel(ElectraConfig(**TEXT, embedding_size=16, **o)),
    "mpnet": lambda **o: MPNetModel(MPNetConfig(**TEXT, **o)),
    "distilbert": lambda **o: DistilBertModel(
        DistilBertConfig(
            dim=HIDDEN, hidden_dim=INNER, n_layers=2, n_heads=HEADS, vocab_size=64,
            max_position_embeddings=40, **o,
        )
    ),
    "modernbert": lambda **o: ModernBertModel(
        ModernBertConfig(**TEXT, pad_token_id=0, local_attention=4, **o)
    ),
    "modernbert-biases": lambda **o: ModernBertModel(
        ModernBertConfig(
            **TEXT, pad_token_id=0, mlp_bias=True, attention_bias=True, **o
        )
    ),
    "vit": lambda **o: ViTModel(ViTConfig(**BERT, image_size=24, patch_size=8, **o)),
}  # fmt: skip
BLOCK_SHAPES: list[BlockShape] = [(8, 1), (16, 4), (1, 16), (32, 32)]
EPS = torch.finfo(torch.float32).eps


def make(kind: str, **options: Any) -> PreTrainedModel:
    """Weights of a size that makes the outputs depend on them, and biases."""
    torch.manual_seed(0)
    model = MODELS[kind](**options).eval()
    for _, owner, chain in find_chains(model):
        for layer in layers(owner, chain).values():
            nn.init.normal_(layer.weight, std=1.5 * layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    return model


@torch.no_grad()
def prune(model: nn.Module, block_shape: BlockShape, density: float = 0.5) -> None:
    for _, owner, chain in find_chains(model):
        for layer in layers(owner, chain).values():
            rows, cols = layer.weight.shape
            grid = (rows // block_shape[0], cols // block_shape[1])
            layer.weight *= expand_blocks(torch.rand(grid) < density, block_shape)
            layer.pybsp_block_shape = block_shape  # type: ignore[assignment]


@torch.no_grad()
def kill(
    owner: nn.Module, chain: Chain, unused: list[int], constant: list[int]
) -> None:
    """Zero the columns of some items, and the rows that make others constant."""
    *sources, sink = layers(owner, chain).values()
    for item in unused:
        sink.weight[:, item * chain.size : (item + 1) * chain.size] = 0
    for item in constant:
        rows = torch.arange(item * chain.size, (item + 1) * chain.size)
        if chain.kind == "heads":
            sources[-1].weight[rows + len(sources[-1].weight) - chain.width] = 0
        else:
            for part in range(chain.parts):
                sources[0].weight[rows + part * chain.width] = 0


def kill_some(model: nn.Module) -> None:
    """Whole groups of neurons, scattered ones, and two heads of four."""
    for _, owner, chain in find_chains(model):
        if chain.kind == "heads":
            kill(owner, chain, [1], [3])
        else:
            kill(owner, chain, [*range(32, 80), 3, 5, 100], [*range(80, 96), 9, 120])


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        dtype = next(model.parameters()).dtype
        pixels = torch.randn(2, 3, 24, 24, generator=generator)
        result: torch.Tensor = model(pixel_values=pixels.to(dtype)).last_hidden_state
        return result
    ids = torch.randint(2, 64, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    result = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return result[mask.bool()]


def assert_same(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal but for rounding: of a relative error that a hundred operations in a row,
    each with the machine's epsilon, could add up to."""
    eps = torch.finfo(actual.dtype).eps
    error = float((actual.double() - exact.double()).norm() / exact.double().norm())
    assert error < 100 * eps, f"relative error {error / eps:.1f} eps"


def kept_blocks(weight: torch.Tensor, block_shape: BlockShape) -> int:
    return int((block_view(weight, block_shape) != 0).any(3).any(2).sum())


def names_and_shapes(model: nn.Module, shape: BlockShape) -> dict[str, BlockShape]:
    return {n: shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --------------------------------------------------------------------- the same result


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_function_stays_the_same(
    kind: str, block_shape: BlockShape, attention: str
) -> None:
    """In float64, where all rounding is too small to hide a wrong row."""
    if (kind, attention) == ("mpnet", "sdpa"):
        pytest.skip("MPNet has no such attention")
    model = make(kind, attn_implementation=attention).double()
    prune(model, block_shape)
    kill_some(model)
    expected = output(model)
    blocks = {
        name: kept_blocks(module.weight, block_shape)
        for name, module in model.named_modules()
        if name in names_and_shapes(model, block_shape)
        and module.weight.shape[0] % block_shape[0] == 0
        and module.weight.shape[1] % block_shape[1] == 0
    }
    removed = shrink_(model, names_and_shapes(model, block_shape))
    # The attention weights that these compute in float32 add up to one only there.
    single = attention == "eager" and kind.startswith(("modernbert", "vit"))
    actual = output(model)
    assert_same(actual.float() if single else actual, expected)
    kinds = [entry.kind for entry in removed]
    assert len([kind for kind in kinds if kind != "heads"]) == 2
    assert kinds.count("heads") == (0 if kind == "mpnet" else 2)
    for entry in removed:
        # Of (32, 32) blocks some more items go, whose blocks were all drawn to be zero.
        before, most = (HEADS, 2) if entry.kind == "heads" else (INNER, 64)
        assert entry.before == before
        assert entry.after <= most
        assert entry.kind == "heads" or entry.after % max(block_shape) == 0
    for name, count in blocks.items():
        layer: Any = model.get_submodule(name)
        assert kept_blocks(layer.weight, block_shape) <= count, name


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_packed(kind: str, block_shape: BlockShape) -> None:
    model = make(kind)
    prune(model, block_shape)
    kill_some(model)
    original = copy.deepcopy(model.state_dict())
    expected = output(copy.deepcopy(model).double())
    report = pack_(model, block_shape, min_gain=0)
    assert_same(output(model), expected)
    assert report.removed
    text = str(report)
    for entry in report.removed:
        assert f"{entry.name}: {entry.after} of {entry.before} {entry.kind}" in text
    assert report.to_dict()["removed"][0]["before"] in (HEADS, INNER)
    shapes = {layer.name: layer.shape for layer in report.layers}
    for name, shape in shapes.items():
        layer: Any = model.get_submodule(name)
        assert shape == (layer.out_features, layer.in_features)
        assert isinstance(layer, BlockSparseLinear) == (layer in packed_layers(model))
    assert_equal(model.state_dict(), original)
    unpack_(model)
    assert not packed_layers(model)
    assert str(model) == str(make(kind))
    assert_equal(model.state_dict(), original)
    for _, module in model.named_modules():
        heads = [
            vars(module)[name]
            for name in ("num_attention_heads", "n_heads")
            if name in vars(module)
        ]
        assert heads in ([], [HEADS])
    assert_same(output(model), expected)


def assert_equal(
    state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    assert set(state) == set(other)
    assert [key for key in state if not torch.equal(state[key], other[key])] == []


def packed_layers(model: nn.Module) -> list[BlockSparseLinear]:
    return [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "vit"])
def test_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    model = make(kind)
    prune(model, (8, 1))
    kill_some(model)
    original = copy.deepcopy(model.state_dict())
    expected = output(copy.deepcopy(model).double())
    pybsp.save_packed(model, tmp_path / "dense model")
    report = pack_(model, (8, 1), min_gain=0)
    layer_sizes = {m.weight_values.shape for m in packed_layers(model)}
    pybsp.save_packed(model, tmp_path / "packed model")
    model.save_pretrained(tmp_path / "stock call")
    assert_same(output(model), expected)
    assert {m.weight_values.shape for m in packed_layers(model)} == layer_sizes
    for folder in ("dense model", "packed model", "stock call"):
        loaded = AutoModel.from_pretrained(tmp_path / folder)
        assert_same(output(loaded), expected)
        if folder == "stock call" and not packed_layers(loaded):
            continue  # it asks whether packed is faster, and here dense may be
        assert packed_layers(loaded)
        if folder != "stock call":
            inner = {n: m for n, m in loaded.named_modules()}
            for entry in report.removed:
                chain = next(
                    c for n, _, c in find_chains(make(kind)) if n == entry.name
                )
                sink = inner[f"{entry.name}.{chain.sink}"]
                assert sink.in_features == entry.after * chain.size
        again = tmp_path / f"{folder} again"
        pybsp.save_packed(loaded, again)
        assert_same(output(AutoModel.from_pretrained(again)), expected)
        loaded.dequantize()
        assert str(loaded) == str(make(kind))
        assert_equal(loaded.state_dict(), original)
    config = loaded.config.to_dict()
    assert config.get("num_attention_heads", HEADS) == HEADS


def test_when_all_zeros_go(tmp_path: Any) -> None:
    """Pruned heads and nothing else: what is left is dense and saved all the same."""
    model = make("bert")
    for _, owner, chain in find_chains(model):
        if chain.kind == "heads":
            kill(owner, chain, [0, 2], [])
            with torch.no_grad():
                for path in chain.sources:
                    weight = owner.get_parameter(f"{path}.weight")
                    weight.view(HEADS, -1)[[0, 2]] = 0
    original = copy.deepcopy(model.state_dict())
    expected = output(copy.deepcopy(model).double())
    report = pack_(model, (8, 1), min_gain=0)
    assert [entry.after for entry in report.removed] == [2, 2]
    assert report.packed == ()
    assert {layer.shape for layer in report.layers if "query" in layer.name} == {
        (HIDDEN // 2, HIDDEN)
    }
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for small in (model, loaded):
        assert_same(output(small), expected)
        assert_equal(small.state_dict(), original)
        layer = small.encoder.layer[0].attention.self.query
        assert type(layer) is nn.Linear
        assert layer.out_features == HIDDEN // 2


def test_a_checkpoint_may_ask_for_all_rows(tmp_path: Any) -> None:
    model = make("bert")
    prune(model, (8, 1))
    kill_some(model)
    record = pybsp.pruning.record.sparsity_record(model)
    for shrink in (True, False):
        model.config.quantization_config = {
            **record, "min_gain": 0.0, "shrink": shrink,
        }  # fmt: skip
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        attention = loaded.encoder.layer[0].attention.self
        assert attention.num_attention_heads == (2 if shrink else HEADS)
        assert loaded.config.quantization_config.to_dict().get("shrink", True) == shrink


# --------------------------------------------------------------------- what stays


def test_nothing_to_leave_out() -> None:
    model = make("bert")
    prune(model, (16, 4))
    expected = output(model)
    assert shrink_(model, names_and_shapes(model, (16, 4))) == []
    assert torch.equal(output(model), expected)
    assert pack_(model, (16, 4), min_gain=0).removed == ()


def test_not_when_told_not_to() -> None:
    model = make("bert")
    kill_some(model)
    assert pack_(model, min_gain=0, shrink=False).removed == ()
    assert model.encoder.layer[0].attention.self.num_attention_heads == HEADS


@pytest.mark.parametrize("alive", [[], [77]])
@pytest.mark.parametrize(
    ("block_shape", "left"), [((8, 1), 8), ((1, 16), 16), ((32, 32), 32), ((1, 1), 8)]
)
def test_one_group_stays(block_shape: BlockShape, left: int, alive: list[int]) -> None:
    model = make("bert").double()
    for _, owner, chain in find_chains(model):
        dead = [item for item in range(chain.items) if item not in alive]
        kill(owner, chain, dead[::2], dead[1::2])
    expected = output(model)
    removed = shrink_(model, names_and_shapes(model, block_shape))
    heads = max(block_shape[0] * HEADS // HIDDEN, 1)
    assert {entry.after for entry in removed} == {left, heads}
    assert_same(output(model), expected)


@pytest.mark.parametrize(
    ("watch", "changed"),
    [
        (lambda m: m.intermediate.dense.register_forward_hook(print), "heads"),
        (lambda m: m.intermediate.register_forward_hook(print), "heads"),
        (lambda m: m.attention.self.value.register_forward_pre_hook(print), "neurons"),
        (lambda m: m.attention.self.register_forward_hook(print), "neurons"),
        (lambda m: m.attention.register_forward_hook(print), "neurons"),
        (lambda m: setattr(m.output.dense, "forward", print), "heads"),
        (lambda m: setattr(m.intermediate, "intermediate_act_fn", nn.Tanh()), "heads"),
        (
            lambda m: setattr(
                m.attention.self.key, "bias", m.attention.self.query.bias
            ),
            "neurons",
        ),
        (lambda m: setattr(m.intermediate, "other", m.output.dense), "heads"),
        (lambda m: setattr(m, "other", m.output), "heads"),
        (lambda m: setattr(m.attention.self, "is_causal", True), "neurons"),
        (lambda m: setattr(m.attention.self, "num_attention_heads", 3), "neurons"),
        (
            lambda m: setattr(m.attention.self, "bias", nn.Parameter(torch.ones(4))),
            "neurons",
        ),
    ],
)
def test_what_is_watched_shared_or_unknown_stays(
    watch: Callable[[Any], Any], changed: str
) -> None:
    model: Any = make("bert")
    kill_some(model)
    watch(model.encoder.layer[0])
    first = [e.kind for e in shrink_(model) if e.name.startswith("encoder.layer.0")]
    assert first == [changed]


def test_heads_of_decoders_and_with_a_bias_each_stay() -> None:
    decoder = BertLMHeadModel(BertConfig(**TEXT, is_decoder=True))
    for model in (decoder, make("mpnet")):
        assert {chain.kind for _, _, chain in find_chains(model)} == {"neurons"}


def test_shrinking_again_changes_nothing() -> None:
    model = make("bert")
    prune(model, (8, 1))
    kill_some(model)
    assert pack_(model, min_gain=0).removed
    expected = output(model)
    assert pack_(model, min_gain=0).removed == ()
    assert shrink_(model) == []
    assert torch.equal(output(model), expected)
    unpack_(model)
    assert pack_(model, min_gain=0).removed


# --------------------------------------------------------------------- constants


class FeedForward(nn.Module):
    """The children that DistilBERT's module has."""

    def __init__(self, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.lin1 = nn.Linear(16, 32)
        self.lin2 = nn.Linear(32, 16, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.dropout(self.lin2(self.activation(self.lin1(x))))
        return result


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU()])
def test_constants_are_rounded_once(activation: nn.Module) -> None:
    part = FeedForward(True, activation).eval()
    constant = [*range(0, 16), *range(20, 28)]
    with torch.no_grad():
        part.lin1.weight[constant] = 0
        weight, bias = part.lin2.weight.double(), part.lin2.bias.double()
        values = activation(part.lin1.bias.double())[constant]
    (removed,) = shrink_(nn.Sequential(part))
    assert (removed.before, removed.after) == (32, 8)
    # GELU of a float64 may itself be off by some of its last bits.
    folded = bias + weight[:, constant] @ values
    torch.testing.assert_close(
        part.lin2.bias.double(), folded.float().double(), rtol=EPS / 2, atol=1e-14
    )


def test_a_constant_stays_where_no_bias_takes_it() -> None:
    part = FeedForward(False, nn.ReLU()).eval()
    with torch.no_grad():
        part.lin1.weight[:16] = 0
        part.lin1.bias[:16] = -1.0  # relu makes them zero
    assert [e.after for e in shrink_(nn.Sequential(part))] == [16]
    part = FeedForward(False, nn.ReLU()).eval()
    with torch.no_grad():
        part.lin1.weight[:16] = 0
        part.lin1.bias[:16] = 1.0
    assert shrink_(nn.Sequential(part)) == []


@pytest.mark.parametrize("half", [0, 1])
def test_a_gate_that_is_zero(half: int) -> None:
    """One half of a gated neuron suffices, when it makes the product zero."""
    model = make("modernbert").double()
    for _, owner, chain in find_chains(model):
        if chain.kind == "gated neurons":
            start = half * chain.width
            with torch.no_grad():
                owner.get_parameter("Wi.weight")[start : start + 64] = 0
    expected = output(model)
    assert [entry.after for entry in shrink_(model)] == [64, 64]
    assert_same(output(model), expected)
    biased = make("modernbert-biases").double()
    for _, owner, chain in find_chains(biased):
        if chain.kind == "gated neurons":
            with torch.no_grad():
                owner.get_parameter("Wi.weight")[half * chain.width :][:64] = 0
    assert shrink_(biased) == []


# --------------------------------------------------------------------- saved and copied


def test_loading_what_needs_more_than_is_left() -> None:
    model, other = make("bert"), make("bert")
    prune(model, (8, 1))
    kill_some(model)
    state = copy.deepcopy(model.state_dict())
    expected = output(copy.deepcopy(model).double())
    pack_(model, min_gain=0)
    with pytest.raises(RuntimeError, match=r"needs \d+ neurons that packing left out"):
        model.load_state_dict(other.state_dict())
    # What it was made of fits, constants and all, as do packed fields.
    model.load_state_dict(state)
    assert_same(output(model), expected)
    name = "encoder.layer.1.output.dense"
    matrix = pybsp.BlockSparseMatrix.from_dense(state.pop(f"{name}.weight"), (8, 1))
    state[f"{name}.weight_values"] = matrix.values
    state[f"{name}.weight_crow_indices"] = matrix.crow_indices
    state[f"{name}.weight_col_indices"] = matrix.col_indices
    model.load_state_dict(state)
    assert_same(output(model), expected)


def test_loading_some_tensors_of_other_weights() -> None:
    """Each lot with a change that matters, and what is gone comes from the new ones."""
    model = make("bert")
    prune(model, (8, 1))
    kill_some(model)
    twin = copy.deepcopy(model)
    pack_(model, min_gain=0)
    for words in (("intermediate",), ("query", "value"), ("output.dense.bias",), ("",)):
        state = {
            name: tensor * 1.25
            for name, tensor in twin.state_dict().items()
            if any(word in name for word in words) and "encoder" in name
        }
        for part in (model, twin):
            assert part.load_state_dict(state, strict=False).unexpected_keys == []
        assert_same(output(model), output(copy.deepcopy(twin).double()))
        assert_equal(model.state_dict(), twin.state_dict())


def test_copies_and_pickles() -> None:
    model = make("bert")
    prune(model, (8, 1))
    kill_some(model)
    stock = sizes(model)
    pack_(model, min_gain=0)
    expected = output(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(output(twin), expected)
        assert sizes(twin) == stock
        twin.load_state_dict(twin.state_dict())
        unshrink_(twin)
        assert sizes(twin) == stock
        twin.load_state_dict(make("bert").state_dict())
    assert sizes(model) == stock
    assert torch.equal(output(model), expected)


def test_training_goes_on() -> None:
    model = make("bert")
    prune(model, (8, 1))
    kill_some(model)
    pack_(model, min_gain=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.arange(2, 12)[None])[0].square().mean().backward()
    assert all(layer.weight_values.grad is not None for layer in packed_layers(model))
    optimizer.step()
    expected = output(model)
    twin = make("bert")
    twin.load_state_dict(model.state_dict())
    # Constants are once more taken out of a bias that was trained meanwhile.
    assert_same(output(twin), expected)
    pybsp.preserve_sparsity(twin, torch.optim.SGD(twin.parameters(), lr=0.1))


# --------------------------------------------------------------------- the layout


@pytest.mark.parametrize("seed", range(int(os.environ.get("PYBSP_FUZZ", "40"))))
def test_layout_never_keeps_more_blocks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows, cols = draw(1, 2, 4, 8, 16, 48), draw(1, 2, 4, 16, 32)
    size = draw(1, 1, 4, 24)
    items = 96 * 4 // size
    width = items * size
    spare = torch.rand(items, generator=generator) < draw(1, 5, 8, 9, 10) / 10
    up = torch.randn(width, 6, generator=generator)
    down = torch.randn(12, width, generator=generator)
    blocks = ((rows, 1), (3, cols))
    for weight, block in ((up, blocks[0]), (down, blocks[1])):
        grid = (weight.shape[0] // block[0], weight.shape[1] // block[1])
        kept_mask = torch.rand(grid, generator=generator) < 0.6
        weight *= expand_blocks(kept_mask, block)
    down[:, spare.repeat_interleave(size)] = 0
    kept = layout(spare, size, [rows, cols])
    assert len(set(kept.tolist())) == len(kept) > 0
    assert set((~spare).nonzero().flatten().tolist()) <= set(kept.tolist())
    within = (kept[:, None] * size + torch.arange(size)).flatten()
    group = math.lcm(size, rows, cols)
    assert len(within) % group == 0
    if group == max(rows, cols) and size == 1 and group % min(rows, cols) == 0:
        # Whole groups in use cannot share; the others fit as first fit finds.
        assert len(within) <= max(2 * int((~spare).sum()) * min(rows, cols), group, 8)
    for old, new, block in (
        (up, up[within], blocks[0]),
        (down, down[:, within], blocks[1]),
    ):
        assert kept_blocks(new, block) <= kept_blocks(old, block)
