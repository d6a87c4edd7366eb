"""``ops.Encoder`` with int8 weights against its twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import EPS, same_bits
from test_encoder import FEATURES, KINDS, inputs, padding, spec

from pybsp import BlockSparseMatrix, ops, reference_encoder

#: A dense weight is the same native matrix with or without int8 around it.
SPARSE = [kind for kind in KINDS if kind != "dense"]


def as_int8(one, input_scale=0.0, parts=("projections", "output", "up", "down")):
    """The specification with int8 weights in these parts of every layer."""

    def linear(part, given):
        if part not in parts or isinstance(given.weight, torch.Tensor):
            return given
        return replace(given, weight=given.weight.quantize(), input_scale=input_scale)

    def layer(given):
        attention, feed_forward = given.attention, given.feed_forward
        return replace(
            given,
            attention=replace(
                attention,
                projections=tuple(
                    linear("projections", each) for each in attention.projections
                ),
                output=linear("output", attention.output),
            ),
            feed_forward=replace(
                feed_forward,
                up=linear("up", feed_forward.up),
                down=linear("down", feed_forward.down),
            ),
        )

    return replace(one, layers=tuple(layer(each) for each in one.layers))


def check(one, batch, length, what=""):
    """Most tokens differ from the twin by rounding alone.

    Where float32 rounds differently before a layer, now and then an input that lies
    between two whole numbers becomes the other one, which moves its token by up to a
    few thousandths. Anything wrong would move all tokens, and further.
    """
    given = {**inputs(one, batch, length), "mask": padding(batch, length)}
    found = ops.Encoder(one)(**given)
    kept = given["mask"].bool()
    assert not found[~kept].any()
    twin = reference_encoder.encoder(one, **given)
    if not kept.any():
        return
    errors = (found - twin)[kept].norm(dim=-1) / twin[kept].norm(dim=-1)
    assert float(errors.max()) < 0.03, what
    return errors


@pytest.mark.parametrize("input_scale", [0.0, 0.03], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", SPARSE)
def test_equals_the_twin(kind, input_scale, isa):
    one = as_int8(spec(**KINDS[kind]), input_scale)
    shapes = [(1, 1), (3, 2), (6, 17), (2, 48), (5, 50), (1, 128)]
    found = [check(one, *shape, f"{isa} {kind} {shape}") for shape in shapes]
    errors = torch.cat([each for each in found if each is not None])
    exact = float((errors < 64 * EPS).float().mean())
    assert exact > 0.6, (isa, kind, exact)


@pytest.mark.parametrize("part", ["projections", "output", "up", "down"])
@pytest.mark.parametrize("kind", ["bert", "modern"])
def test_float32_and_int8_side_by_side(kind, part, isa):
    one = as_int8(spec(**KINDS[kind]), parts=(part,))
    errors = torch.cat([check(one, 3, 17, f"{isa} {part}") for _ in range(4)])
    assert float((errors < 64 * EPS).float().mean()) > 0.6, (isa, part)


def test_a_sequence_has_the_same_bits_in_any_company_on_any_threads(isa):
    one = ops.Encoder(as_int8(spec(bias=True, window=20)))
    lengths = torch.randint(1, 60, (11,))
    mask = (torch.arange(60)[None] < lengths[:, None]).long()
    ids = torch.randint(0, 60, (11, 60))
    torch.set_num_threads(1)
    expected = one(ids, mask=mask)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(one(ids, mask=mask), expected), count
        for row in (0, 7, 10):
            alone = one(ids[row : row + 1], mask=mask[row : row + 1])
            assert same_bits(alone[0], expected[row]), (isa, count, row)


def test_nan_states_stay_in_their_sequence(isa):
    hidden = torch.randn(3, 20, FEATURES)
    encoder = ops.Encoder(as_int8(spec(embeddings=False)))
    clean = encoder(hidden=hidden)
    hidden[1, 3, 5] = torch.nan
    found = encoder(hidden=hidden)
    assert found[1].isnan().all(), isa
    assert same_bits(found[[0, 2]], clean[[0, 2]]), isa


def test_the_matrix_need_not_be_kept():
    one = as_int8(spec())
    encoder = ops.Encoder(one)
    ids = torch.randint(0, 60, (2, 9))
    expected = encoder(ids)
    for layer in one.layers:
        layer.attention.output.weight.values.zero_()
    assert same_bits(encoder(ids), expected)


def test_a_wrong_input_scale_is_named():
    with pytest.raises(ValueError, match="input_scale must be"):
        ops.Encoder(as_int8(spec(), -1.0))


def test_a_matrix_of_another_shape_is_named():
    one = spec()
    weight = BlockSparseMatrix.from_dense(torch.eye(16), (8, 1)).quantize()
    part = replace(one.layers[0].feed_forward, down=ops.LinearSpec(weight))
    layer = replace(one.layers[0], feed_forward=part)
    with pytest.raises(ValueError, match="a weight has shape"):
        ops.Encoder(replace(one, layers=(layer,)))
