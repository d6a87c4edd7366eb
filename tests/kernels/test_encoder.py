"""``ops.Encoder`` against its twin in float64, and what it refuses."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from encoders import assert_rounding
from helpers import EPS, assert_within, block_sparse_weight, same_bits

from pybsp import BlockSparseMatrix, ops, reference, reference_encoder

FEATURES, WORDS, POSITIONS = 48, 60, 600


def linear(out, features, block_shape, bias=True):
    dense = block_shape is None
    weight = torch.randn(out, features) if dense else None
    if not dense:
        weight = block_sparse_weight((out, features), block_shape, 0.4, seed=out)
        weight = BlockSparseMatrix.from_dense(weight, block_shape)
    offset = torch.randn(out) * 0.1 if bias else None
    return ops.LinearSpec(weight, offset)


def norm(bias=True):
    offset = torch.randn(FEATURES) * 0.1 if bias else None
    return ops.NormSpec(1 + 0.1 * torch.randn(FEATURES), offset, 1e-5)


def spec(
    *, block_shape=(8, 1), heads=4, width=FEATURES, inner=80, layers=2, first=False,
    one=False, gated=False, window=None, rotary=False, bias=False, embeddings=True,
    activation="gelu", offsets=True,
):  # fmt: skip
    """Every option of the specification."""

    def attention(number):
        outs = [3 * width] if one else [width] * 3
        table = torch.rand(POSITIONS, width // heads // 2) * 6
        return ops.AttentionSpec(
            tuple(linear(out, FEATURES, block_shape, offsets) for out in outs),
            linear(FEATURES, width, block_shape, offsets),
            heads,
            0.3,
            window if number % 2 == 0 else None,
            table.cos() if rotary else None,
            table.sin() if rotary else None,
            torch.randn(heads, 2 * POSITIONS - 1) if bias else None,
        )

    def layer(number):
        up = linear((2 if gated else 1) * inner, FEATURES, block_shape, offsets)
        down = linear(FEATURES, inner, block_shape, offsets)
        return ops.LayerSpec(
            attention(number),
            None if first and number == 0 else norm(offsets),
            ops.FeedForwardSpec(up, activation, down, gated),
            norm(offsets),
        )

    tables = ops.EmbeddingsSpec(
        torch.randn(WORDS, FEATURES),
        None if rotary else torch.randn(POSITIONS, FEATURES),
        None if rotary else torch.randn(2, FEATURES),
        norm(),
    )
    return ops.EncoderSpec(
        FEATURES,
        tuple(layer(number) for number in range(layers)),
        first,
        tables if embeddings else None,
        norm() if first else None,
    )


KINDS = {
    "bert": {},
    "dense": {"block_shape": None, "activation": "relu"},
    "row-blocks": {"block_shape": (1, 16), "activation": "gelu_tanh"},
    "square": {"block_shape": (16, 16), "activation": "silu"},
    "norm-first": {"first": True, "embeddings": False},
    "modern": {
        "first": True, "one": True, "gated": True, "window": 7, "rotary": True,
        "offsets": False,
    },
    "relative": {"bias": True, "heads": 3, "window": 11},
    "narrow": {"heads": 5, "width": 40},
    "one-head": {"heads": 1, "layers": 1},
}  # fmt: skip


def padding(batch, length):
    """Padded at the end, at the beginning, in holes, not at all, and wholly."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        cut = int(torch.randint(1, length + 1, ()))
        if row % 5 == 1:
            mask[row, cut:] = 0
        elif row % 5 == 2:
            mask[row, : length - cut] = 0
        elif row % 5 == 3:
            mask[row] = torch.rand(length) < 0.6
        elif row % 5 == 4:
            mask[row] = 0
    return mask


def inputs(one, batch, length):
    if one.embeddings is None:
        return {"hidden": torch.randn(batch, length, FEATURES)}
    return {
        "ids": torch.randint(0, WORDS, (batch, length)),
        "token_types": torch.randint(0, 2, (batch, length)),
        "positions": torch.randint(0, POSITIONS, (batch, length)),
    }


def check(one, batch, length, what=""):
    given = {**inputs(one, batch, length), "mask": padding(batch, length)}
    found = ops.Encoder(one)(**given)
    kept = given["mask"].bool()
    assert found.dtype == torch.float32
    assert not found[~kept].any()
    twins = [
        reference_encoder.encoder(one, **given, dtype=dtype)[kept]
        for dtype in (torch.float32, torch.float64)
    ]
    if kept.any():
        assert_rounding(found[kept], *twins, what)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_twin(kind, isa):
    one = spec(**KINDS[kind])
    for batch, length in [(1, 1), (3, 2), (6, 17), (2, 48), (5, 50), (1, 128)]:
        check(one, batch, length, f"{isa} {kind} {batch} x {length}")


@pytest.mark.parametrize("kind", ["bert", "modern", "relative"])
def test_long_sequences_and_many(kind, isa):
    one = spec(**KINDS[kind])
    check(one, 1, 512, f"{isa} {kind}")
    check(one, 130, 9, f"{isa} {kind}")


@pytest.mark.parametrize("kind", ["bert", "dense", "norm-first", "modern"])
def test_a_feed_forward_part_that_exceeds_l2(kind, isa):
    """Its tiles go through in chunks, each in the memory of the one before."""
    lanes = 48  # at most, for half of L2
    inner = ops.l2_cache_bytes() // (8 * lanes) // 16 * 16
    one = spec(**KINDS[kind], inner=inner, layers=1)
    check(one, 3, 70, f"{isa} {kind}")
    encoder, given = ops.Encoder(one), inputs(one, 3, 70)
    torch.set_num_threads(1)
    expected = encoder(**given)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert same_bits(encoder(**given), expected), (isa, count)


def test_keeps_the_memory_of_what_it_was_made_of():
    one = spec(layers=1)
    values = one.layers[0].attention.output.weight.values
    encoder, given = ops.Encoder(one), inputs(one, 2, 9)
    expected, address = encoder(**given), values.data_ptr()
    values.data = torch.full_like(values, torch.nan)
    tensors = [kept for kept in encoder._kept if isinstance(kept, torch.Tensor)]
    assert address in {tensor.data_ptr() for tensor in tensors}
    assert same_bits(encoder(**given), expected)


def test_values_elsewhere_are_refused():
    one = spec(layers=1)
    matrix = one.layers[0].attention.output.weight
    matrix.values = matrix.values.to("meta")
    with pytest.raises(ValueError, match=r"values is on meta.*move one of them"):
        ops.Encoder(one)


def test_a_sequence_has_the_same_bits_in_any_company_on_any_threads(isa):
    one = ops.Encoder(spec(bias=True, window=20))
    lengths = torch.randint(1, 60, (23,))
    mask = (torch.arange(60)[None] < lengths[:, None]).long()
    ids = torch.randint(0, WORDS, (23, 60))
    torch.set_num_threads(1)
    expected = one(ids, mask=mask)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert same_bits(one(ids, mask=mask), expected), count
        for row in (0, 7, 22):
            alone = one(ids[row : row + 1], mask=mask[row : row + 1])
            assert same_bits(alone[0], expected[row]), (isa, count, row)
            cut = one(ids[row : row + 1, : lengths[row]])
            assert same_bits(cut[0], expected[row, : lengths[row]])


def test_threads_of_python_do_not_meet():
    encoders = [ops.Encoder(spec()), ops.Encoder(spec(first=True, width=96))]
    requests = [torch.randint(0, WORDS, (b, n)) for b in (1, 3, 9) for n in (1, 30, 90)]
    work = [(one, ids) for one in encoders for ids in requests] * 4
    expected = [one(ids) for one, ids in work]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda one: one[0](one[1]), work)
        assert all(map(same_bits, found, expected))


def test_weights_are_used_where_they_lie():
    one = spec(block_shape=None)
    encoder = ops.Encoder(one)
    ids = torch.randint(0, WORDS, (2, 9))
    before = encoder(ids)
    one.layers[0].feed_forward.up.weight.mul_(0.5)
    after = encoder(ids)
    assert not torch.equal(before, after)
    expected = [
        reference_encoder.encoder(one, ids, dtype=d)
        for d in (torch.float32, torch.float64)
    ]
    assert_rounding(after, *expected)


def test_defaults_of_types_and_positions():
    encoder = ops.Encoder(spec())
    ids = torch.randint(0, WORDS, (3, 20))
    places = torch.arange(20).expand(3, 20)
    explicit = encoder(ids, None, torch.ones(3, 20), torch.zeros_like(ids), places)
    assert same_bits(encoder(ids), explicit)
    assert same_bits(encoder(ids.t().contiguous().t()), explicit)


def test_infinite_and_nan_states_stay_in_their_sequence():
    hidden = torch.randn(3, 20, FEATURES)
    encoder = ops.Encoder(spec(embeddings=False))
    clean = encoder(hidden=hidden)
    hidden[1, 3, 5] = torch.nan
    found = encoder(hidden=hidden)
    assert found[1].isnan().all()
    assert same_bits(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_do(shape):
    one, ids = spec(), torch.zeros(shape, dtype=torch.long)
    for found in (ops.Encoder(one)(ids), reference_encoder.encoder(one, ids)):
        assert found.shape == (*shape, FEATURES)


def norm_alone(features):
    """An encoder that computes nothing but its last norm: all weights are zero."""
    zero = ops.LinearSpec(torch.zeros(features, features))
    attention = ops.AttentionSpec((zero,) * 3, zero, heads=1, scale=1.0)
    part = ops.FeedForwardSpec(zero, "relu", zero)
    last = ops.NormSpec(torch.ones(features), None, 1e-12)
    layer = ops.LayerSpec(attention, None, part, None)
    return ops.Encoder(ops.EncoderSpec(features, (layer,), True, final_norm=last))


@pytest.mark.parametrize("kind", ["usual", "first", "other", "far", "far-first"])
def test_norms_of_features_far_from_zero_or_from_each_other(kind, isa):
    x = torch.randn(1, 20, 768)
    if kind.startswith("far"):
        x += 1e4
    if kind.endswith("first"):
        x[..., 0] = -1e4
    elif kind == "other":
        x[..., 7] = 1e4
    found = norm_alone(768)(hidden=x)
    exact = F.layer_norm(x.double(), (768,), eps=1e-12)
    # A result is rounded a few times, and all share the error of the mean: the sum of
    # n deviations, which are 1 on average, has n roundings of sqrt(n) / 2 at most.
    bound = EPS * (8 * exact.abs() + 1)
    assert_within(found, exact, bound, f"{isa} {kind}")


@pytest.mark.usefixtures("isa")
def test_norms_of_features_that_are_all_alike():
    encoder = norm_alone(768)
    for value in (0.0, 3.3, -1e4, 1e8, 1e-40):
        assert not encoder(hidden=torch.full((1, 5, 768), value)).any(), value
        # One that differs in its last bit.
        x = torch.full((1, 5, 768), value)
        x[..., 300] = torch.nextafter(x[..., 300], torch.tensor(torch.inf))
        assert encoder(hidden=x).isfinite().all(), value


def test_layers_that_share_one_of_two_tables_of_rotation(isa):
    one = spec(**KINDS["modern"])
    first, second = one.layers
    for table in ("cos", "sin"):
        other = replace(second.attention, **{table: getattr(first.attention, table)})
        layers = (first, replace(second, attention=other))
        check(replace(one, layers=layers), 2, 17, f"{isa} {table}")


def test_a_window_without_end():
    one = spec(**KINDS["modern"])
    ids = torch.randint(0, WORDS, (2, 40))
    found = [
        ops.Encoder(changed("attention", one, number=0, window=window))(ids)
        for window in (None, 2**63 - 1)
    ]
    assert same_bits(*found)


def test_rows_that_a_table_does_not_have():
    encoder, ids = ops.Encoder(spec()), torch.zeros(2, 5, dtype=torch.long)
    wrong = {
        "ids holds 60 and the table of words has 60 rows": {"ids": ids + WORDS},
        "ids holds -1 and": {"ids": ids - 1},
        "token_types holds 2 and": {"ids": ids, "token_types": ids + 2},
        "positions holds 600 and": {"ids": ids, "positions": ids + POSITIONS},
        "a row holds 601 tokens and the positions reach to 600": {
            "ids": torch.zeros(1, 601, dtype=torch.long)
        },
    }
    for message, given in wrong.items():
        with pytest.raises(IndexError, match=message):
            encoder(**given)
    # What is padding is not looked up.
    encoder(ids + WORDS, mask=torch.zeros(2, 5))
    rotated = ops.Encoder(spec(rotary=True))
    with pytest.raises(IndexError, match="the rotations reach to 600"):
        rotated(torch.zeros(1, 601, dtype=torch.long))
    biased = ops.Encoder(spec(bias=True, embeddings=False))
    with pytest.raises(IndexError, match="the relative positions reach to 600"):
        biased(hidden=torch.zeros(1, 601, FEATURES))


def test_wrong_inputs():
    encoder, ids = ops.Encoder(spec()), torch.zeros(2, 5, dtype=torch.long)
    for error, message, given in [
        (TypeError, "ids must be torch.int64; got torch.int32", {"ids": ids.int()}),
        (ValueError, "give ids", {"hidden": torch.zeros(2, 5, FEATURES)}),
        (ValueError, "give ids", {}),
        (ValueError, r"mask has shape \(2, 4\)", {"ids": ids, "mask": ids[:, 1:]}),
        (ValueError, "positions has shape", {"ids": ids, "positions": ids[0]}),
        (ValueError, "ids is on meta", {"ids": ids.to("meta")}),
        (ValueError, "mask is on meta", {"ids": ids, "mask": ids.to("meta")}),
        (ValueError, r"ids has shape \(5,\)", {"ids": ids[0]}),
    ]:
        with pytest.raises(error, match=message):
            encoder(**given)
    states = ops.Encoder(spec(embeddings=False))
    with pytest.raises(ValueError, match=r"hidden has shape \(2, 5, 3\)"):
        states(hidden=torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="give hidden"):
        states(ids)


def changed(part, one=None, number=1, **fields):
    one = spec() if one is None else one
    layers = [*one.layers]
    layer = replace(getattr(layers[number], part), **fields)
    layers[number] = replace(layers[number], **{part: layer})
    return replace(one, layers=tuple(layers))


def test_parts_that_do_not_fit():
    wide = torch.randn(FEATURES, FEATURES + 1)
    for error, message, build in [
        (ValueError, "7 heads do not divide its width, 48",
         lambda: changed("attention", heads=7)),
        (ValueError, "the attention of layer 1 has 2 projections",
         lambda: changed("attention", projections=(ops.LinearSpec(wide),) * 2)),
        (ValueError, r"a weight has shape \(48, 49\)",
         lambda: changed("attention", projections=(ops.LinearSpec(wide),) * 3)),
        (ValueError, "give both cos and sin", lambda: changed("attention", cos=wide)),
        (ValueError, "window must be 0 or more; got -2",
         lambda: changed("attention", window=-2)),
        (ValueError, "relative_bias has shape",
         lambda: changed("attention", relative_bias=torch.zeros(3, 9))),
        (ValueError, "activation must be one of",
         lambda: changed("feed_forward", activation="tanh")),
        (ValueError, "the norm of the attention of layer 1 has shape",
         lambda: changed("attention_norm", weight=torch.ones(3))),
        (TypeError, "must be torch.float32; got torch.float64",
         lambda: changed("attention_norm", weight=torch.ones(FEATURES).double())),
        (ValueError, "the tensor must be contiguous",
         lambda: changed("attention_norm", weight=torch.ones(2 * FEATURES)[::2])),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            ops.Encoder(build())


def test_a_copy_computes_with_its_own_weights():
    one = ops.Encoder(spec(block_shape=None))
    other, ids = copy.deepcopy(one), torch.randint(0, WORDS, (2, 9))
    expected = one(ids)
    one.spec.layers[0].feed_forward.up.weight.zero_()
    assert same_bits(other(ids), expected)
    assert not torch.equal(one(ids), expected)


PARTS = {
    "embeddings", "query_key_value", "attention", "output", "norms", "up", "down",
    "storing", "rest",
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 12])
def test_parts_add_up_to_the_native_call(batch, threads):
    encoder = ops.Encoder(spec(layers=4))
    ids = torch.randint(0, WORDS, (batch, 100))
    torch.set_num_threads(threads)
    expected = encoder(ids)
    covered = []
    for _ in range(10):
        start = time.perf_counter()
        y, seconds = encoder.profile(ids)
        whole = time.perf_counter() - start
        assert same_bits(y, expected)
        assert set(seconds) == PARTS
        # Of several threads the calling one may find all groups taken.
        least = 0.0 if threads > 1 else 1e-9
        assert all(value >= least for value in seconds.values())
        assert sum(seconds.values()) <= whole
        covered.append(sum(seconds.values()) / whole)
    # The clock runs from the beginning of the native call to its end.
    assert max(covered) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_an_architecture_does_not_have_take_nothing(kind):
    one = spec(**KINDS[kind])
    if one.norm_first:
        bare = [
            replace(layer, attention_norm=None, feed_forward_norm=None)
            for layer in one.layers
        ]
        one = replace(one, layers=tuple(bare), final_norm=None)
        if one.embeddings is not None:
            one = replace(one, embeddings=replace(one.embeddings, norm=None))
    x = (
        {"hidden": torch.randn(2, 30, FEATURES)}
        if one.embeddings is None
        else {"ids": torch.randint(0, WORDS, (2, 30))}
    )
    _, seconds = ops.Encoder(one).profile(**x)
    assert (seconds.pop("norms") == 0) == one.norm_first
    assert all(value > 0 for value in seconds.values())


def test_what_a_call_refuses_a_profile_refuses():
    encoder = ops.Encoder(spec())
    with pytest.raises(IndexError, match="words"):
        encoder.profile(torch.full((1, 3), WORDS))
    with pytest.raises(ValueError, match="give ids"):
        encoder.profile(hidden=torch.randn(1, 3, FEATURES))


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_are_those_of_kept_weights_and_visible_pairs(kind):
    one = spec(**KINDS[kind])
    lengths = (1, 7, 8, 30)
    expected = 0
    for layer in one.layers:
        attention, part = layer.attention, layer.feed_forward
        for linear in (*attention.projections, attention.output, part.up, part.down):
            dense = linear.weight
            if not isinstance(dense, torch.Tensor):
                dense = dense.to_dense()
            # Random weights: only what is in no block is zero.
            expected += int((dense != 0).sum()) * sum(lengths)
        for length in lengths:
            at = torch.arange(length)
            distance = (at[:, None] - at).abs()
            seen = distance <= (
                length if attention.window is None else attention.window
            )
            width = attention.output.weight.shape[1]
            expected += 2 * width * int(seen.sum())
    assert one.multiply_adds(lengths) == expected


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


def has_own_attention(attention, length):
    """Whether int8 layers may have another attention than float32 ones: with VNNI. Of
    the specifications here none has heads for that of AMX."""
    width = attention.output.weight.shape[1] // attention.heads
    hidden = attention.window is not None or attention.relative_bias is not None
    vnni = ops.active_isa().endswith("_vnni")
    return vnni and not hidden and length >= 50 and width % 8 == 0


def check_int8(one, batch, length, what=""):
    """Most tokens differ from the twin by rounding alone.

    Where float32 rounds differently before a layer, now and then an input that lies
    between two whole numbers becomes the other one, which moves its token by up to a
    few thousandths. Anything wrong would move all tokens, and further. Attention that
    is not that of floats moves more of them, and they are not returned.
    """
    given = {**inputs(one, batch, length), "mask": padding(batch, length)}
    found = ops.Encoder(one)(**given)
    kept = given["mask"].bool()
    assert not found[~kept].any()
    # AVX-512 comes within 2e-6 of GELU itself, the others of the twin's polynomial.
    table = ops.active_isa().startswith(("avx512", "amx"))
    gelu = F.gelu if table else reference.gelu_short
    with mock.patch.object(reference_encoder, "gelu_short", gelu):
        twin = reference_encoder.encoder(one, **given)
    if not kept.any():
        return
    errors = (found - twin)[kept].norm(dim=-1) / twin[kept].norm(dim=-1)
    own = has_own_attention(one.layers[0].attention, length)
    assert float(errors.square().mean().sqrt() if own else errors.max()) < 0.03, what
    return None if own else errors


@pytest.mark.parametrize("input_scale", [0.0, 0.03], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", SPARSE)
def test_int8_equals_the_twin(kind, input_scale, isa):
    one = as_int8(spec(**KINDS[kind]), input_scale)
    shapes = [(1, 1), (3, 2), (6, 17), (2, 48), (5, 50), (1, 128)]
    found = [check_int8(one, *shape, f"{isa} {kind} {shape}") for shape in shapes]
    errors = torch.cat([each for each in found if each is not None])
    exact = float((errors < 64 * EPS).float().mean())
    assert exact > 0.6, (isa, kind, exact)


@pytest.mark.parametrize("width", [64, 128])
def test_int8_attention_in_16_bits(width, isa):
    """Heads of 32 and 64, in 16 bits where the CPU has AMX or VNNI: what that changes
    is small beside what 8 bits change. Heads that mix up anything would change more."""
    floats = spec(heads=2, width=width)
    one = as_int8(floats)
    short, int8 = [], []
    for batch, length in [(1, 64), (3, 100), (2, 128), (4, 65)]:
        given = {**inputs(one, batch, length), "mask": padding(batch, length)}
        kept = given["mask"].bool()
        twin = reference_encoder.encoder(one, **given)[kept]
        short.append(ops.Encoder(one)(**given)[kept] - twin)
        int8.append(reference_encoder.encoder(floats, **given)[kept] - twin)
    assert float(torch.cat(short).norm()) < 0.5 * float(torch.cat(int8).norm()), isa


@pytest.mark.parametrize("part", ["projections", "output", "up", "down"])
@pytest.mark.parametrize("kind", ["bert", "modern"])
def test_float32_and_int8_side_by_side(kind, part, isa):
    one = as_int8(spec(**KINDS[kind]), parts=(part,))
    errors = torch.cat([check_int8(one, 3, 17, f"{isa} {part}") for _ in range(4)])
    assert float((errors < 64 * EPS).float().mean()) > 0.6, (isa, part)


@pytest.mark.parametrize(("longest", "kind"), [
    (60, {"bias": True, "window": 20}),
    *((110, {"heads": 2, "width": 64, "window": w}) for w in (0, 1, 5, 14, 20, None)),
])  # fmt: skip
def test_int8_has_the_same_bits_in_any_company_on_any_threads(longest, kind, isa):
    one = ops.Encoder(as_int8(spec(**kind)))
    lengths = torch.randint(longest // 2, longest, (11,))
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    mask[7, 5:9] = 0
    ids = torch.randint(0, 60, (11, longest))
    torch.set_num_threads(1)
    expected = one(ids, mask=mask)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(one(ids, mask=mask), expected), count
        for row in (0, 7, 10):
            alone = one(ids[row : row + 1], mask=mask[row : row + 1])
            assert same_bits(alone[0], expected[row]), (isa, count, row)


def test_int8_nan_states_stay_in_their_sequence(isa):
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
