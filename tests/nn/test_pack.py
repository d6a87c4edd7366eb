import copy
import json

import pytest
import torch
from torch import nn

import pybsp
from pybsp.blocks import expand_blocks
from pybsp.costs import Cost, linear_cost
from pybsp.nn import BlockSparseLinear, pack, pack_, unpack_
from pybsp.nn.plan import LayerPlan
from pybsp.quantization import calibrate


def prune(linear, block_shape=(8, 1), density=0.25):
    grid = (
        linear.out_features // block_shape[0],
        linear.in_features // block_shape[1],
    )
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(7)) < density
    with torch.no_grad():
        linear.weight *= expand_blocks(mask, block_shape)
    return linear


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        prune(nn.Linear(32, 64)),
        nn.Tanh(),
        prune(nn.Linear(64, 32), (4, 4)),
        nn.Linear(32, 3),
    )


def test_packs_layers_with_zero_blocks_and_no_others():
    model = small_model()
    x = torch.randn(5, 32)
    with torch.no_grad():
        before = model(x)
        report = pack_(model, min_gain=0)
        torch.testing.assert_close(model(x), before)
    assert isinstance(model[0], BlockSparseLinear)
    assert model[0].block_shape == (8, 1)
    assert isinstance(model[2], BlockSparseLinear)
    assert model[2].block_shape == (4, 4)
    assert type(model[3]) is nn.Linear
    assert [layer.packed for layer in report.layers] == [True, True, False]
    assert report.layers[2].reason == "no zeros"


def test_report():
    report = pack_(small_model(), min_gain=0)
    text = str(report)
    for part in ("64x32", "8x1", "4x4", "2 of 3 linear layers packed", "no zeros"):
        assert part in text
    record = json.loads(json.dumps(report.to_dict()))
    assert record["layers_packed"] == 2
    assert record["dense_bytes"] == 4 * (64 * 32 + 32 * 64 + 3 * 32)
    first = record["layers"][0]
    assert first["name"] == "0"
    assert first["block_shape"] == [8, 1]
    matrix = small_model()
    pack_(matrix, min_gain=0)
    packed = matrix[0].matrix.nbytes + matrix[2].matrix.nbytes + 4 * 3 * 32
    assert report.packed_bytes == packed


def test_stays_dense_where_packed_would_not_be_faster(monkeypatch):
    asked = []

    def cost(shape, block_shape, density, tokens, threshold):
        asked.append((shape, block_shape, density, tokens, threshold))
        return Cost(100.0, 50.0) if shape == (64, 32) else Cost(100.0, 80.0)

    monkeypatch.setattr(pack, "expected_cost", cost)
    model = small_model()
    report = pack_(model, min_gain=1.5, tokens=7)
    assert isinstance(model[0], BlockSparseLinear)
    assert type(model[2]) is nn.Linear
    assert [layer.gain for layer in report.layers] == [2.0, 1.25, None]
    assert "1.25x" in report.layers[1].reason
    assert "below 1.5x" in report.layers[1].reason
    assert [entry[3:] for entry in asked] == [(7, 1.5), (7, 1.5)]
    assert asked[0][2] == model[0].density


def test_no_gain_anywhere_is_a_result_and_no_error(monkeypatch):
    monkeypatch.setattr(pack, "expected_cost", lambda *_: Cost(1.0, 2.0))
    model = small_model()
    assert pack_(model).packed == ()
    assert type(model[0]) is nn.Linear


def test_block_shape_may_be_given_or_recorded_by_the_pruner():
    model = small_model()
    pack_(model, block_shape=(4, 1), min_gain=0)
    assert model[0].block_shape == model[2].block_shape == (4, 1)
    model = small_model()
    model[0].pybsp_block_shape = (2, 1)
    pack_(model, min_gain=0)
    assert model[0].block_shape == (2, 1)
    assert model[2].block_shape == (4, 4)


def test_block_shape_from_the_config_of_the_model():
    model = small_model()
    record = {"quant_method": "pybsp", "modules": {"base.0": [4, 1], "2": [2, 2]}}
    model.config = type("Config", (), {"quantization_config": record})()
    pack_(model, min_gain=0)
    assert model[0].block_shape == (4, 1)
    assert model[2].block_shape == (2, 2)


def test_scattered_zeros_are_named_so():
    model = nn.Sequential(prune(nn.Linear(32, 64)), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight *= torch.rand(64, 64) < 0.5
    report = pack_(model, min_gain=0)
    assert "scattered" in report.layers[1].reason


def test_a_shape_that_does_not_divide_leaves_that_layer_dense():
    model = nn.Sequential(prune(nn.Linear(32, 64)), prune(nn.Linear(64, 6), (2, 1)))
    report = pack_(model, block_shape=(8, 1), min_gain=0)
    assert "does not divide" in report.layers[1].reason
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8)), {}, ValueError, "pybsp prune"),
        (lambda: nn.Sequential(nn.Tanh()), {}, ValueError, "no nn.Linear"),
        (small_model, {"block_shape": (64, 64)}, ValueError, "zero blocks of shape"),
        (small_model, {"block_shape": (8, 0)}, ValueError, "positive"),
        (small_model, {"dtype": "int4"}, ValueError, "'int4'"),
        (small_model, {"min_gain": -1}, ValueError, "min_gain"),
        (small_model, {"min_gain": float("nan")}, ValueError, "min_gain"),
        (small_model, {"tokens": 0}, ValueError, "tokens"),
        (lambda: prune(nn.Linear(8, 8)), {}, ValueError, "from_linear"),
        (lambda: "model", {}, TypeError, "nn.Module"),
        (lambda: small_model().half(), {}, ValueError, "float32"),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(model, options, error, message):
    model = model()
    before = str(model)
    with pytest.raises(error, match=message) as caught:
        pack_(model, **{"min_gain": 0, **options})
    assert "\n" not in str(caught.value)
    assert str(model) == before


def test_nan_weights_are_refused_before_anything_changes():
    model = small_model()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'2' holds NaN"):
        pack_(model, min_gain=0)
    assert type(model[0]) is nn.Linear


def test_packing_again_packs_what_is_new():
    model = small_model()
    pack_(model, min_gain=0)
    first = model[0]
    prune(model[3], (1, 8), 0.5)
    report = pack_(model, min_gain=0)
    assert model[0] is first
    assert isinstance(model[3], BlockSparseLinear)
    assert [layer.packed for layer in report.layers] == [True, True, True]
    assert "already" in report.layers[0].reason


def test_a_module_used_twice_stays_one_module():
    linear = prune(nn.Linear(32, 32))
    model = nn.Sequential(linear, nn.Tanh(), linear)
    report = pack_(model, min_gain=0)
    assert model[0] is model[2]
    assert len(report.layers) == 1
    unpack_(model)
    assert model[0] is model[2]
    assert type(model[0]) is nn.Linear


def test_linears_that_share_a_weight_still_share_it():
    model = nn.Sequential(prune(nn.Linear(32, 32)), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    pack_(model, min_gain=0)
    assert model[0].weight_values is model[1].weight_values
    assert model[0].bias is not model[1].bias


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("used", [False, True])
def test_unpacked_linears_share_the_weight_they_shared(dtype, used):
    model = nn.Sequential(prune(nn.Linear(32, 32)), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    pack_(model, dtype=dtype, min_gain=0)
    if used:
        with torch.no_grad():
            model(torch.randn(3, 32))
    unpack_(model)
    assert model[0].weight is model[1].weight
    assert model[0].bias is not model[1].bias


def test_layers_that_cannot_be_replaced_say_why():
    class Special(nn.Linear):
        pass

    embedding = nn.Embedding(32, 32)
    tied = nn.Linear(32, 32)
    tied.weight = embedding.weight
    hooked = prune(nn.Linear(32, 32))
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": prune(tied),
            "hooked": hooked,
            "special": prune(Special(32, 32)),
            "torch": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            "plain": prune(nn.Linear(32, 32)),
        }
    )
    prune(model["torch"].linear1)
    report = pack_(model, min_gain=0)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "tied" in reasons["tied"]
    assert "hooks" in reasons["hooked"]
    assert "Special" in reasons["special"]
    assert "TransformerEncoderLayer" in reasons["torch.linear1"]
    assert [layer.name for layer in report.packed] == ["plain"]


def test_unpack_restores_the_model():
    model = small_model()
    original = copy.deepcopy(model)
    assert unpack_(model) is model
    pack_(model, min_gain=0)
    unpack_(model)
    assert str(model) == str(original)
    for left, right in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(left, right)
    assert pack_(model, min_gain=0).layers[0].block_shape == (8, 1)


def test_decision_for_this_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(
        prune(nn.Linear(256, 512), (8, 1), 0.05),
        prune(nn.Linear(512, 256), (1, 1), 0.9),
    )
    report = pybsp.pack_(model, block_shape=(1, 1), min_gain=0.001)
    assert all(layer.dense_us > 0 and layer.sparse_us > 0 for layer in report.layers)
    assert all(layer.packed for layer in report.layers)


def stacked_model():
    """A list of layers of which one has no zero blocks, and a head."""
    torch.manual_seed(0)
    layers = [prune(nn.Linear(32, 32)), nn.Linear(32, 32), prune(nn.Linear(32, 32))]
    model = nn.Module()
    model.layers, model.head = nn.ModuleList(layers), nn.Linear(32, 8)
    model.forward = lambda x: model.head(
        model.layers[2](model.layers[1](model.layers[0](x)))
    )
    return model


def assert_near(found, exact):
    """Within what rounding inputs and weights to 1 / 127 makes of a few layers."""
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.05, error


def test_int8_packs_what_stands_between_packed_layers_too():
    model = stacked_model()
    x = torch.randn(9, 32)
    with torch.no_grad():
        before = model(x)
        report = pack_(model, dtype="int8", min_gain=0)
        assert_near(model(x), before)
    assert all(layer.is_int8 for layer in model.layers)
    assert type(model.head) is nn.Linear
    assert [layer.dtype for layer in report.layers] == ["int8"] * 3 + ["float32"]
    assert report.layers[1].density == 1
    assert report.layers[1].block_shape == (8, 1)
    for line, layer in zip(report.layers, model.layers, strict=False):
        assert line.packed_bytes == layer.matrix.nbytes
    assert "3 of 4 linear layers packed, 3 of them in int8" in str(report)
    assert report.to_dict()["layers"][0]["dtype"] == "int8"


def test_int8_is_measured_and_stays_dense_where_it_would_not_be_faster(monkeypatch):
    asked = []

    def cost(shape, block_shape, density, tokens, dtype):
        asked.append((shape, block_shape, tokens, dtype))
        return Cost(100.0, 200.0 if density == 1 else 20.0)

    monkeypatch.setattr(pack, "linear_cost", cost)
    model = stacked_model()
    report = pack_(model, dtype="int8", tokens=5)
    assert [type(layer) for layer in model.layers] == [
        BlockSparseLinear, nn.Linear, BlockSparseLinear,
    ]  # fmt: skip
    assert "0.50x" in report.layers[1].reason
    assert report.layers[1].dtype == "float32"
    assert report.layers[0].gain == 5.0
    assert asked[0] == ((32, 32), (8, 1), 5, "int8")


def test_int8_after_float32_and_back():
    model, x = small_model(), torch.randn(5, 32)
    direct = copy.deepcopy(model)
    pack_(model, min_gain=0)
    assert {type(model[i]) for i in (0, 2)} == {BlockSparseLinear}
    pack_(model, dtype="int8", min_gain=0)
    pack_(direct, dtype="int8", min_gain=0)
    with torch.no_grad():
        assert torch.equal(model(x), direct(x))
    report = pack_(model, min_gain=0)  # stays int8
    assert [layer.dtype for layer in report.layers] == ["int8", "int8", "float32"]
    assert report.layers[0].reason == "was packed already"
    weights = [model[i].weight.clone() for i in (0, 2)]
    unpack_(model)
    assert all(type(model[i]) is nn.Linear for i in (0, 2))
    assert torch.equal(model[0].weight, weights[0])
    assert torch.equal(model[2].weight, weights[1])
    pack_(model, dtype="int8", min_gain=0)
    with torch.no_grad():
        assert torch.equal(model(x), direct(x))


def test_int8_keeps_shared_weights_shared():
    first, second = prune(nn.Linear(32, 32)), nn.Linear(32, 32)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    pack_(model, dtype="int8", min_gain=0)
    assert model[0].weight_values is model[1].weight_values
    assert model[0].weight_scales is model[1].weight_scales


def test_int8_costs_are_measured_on_this_cpu():
    report = pack_(small_model(), dtype="int8", tokens=16)
    assert all(layer.sparse_us for layer in report.layers[:2])
    cost = linear_cost((64, 32), (8, 1), 0.25, 16, dtype="int8")
    assert cost.measured
    assert cost.sparse_us > 0


def test_int8_input_scales_from_calibration_or_known():
    batches = [torch.randn(9, 32) for _ in range(3)]
    model = small_model()
    inputs = {"0": torch.cat(batches)}
    with torch.no_grad():
        inputs["2"] = model[1](model[0](inputs["0"]))
    scales = calibrate(model, batches, ["0", "2"])
    report = pack_(model, dtype="int8", min_gain=0, calibration=iter(batches))
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        assert layer.static_scale == torch.tensor(scales[name]).item()
        # The least squared error clips little of what was seen.
        largest = float(inputs[name].abs().max())
        assert 0.3 * largest < 127 * layer.static_scale <= 1.001 * largest
    assert [layer.input_scale > 0 for layer in report.layers] == [True, True, False]
    assert "packed, int8, static" in str(report)
    known = small_model()
    pack_(known, dtype="int8", min_gain=0, calibration={"0": scales["0"]})
    assert known[0].static_scale == model[0].static_scale
    assert known[2].static_scale == 0
    # One that is int8 already may be given scales.
    pack_(known, dtype="int8", min_gain=0, calibration=scales)
    assert known[2].static_scale == model[2].static_scale
    with torch.no_grad():
        assert torch.equal(known(batches[0]), model(batches[0]))


@pytest.mark.parametrize("packed", [False, True])
def test_int8_a_scale_of_zero_makes_a_layer_dynamic(packed):
    model = small_model()
    if packed:
        pack_(model, dtype="int8", min_gain=0, calibration={"0": 0.03, "2": 0.05})
        pack_(model, dtype="int8", min_gain=0)  # no word on scales: they stay
        assert model[0].static_scale == torch.tensor(0.03).item()
    report = pack_(model, dtype="int8", min_gain=0, calibration={"0": 0.0})
    assert model[0].input_scale is None
    assert report.layers[0].input_scale == 0
    assert (model[2].static_scale > 0) == packed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float32", "calibration": []}, ValueError, "for dtype='int8'"),
        ({"dtype": "bfloat16", "calibration": []}, ValueError, "for dtype='int8'"),
        (
            {"dtype": "bfloat16", "float32_modules": ["x"]},
            ValueError,
            "no linear layer",
        ),
        ({"dtype": "float16"}, ValueError, "'float32', 'bfloat16' or 'int8'"),
        ({"calibration": {"x": torch.ones(1)}}, TypeError, "into a list"),
        ({"calibration": {"7": 0.1}}, ValueError, "'7', which is no linear layer"),
        ({"calibration": {"0": -0.1}}, ValueError, "input_scale must be"),
        ({"calibration": []}, ValueError, "no batches"),
        (
            {"dtype": "float32", "float32_modules": ["0"]},
            ValueError,
            "for dtype='bfloat16' or 'int8'; dtype is 'float32'",
        ),
        ({"float32_modules": ["x"]}, ValueError, "'x' matches no linear layer"),
        ({"float32_modules": ["0", "x"]}, ValueError, "'x' matches no linear layer"),
        ({"float32_modules": "x"}, ValueError, "'x' matches no linear layer"),
        ({"float32_modules": 3}, ValueError, "regular expression or a list"),
        ({"float32_modules": "("}, ValueError, "not a regular expression"),
    ],
)
def test_wrong_calibration_is_one_line_and_changes_nothing(options, error, message):
    model = small_model()
    with pytest.raises(error, match=message) as caught:
        pack_(model, **{"dtype": "int8", "min_gain": 0, **options})
    assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("modules", [["layers.0"], "layers.[0]", ("0",)])
@pytest.mark.parametrize("before", [False, True])
def test_named_layers_stay_float32(modules, before):
    model, x = stacked_model(), torch.randn(9, 32)
    if before:
        pack_(model, min_gain=0)
    report = pack_(model, dtype="int8", min_gain=0, float32_modules=modules)
    kinds = [getattr(layer, "is_int8", None) for layer in model.layers]
    assert kinds == [False, True, True]
    assert [line.dtype for line in report.layers[:3]] == ["float32", "int8", "int8"]
    assert report.layers[0].packed
    with torch.no_grad():
        exact = stacked_model()(x)
        assert_near(model(x), exact)


@pytest.mark.parametrize("before", [False, True])
def test_int8_leaves_what_has_too_many_inputs_in_float32(before):
    wide = prune(nn.Linear(65536 + 8, 8))
    model = nn.ModuleList([prune(nn.Linear(32, 32)), wide])
    if before:
        pack_(model, min_gain=0, shrink=False)
    report = pack_(model, dtype="int8", min_gain=0)
    assert [layer.is_int8 for layer in model] == [True, False]
    assert report.layers[1].reason == "8-bit products are exact up to 65536 inputs"


def test_an_error_in_a_layer_leaves_all_as_they_were(monkeypatch):
    model = small_model()
    build = LayerPlan.build

    def fail(plan, shared):
        if plan.names == ("2",):
            raise MemoryError
        return build(plan, shared)

    monkeypatch.setattr(LayerPlan, "build", fail)
    with pytest.raises(MemoryError):
        pack_(model, min_gain=0)
    assert type(model[0]) is nn.Linear


def test_bfloat16_rounds_packed_layers_alone():
    model, x = stacked_model(), torch.randn(9, 32)
    twin = copy.deepcopy(model)
    report = pack_(model, dtype="bfloat16", min_gain=0)
    assert [layer.dtype for layer in report.layers] == [
        "bfloat16", "float32", "bfloat16", "float32",
    ]  # fmt: skip
    assert type(model.layers[1]) is nn.Linear
    for line, layer in zip(report.layers, model.layers, strict=False):
        if line.packed:
            assert layer.weight_values.dtype == torch.bfloat16
            assert line.packed_bytes == layer.matrix.nbytes
    assert "2 of 4 linear layers packed, 2 of them in bfloat16" in str(report)
    assert "packed, bfloat16" in str(report)
    with torch.no_grad():
        for i in (0, 2):
            twin.layers[i].weight.copy_(twin.layers[i].weight.bfloat16())
        pack_(twin, min_gain=0)
        assert torch.equal(model(x), twin(x))


def test_bfloat16_after_float32_before_int8_and_back():
    model, x = small_model(), torch.randn(5, 32)
    direct, int8 = copy.deepcopy(model), copy.deepcopy(model)
    pack_(direct, dtype="bfloat16", min_gain=0)
    pack_(model, min_gain=0)
    report = pack_(model, dtype="bfloat16", min_gain=0)
    assert [layer.dtype for layer in report.layers[:2]] == ["bfloat16"] * 2
    for line, layer in zip(report.layers, (model[0], model[2]), strict=False):
        assert line.packed_bytes == layer.matrix.nbytes
    with torch.no_grad():
        assert torch.equal(model(x), direct(x))
    before = model[0]
    for dtype in ("float32", "bfloat16"):  # stays as it is
        report = pack_(model, dtype=dtype, min_gain=0)
        assert report.layers[0].dtype == "bfloat16"
        assert report.layers[0].reason == "was packed already"
    assert model[0] is before
    weight = model[0].weight.clone()
    report = pack_(model, dtype="int8", min_gain=0)
    assert model[0].is_int8
    assert report.layers[0].packed_bytes == model[0].matrix.nbytes
    pack_(int8, dtype="int8", min_gain=0)
    report = pack_(int8, dtype="bfloat16", min_gain=0)
    assert report.layers[0].dtype == "int8"
    unpack_(direct)
    assert torch.equal(direct[0].weight, weight)
    assert direct[0].weight.requires_grad


def test_bfloat16_decides_as_float32_does(monkeypatch):
    def cost(shape, block_shape, density, tokens, threshold):  # noqa: ARG001
        return Cost(100.0, 20.0 if shape == (64, 32) else 200.0)

    monkeypatch.setattr(pack, "expected_cost", cost)
    model = small_model()
    report = pack_(model, dtype="bfloat16")
    kinds = {line.shape: (line.packed, line.dtype) for line in report.layers}
    assert kinds[64, 32] == (True, "bfloat16")
    assert all(kind == (False, "float32") for s, kind in kinds.items() if s != (64, 32))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kept", ["0", "1"])
def test_linears_that_share_a_weight_may_differ_in_type(kept, dtype):
    first, second = prune(nn.Linear(32, 32)), nn.Linear(32, 32)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    x = torch.randn(4, 32)
    expected = model(x)
    report = pack_(model, dtype=dtype, min_gain=0, float32_modules=[kept])
    assert {line.name: line.dtype for line in report.layers} == {
        name: "float32" if name == kept else dtype for name in ("0", "1")
    }
    assert [layer.dtype for layer in model] == [line.dtype for line in report.layers]
    assert float(((model(x) - expected).norm() / expected.norm()).detach()) < 0.05


def test_bfloat16_keeps_shared_weights_shared_and_named_layers_float32():
    first, second = prune(nn.Linear(32, 32)), nn.Linear(32, 32)
    second.weight = first.weight
    model = nn.Sequential(first, second, prune(nn.Linear(32, 32)))
    report = pack_(model, dtype="bfloat16", min_gain=0, float32_modules=["2"])
    assert model[0].weight_values is model[1].weight_values
    assert [line.dtype for line in report.layers] == ["bfloat16"] * 2 + ["float32"]
    assert isinstance(model[2].weight_values, nn.Parameter)
