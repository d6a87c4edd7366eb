"""Which layers are chosen, and what is refused before anything is touched."""

from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
import transformers
from encoders import ARCHITECTURES, build
from torch import nn

from pybsp import BlockPruningConfig
from pybsp.nn import BlockSparseLinear
from pybsp.pruning.names import DEFAULT_EXCLUDED
from pybsp.pruning.targets import select_targets, unwrap_model


def attention_layer() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "query": nn.Linear(16, 16),
            "key": nn.Linear(16, 16),
            "intermediate": nn.Linear(16, 32),
        }
    )


def small_model() -> nn.Module:
    parts = OrderedDict(
        embeddings=nn.ModuleDict(
            {"word": nn.Embedding(9, 16), "map": nn.Linear(16, 16)}
        ),
        layer=nn.ModuleList([attention_layer(), attention_layer()]),
        pooler=nn.ModuleDict({"dense": nn.Linear(16, 16)}),
        classifier=nn.Linear(16, 2),
    )
    return nn.ModuleDict(parts)


def names(model: nn.Module | None = None, **settings: object) -> list[str]:
    cfg = BlockPruningConfig(**settings)  # type: ignore[arg-type]
    return [target.name for target in select_targets(model or small_model(), cfg)]


ALL = [f"layer.{i}.{part}" for i in (0, 1) for part in ("query", "key", "intermediate")]


def test_all_linear_leaves_out_embeddings_and_heads() -> None:
    assert names() == ALL


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_of_known_architectures_are_left_out(name: str) -> None:
    prefix = ARCHITECTURES[name][0]
    head = re.compile(rf"{prefix}(For\w+|LMHeadModel)")
    heads = [match[1] for one in dir(transformers) if (match := head.fullmatch(one))]
    assert len(heads) >= 2
    expected = names(build(name), block_shape=(1, 1))
    assert all("layer" in target for target in expected)
    for one in heads:
        model = build(name, one)
        found = names(model, block_shape=(1, 1))
        inner = str(model.base_model_prefix) + "."
        assert [target.removeprefix(inner) for target in found] == expected, one


def test_embeddings_are_taken_in_by_name() -> None:
    assert names(embedding_modules=["word"], block_shape=(1, 8)) == [
        *ALL,
        "embeddings.word",
    ]
    for wanted in (["words"], ["word", "words"], "words"):
        with pytest.raises(ValueError, match=r"'words' matches no emb.* are: embed"):
            names(embedding_modules=wanted)
    with pytest.raises(ValueError, match=r"'embeddings.word': .*does not divide"):
        names(embedding_modules=["word"])
    sparse = nn.ModuleDict({"word": nn.Embedding(8, 8, sparse=True), **small_model()})
    with pytest.raises(ValueError, match="'word' is frozen or has sparse gradients"):
        names(sparse, embedding_modules=r"word")


def test_endings_and_expressions() -> None:
    queries = ["layer.0.query", "layer.1.query"]
    assert names(target_modules=["query"]) == queries
    assert names(target_modules=r".*\.query") == queries
    assert names(target_modules=["0.key", "query"]) == [
        "layer.0.query",
        "layer.0.key",
        "layer.1.query",
    ]


def test_exclusions_replace_the_default_ones() -> None:
    left = names(exclude_modules=["layer", "classifier"])
    assert left == ["embeddings.map", "pooler.dense"]
    assert names(exclude_modules=r"(layer\.0|embed|pool|class).*") == ALL[3:]
    assert names(exclude_modules=(), block_shape=(1, 1))[-1] == "classifier"


def test_every_exclusion_matches_something() -> None:
    for wanted in (["layer.0", "layer.2"], ["layer.2"], r"layer\.2.*"):
        with pytest.raises(ValueError, match=r"exclude_modules: .*2.* matches no mod"):
            names(exclude_modules=wanted)
    # the defaults written out, of which no model has all
    assert names(exclude_modules=[*DEFAULT_EXCLUDED, "layer.0"]) == ALL[3:]
    # whatever has the name: it need not be a linear layer, nor stand alone
    assert names(exclude_modules=["word", *DEFAULT_EXCLUDED, "0.key", "1"]) == [
        "layer.0.query",
        "layer.0.intermediate",
    ]


def test_every_target_matches_something() -> None:
    with pytest.raises(ValueError, match="'quary' matches no linear layer"):
        names(target_modules=["key", "quary"])
    assert names(target_modules=["0.key", "classifier"]) == ["layer.0.key"]


def test_a_part_of_a_name_is_no_ending() -> None:
    with pytest.raises(ValueError, match="matches no prunable linear layer"):
        names(target_modules=["uery"])


def test_nothing_matched_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="matches no prunable") as caught:
        names(target_modules=["classifier"])
    assert "exclude_modules=()" in str(caught.value)
    assert "layer.0.query, layer.0.key" in str(caught.value)
    with pytest.raises(ValueError, match=r"has no nn\.Linear"):
        names(nn.Sequential(nn.Conv1d(2, 2, 1)))


def test_overrides_set_shape_and_sparsity_by_glob() -> None:
    settings = {"*.key": {"block_shape": (1, "in/4"), "target_sparsity": 0.5}}
    cfg = BlockPruningConfig(overrides=settings)
    found = {t.name: t for t in select_targets(small_model(), cfg)}
    assert found["layer.1.key"].block_shape == (1, 4)
    assert found["layer.1.key"].own_sparsity == 0.5
    assert found["layer.1.query"].block_shape == (8, 1)
    assert found["layer.1.query"].own_sparsity is None
    with pytest.raises(ValueError, match=r"overrides\['\*\.value'\] matches none"):
        names(overrides={"*.value": {"target_sparsity": 0.5}})


def test_a_threshold_is_that_of_the_layer_or_the_config() -> None:
    settings = {"*.key": {"threshold": 0.5}, "*.query": {"target_sparsity": 0.5}}
    cfg = BlockPruningConfig(threshold=0.1, overrides=settings)
    found = {t.name: t for t in select_targets(small_model(), cfg)}
    assert found["layer.1.key"].threshold == 0.5
    assert found["layer.1.query"].threshold is None
    assert {t.threshold for t in found.values()} == {0.1, 0.5, None}


def test_the_last_override_says_threshold_or_target() -> None:
    settings = {"*": {"target_sparsity": 0.5}, "*.key": {"threshold": 0.1}}
    found = {
        t.name: t
        for t in select_targets(small_model(), BlockPruningConfig(overrides=settings))
    }
    assert (found["layer.1.key"].threshold, found["layer.1.key"].own_sparsity) == (
        0.1,
        None,
    )
    assert found["layer.1.query"].own_sparsity == 0.5


def test_fractions_resolve_for_every_matrix() -> None:
    cfg = BlockPruningConfig(block_shape=("out/2", "in/8"))
    shapes = {t.block_shape for t in select_targets(small_model(), cfg)}
    assert shapes == {(8, 2), (16, 2)}


def test_a_block_shape_that_does_not_divide_names_the_module() -> None:
    with pytest.raises(
        ValueError, match=r"module 'layer\.0\.query': block_shape \(8, 3\)"
    ):
        names(block_shape=(8, 3))


def test_a_weight_tied_to_an_embedding_is_left_out_or_refused() -> None:
    model = small_model()
    model["decoder"] = nn.Linear(16, 9)
    model["decoder"].weight = model["embeddings"]["word"].weight
    assert names(model) == ALL
    with pytest.raises(ValueError, match="weight of 'decoder' is tied to"):
        names(model, target_modules=["decoder"])


def test_a_weight_shared_by_linear_layers_is_pruned_once() -> None:
    model = small_model()
    model["layer"][1]["key"].weight = model["layer"][0]["key"].weight
    found = select_targets(model, BlockPruningConfig(target_modules=["key"]))
    assert [t.name for t in found] == ["layer.0.key"]
    assert found[0].shared_with == ("layer.1.key",)


def test_frozen_weights_are_left_out() -> None:
    model = small_model()
    model["layer"][0].requires_grad_(False)
    assert names(model) == ALL[3:]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every matched module has a frozen weight"):
        names(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = small_model()
    with torch.no_grad():
        model["layer"][1]["key"].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"'layer\.1\.key' has NaN or infinite"):
        names(model)


def test_other_dtypes_and_meta_are_refused() -> None:
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match="float32 or bfloat16 weights"):
            names(small_model().to(dtype))
    narrow = small_model().to(torch.bfloat16)
    assert names(narrow) == names(small_model())
    assert names(narrow, method="magnitude", penalty="proximal") == names(narrow)
    for penalty in ("proximal", "decoupled"):
        with pytest.raises(ValueError, match="less than bfloat16 resolves"):
            names(narrow, penalty=penalty)
    with pytest.raises(ValueError, match="meta device"):
        names(small_model().to("meta"))


def test_sharded_weights_are_refused() -> None:
    model = small_model()
    model["layer"][0]["key"].weight.ds_id = 3
    with pytest.raises(ValueError, match="sharded or flattened"):
        names(model)
    model = small_model()
    model["layer"][0]["key"].weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match="sharded or flattened"):
        names(model)


class Adapted(nn.Module):
    """A linear layer and its adapter, as peft puts them together."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        rows, cols = base_layer.weight.shape
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(cols, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, rows, bias=False)})


def test_adapters_are_merged_first() -> None:
    model = small_model().requires_grad_(False)
    for layer in model["layer"]:
        layer["query"] = Adapted(layer["query"])
    message = r"'layer\.0\.query' has an adapter.*merge_and_unload\(\)"
    for wanted in ("all-linear", ["base_layer"], ["lora_A.default"]):
        with pytest.raises(ValueError, match=message) as caught:
            names(model, target_modules=wanted)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        names(model.requires_grad_(True))
    assert names(model, target_modules=["key"]) == ["layer.0.key", "layer.1.key"]
    own = nn.ModuleDict({"base_layer": small_model(), "last": nn.Linear(8, 8)})
    assert names(own)[-1] == "last"


@pytest.mark.parametrize("wanted", ["all-linear", ["key"], ["query", "key"]])
def test_packed_layers_that_would_be_pruned_are_refused(wanted: object) -> None:
    model = small_model()
    for layer in (model["layer"][1], model["pooler"]):
        for name in ("key", "dense"):
            if name in layer:
                layer[name] = BlockSparseLinear.from_linear(layer[name], (8, 1))
    with pytest.raises(ValueError, match=r"'layer\.1\.key' is packed: .*unpack_\("):
        names(model, target_modules=wanted)
    assert names(model, target_modules=["query"]) == ["layer.0.query", "layer.1.query"]
    left = names(model, exclude_modules=["1.key", "embeddings", "pooler", "classifier"])
    assert left == [name for name in ALL if name != "layer.1.key"]


def test_wrappers_are_seen_through() -> None:
    model = small_model()
    assert unwrap_model(nn.DataParallel(model)) is model
    compiled = nn.Module()  # what torch.compile returns, without its compiler
    compiled._orig_mod = nn.DataParallel(model)
    assert unwrap_model(compiled) is model
