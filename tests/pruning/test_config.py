"""Every rule of ``BlockPruningConfig`` and its JSON form."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pybsp import BlockPruningConfig


def test_defaults_are_the_published_ones() -> None:
    cfg = BlockPruningConfig()
    assert cfg.block_shape == (8, 1)
    assert cfg.target_sparsity == 0.8
    assert cfg.method == "reweighted_group_lasso"
    assert cfg.target_modules == "all-linear"
    assert cfg.exclude_modules is None
    assert cfg.scope == "global"
    assert cfg.max_layer_sparsity == 0.95
    assert cfg.phases == (0.1, 0.5, 0.4)
    assert cfg.reg_lambda == 1e-4
    assert cfg.reweight_every == 0.05
    assert cfg.reweight_eps == 1e-3
    assert cfg.overrides == {}


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockPruningConfig().target_sparsity = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        BlockPruningConfig((8, 1))  # type: ignore[misc]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"block_shape": (8,)}, "pair"),
    ({"block_shape": (0, 1)}, "positive"),
    ({"block_shape": (1, "in/0")}, "in/0"),
    ({"target_sparsity": 0}, "0 < target_sparsity < 1"),
    ({"target_sparsity": 1}, "0 < target_sparsity < 1"),
    ({"target_sparsity": 80}, "80 % is written as the fraction 0.8"),
    ({"target_sparsity": True}, "target_sparsity"),
    ({"target_sparsity": "0.8"}, "target_sparsity"),
    ({"target_sparsity": float("nan")}, "target_sparsity"),
    ({"max_layer_sparsity": 0}, "0 < max_layer_sparsity <= 1"),
    ({"max_layer_sparsity": 1.01}, "0 < max_layer_sparsity <= 1"),
    ({"target_sparsity": 0.96}, "exceeds max_layer_sparsity = 0.95"),
    ({"method": "lasso"}, "method must be one of 'reweighted_group_lasso'"),
    ({"scope": "model"}, "scope must be one of"),
    ({"penalty": "coupled"}, "penalty must be one of"),
    ({"lambda_scaling": "size"}, "lambda_scaling must be one of"),
    ({"ramp": "linear"}, "ramp must be one of"),
    ({"ranking": "l1"}, "ranking must be one of"),
    ({"target_modules": []}, "target_modules must be"),
    ({"target_modules": [""]}, "target_modules must be"),
    ({"target_modules": ""}, "target_modules must be"),
    ({"target_modules": 3}, "target_modules must be"),
    ({"target_modules": "*.query"}, "not a regular expression"),
    ({"exclude_modules": [1]}, "exclude_modules must be"),
    ({"exclude_modules": "("}, "not a regular expression"),
    ({"phases": (0.5, 0.5)}, "three fractions"),
    ({"phases": (0.1, 0.5, 0.5)}, "sum to 1.1"),
    ({"phases": (-0.1, 0.6, 0.5)}, "none negative"),
    ({"phases": (0, 0, 0)}, "no steps at all"),
    ({"phases": "fast"}, "three fractions"),
    ({"phases": (0.5, 0.0, 0.5)}, "needs a regularise phase"),
    ({"phases": (0.5, 0.0, 0.5), "method": "magnitude", "ramp": "cubic"}, "regularise"),
    ({"reg_lambda": -1.0}, "reg_lambda must be"),
    ({"reg_lambda": "big"}, "reg_lambda must be"),
    ({"reg_lambda": float("inf")}, "reg_lambda must be"),
    ({"reg_lambda": "auto"}, 'needs penalty="proximal" or "decoupled"'),
    ({"reweight_every": 0}, "reweight_every must be"),
    ({"reweight_every": 1.5}, "reweight_every must be"),
    ({"reweight_every": True}, "reweight_every must be"),
    ({"reweight_every": 0.5}, "never fires"),
    ({"reweight_every": 100, "phases": (10, 100, 50)}, "never fires"),
    ({"reweight_eps": 0}, "reweight_eps must be a positive number"),
    ({"overrides": [("a", {})]}, "overrides must map globs"),
    ({"overrides": {"a": 0.5}}, "overrides must map a glob"),
    ({"overrides": {"a": {}}}, "may set block_shape, target_sparsity"),
    ({"overrides": {"a": {"scope": "layer"}}}, "may set block_shape,"),
    ({"overrides": {"a": {"target_sparsity": 2}}}, "overrides['a'] target_sparsity"),
    ({"overrides": {"a": {"target_sparsity": 0.99}}}, "exceeds max_layer_sparsity"),
    ({"overrides": {"a": {"block_shape": (1, 0)}}}, "positive integers"),
    ({"overrides": {"a": {"threshold": -1}}}, "overrides['a'] threshold must be a"),
    (
        {"overrides": {"a": {"threshold": 0.1, "target_sparsity": 0.5}}},
        "overrides['a'] sets both",
    ),
    ({"embedding_modules": "("}, "embedding_modules is not a regular expression"),
    (
        {"embedding_modules": ["word"], "packed_retraining": True},
        "packed_retraining trains packed linear layers",
    ),
    ({"threshold": 0}, "threshold must be a number > 0; got 0"),
    ({"threshold": 0.1, "ramp": "cubic"}, "a threshold needs ramp='one_shot'"),
    ({"threshold": 0.1, "scope": "balanced"}, "does not balance"),
    (
        {"threshold": 0.1, "penalty": "proximal", "reg_lambda": "auto"},
        "give reg_lambda a number",
    ),
    (
        {"overrides": {"a": {"threshold": 0.1}}, "saliency": "taylor"},
        "a threshold needs saliency='magnitude'",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_every_rule_names_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (checked below)
        BlockPruningConfig(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


RIGHT: list[dict[str, Any]] = [
    {},
    {"block_shape": (1, "in/8")},
    {"block_shape": ["out", 1], "phases": [10, 20, 30], "reweight_every": 5},
    {"target_modules": ["query", "key"], "exclude_modules": ()},
    {"exclude_modules": ["layer.0"], "scope": "layer", "max_layer_sparsity": 1.0},
    {"reg_lambda": "auto", "penalty": "proximal", "ramp": "cubic"},
    {"overrides": {"*.key": {"block_shape": (1, "in/4"), "target_sparsity": 0.5}}},
    {"method": "magnitude", "phases": (0.0, 0.0, 1.0)},
    {"method": "group_lasso", "reweight_every": 1.0},
]


@pytest.mark.parametrize("settings", RIGHT)
def test_round_trip_through_json(settings: dict[str, Any]) -> None:
    cfg = BlockPruningConfig(**settings)
    text = json.dumps(cfg.to_dict())
    again = BlockPruningConfig.from_dict(json.loads(text))
    assert again == cfg
    assert again.to_dict() == cfg.to_dict()


def test_lists_are_normalised_to_tuples() -> None:
    cfg = BlockPruningConfig(block_shape=[4, 4], target_modules=["a"])  # type: ignore[arg-type]
    assert cfg.block_shape == (4, 4)
    assert cfg.target_modules == ("a",)


def test_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown BlockPruningConfig key 'sparsity'"):
        BlockPruningConfig.from_dict({"sparsity": 0.5})


def test_paper_form() -> None:
    cfg = BlockPruningConfig.paper(target_sparsity=0.5)
    assert cfg.block_shape == (1, "in/8")
    assert (cfg.penalty, cfg.scope, cfg.ramp) == ("gradient", "layer", "one_shot")
    assert (cfg.reg_lambda, cfg.reweight_eps) == (1e-4, 1e-3)
    assert cfg.target_sparsity == 0.5
    assert BlockPruningConfig.paper(reg_lambda=1e-5).reg_lambda == 1e-5
