"""Versions of dictionaries, by which a native encoder sees changes of its model."""

import sys
from collections import OrderedDict

import pytest
from torch import nn

from pybsp.ops.runtime import DictVersions

counts = pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0),
    reason="Python 3.13.0 does not tell of attributes",
)

CHANGES = {
    "set": lambda places: places[0].update(a=2),
    "add": lambda places: places[0].setdefault("new", 1),
    "delete": lambda places: places[0].pop("a"),
    "clear": lambda places: places[1].clear(),
    "ordered": lambda places: places[1].update(a=2),
    "attribute": lambda places: setattr(places[-1], "training", False),
    "new attribute": lambda places: setattr(places[-1], "note", 1),
    "child": lambda places: places[-1].add_module("more", nn.Identity()),
    "parameter": lambda places: places[-1].register_parameter("p", None),
    "hook": lambda places: places[-1].register_forward_hook(print),
    "deleted attribute": lambda places: delattr(places[-1], "eps"),
}


def places():
    norm = nn.LayerNorm(4)
    ordered = OrderedDict(a=1, b=2)
    found = [
        {"a": 1},
        ordered,
        vars(norm),
        norm._modules,
        norm._parameters,
        norm._forward_hooks,
    ]
    return found, [*found, norm]


@counts
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    dicts, everything = places()
    versions = DictVersions(dicts)
    assert versions.unchanged(dicts)
    CHANGES[change](everything)
    assert not versions.unchanged(dicts)
    DictVersions(dicts)
    assert not versions.unchanged(dicts)


@counts
def test_looking_changes_nothing():
    dicts, (*_, norm) = places()
    versions = DictVersions(dicts)
    assert norm.eps > 0
    assert norm.weight is not None
    assert "forward" not in vars(norm)
    assert dicts[0]["a"] == 1
    assert dicts[0].get("b") is None
    assert [*dicts[1]]
    assert versions.unchanged(dicts)
    assert DictVersions(dicts).unchanged(dicts)


def test_what_was_put_back_is_a_change():
    dicts, _ = places()
    versions = DictVersions(dicts)
    del dicts[0]["a"]
    dicts[0]["a"] = 1
    assert not versions.unchanged(dicts)


def test_dictionaries_that_are_gone():
    dicts = [{"a": 1}, {"b": 2}]
    versions = DictVersions(dicts)
    dicts.clear()
    assert not versions.unchanged(dicts)


@pytest.mark.parametrize("other", [None, [], 3, vars(nn.Linear)])
def test_others_than_dictionaries(other):
    with pytest.raises(TypeError, match="each must be a dict"):
        DictVersions([{}, other])
