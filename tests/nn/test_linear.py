import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pybsp
from pybsp.blocks import expand_blocks
from pybsp.nn import BlockSparseLinear
from pybsp.nn.linear import FIELDS


def pruned_linear(out=24, in_features=16, block_shape=(8, 1), density=0.4, bias=True):
    torch.manual_seed(out + in_features)
    linear = nn.Linear(in_features, out, bias)
    grid = (out // block_shape[0], in_features // block_shape[1])
    mask = torch.rand(grid) < density
    mask.view(-1)[0] = True
    mask.view(-1)[-1] = False
    with torch.no_grad():
        linear.weight *= expand_blocks(mask, block_shape)
    return linear


def assert_close(result, x, weight, bias=None, activation=None):
    """Within the rounding of a sum of |x| |W| terms, doubled by the activation."""
    exact = F.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    if activation:
        exact = pybsp.reference.ACTIVATIONS[activation](exact)
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    bound = (x.shape[-1] + 16) * torch.finfo(torch.float32).eps * (size + 1e-6)
    error = (result.double() - exact).abs()
    worst = int((error / bound).argmax())
    assert (error <= bound).all(), (
        f"element {worst}: {result.flatten()[worst]}, not {exact.flatten()[worst]}"
    )


@pytest.mark.parametrize("block_shape", [(8, 1), (1, 4), (4, 4), (24, 16), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_linear_it_was_made_from(block_shape, bias):
    linear = pruned_linear(block_shape=block_shape, bias=bias)
    if block_shape == (24, 16):
        linear = nn.Linear(16, 24, bias)
    layer = BlockSparseLinear.from_linear(linear, block_shape)
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        assert_close(layer(x), x, linear.weight, linear.bias)
    assert torch.equal(layer.weight, linear.weight)
    assert layer(x[:0]).shape == (0, 5, 24)


def test_no_copy_of_the_values_is_kept():
    layer = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    assert layer.matrix.values is layer.weight_values
    assert layer.matrix is layer.matrix
    assert (
        layer.weight_values.stride() == (8, 1, 8) or layer.weight_values.shape[2] == 1
    )


def test_reads_fractions_and_refuses_shapes_that_do_not_divide():
    layer = BlockSparseLinear.from_linear(pruned_linear(), (1, "in/4"))
    assert layer.block_shape == (1, 4)
    with pytest.raises(ValueError, match="does not divide"):
        BlockSparseLinear.from_linear(pruned_linear(), (7, 1))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation(activation):
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear, (8, 1), activation)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert_close(layer(x), x, linear.weight, linear.bias, activation)
    assert activation in repr(layer)
    with pytest.raises(ValueError, match="unpack_"):
        layer.to_linear()
    with pytest.raises(ValueError, match="activation"):
        BlockSparseLinear.from_linear(linear, (8, 1), "tanh")


def test_gradients_equal_those_of_the_dense_layer_at_kept_blocks():
    linear = pruned_linear(block_shape=(4, 2))
    layer = BlockSparseLinear.from_linear(linear, (4, 2), "gelu")
    x = torch.randn(6, 16, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    F.gelu(linear(twin)).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
    kept = pybsp.BlockSparseMatrix.from_mask(
        linear.weight.grad,
        (linear.weight.view(6, 4, 8, 2) != 0).any(3).any(1),
        (4, 2),
    )
    torch.testing.assert_close(layer.weight_values.grad, kept.values)


def test_an_optimizer_step_is_seen_by_the_next_call():
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear, (8, 1))
    x = torch.randn(3, 16)
    with torch.inference_mode():
        layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        assert_close(layer(x), x, layer.weight, layer.bias)


@pytest.mark.parametrize("change", ["parameter", "data", "strides", "to", "indices"])
def test_notices_changed_tensors(change):
    layer = BlockSparseLinear.from_linear(pruned_linear(block_shape=(4, 2)), (4, 2))
    x = torch.randn(3, 16)
    with torch.inference_mode():
        layer(x)
    if change == "parameter":
        layer.weight_values = nn.Parameter(layer.weight_values.detach() * 2)
    elif change == "data":
        layer.weight_values.data = layer.weight_values.detach() * 2
    elif change == "strides":
        layer.weight_values.data = layer.weight_values.detach().contiguous() * 2
    elif change == "to":
        layer.double().float()
    else:
        layer.weight_col_indices = layer.weight_col_indices.long()
    with torch.inference_mode():
        assert_close(layer(x), x, layer.weight, layer.bias)
    assert layer.matrix.values is layer.weight_values


def test_another_dtype_is_refused():
    layer = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    with pytest.raises(TypeError, match="float32"):
        layer(torch.randn(3, 16, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float32"):
        layer.bfloat16()(torch.randn(3, 16))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_independent(clone):
    layer = BlockSparseLinear.from_linear(pruned_linear(block_shape=(4, 2)), (4, 2))
    x = torch.randn(3, 16)
    before = layer(x)
    twin = clone(layer)
    assert twin.weight_values.stride() == layer.weight_values.stride()
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.weight_values.zero_()
    assert torch.equal(layer(x), before)


def test_to_linear():
    linear = pruned_linear()
    linear.weight.requires_grad_(False)
    layer = BlockSparseLinear.from_linear(linear.eval(), (8, 1))
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)
    assert not back.training
    assert not back.weight.requires_grad
    assert back.bias.requires_grad
    assert back.pybsp_block_shape == (8, 1)


def packed_state(layer):
    """The layer's tensors by name, as packed files hold them."""
    state = {name: getattr(layer, name).detach() for name in FIELDS}
    return {**state, "bias": layer.bias.detach()}


def test_state_dict_is_the_dense_one_and_loads_back():
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear, (8, 1))
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(layer.state_dict()["weight"], linear.weight)
    assert layer.state_dict(keep_vars=True)["weight"].requires_grad
    nn.Linear(16, 24).load_state_dict(layer.state_dict())
    twin = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    with torch.no_grad():
        twin.weight_values.mul_(3)
    address = twin.weight_values.data_ptr()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)
    assert twin.weight_values.data_ptr() == address


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_with_another_pattern_and_block_shape(assign):
    source = BlockSparseLinear.from_linear(pruned_linear(block_shape=(4, 2)), (4, 2))
    layer = BlockSparseLinear.from_linear(pruned_linear(density=0.1), (8, 1))
    x = torch.randn(3, 16)
    with torch.inference_mode():
        layer(x)
    state = {key: value.contiguous() for key, value in packed_state(source).items()}
    state["weight_col_indices"] = state["weight_col_indices"].to(torch.int16)
    model = nn.Sequential(layer)
    model.load_state_dict({f"0.{k}": v for k, v in state.items()}, assign=assign)
    assert layer.block_shape == (4, 2)
    assert torch.equal(layer.weight, source.weight)
    with torch.inference_mode():
        assert_close(layer(x), x, source.weight, source.bias)


def test_another_pattern_leaves_layers_with_the_same_indices_alone():
    layer = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    weight = layer.weight.detach()
    others = [layer.quantize(), layer.quantize(dtype="bfloat16"), layer.matrix]
    before = [other.to_dense() for other in (others[0].matrix, others[1].matrix)]
    layer.load_state_dict({"weight": weight.roll(1, 1), "bias": layer.bias.detach()})
    assert torch.equal(layer.weight, weight.roll(1, 1))
    after = [other.to_dense() for other in (others[0].matrix, others[1].matrix)]
    assert all(map(torch.equal, before, after))
    assert torch.equal(others[2].col_indices, others[0].weight_col_indices)


def test_loads_a_dense_state():
    linear = pruned_linear(density=0.7)
    layer = BlockSparseLinear.from_linear(pruned_linear(density=0.2), (8, 1))
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.parametrize(
    ("field", "harm", "message"),
    [
        ("weight_col_indices", lambda t: t + 100, "col_indices"),
        ("weight_col_indices", lambda t: -t - 1, "col_indices"),
        ("weight_col_indices", lambda t: t.long() + 2**32, "damaged"),
        ("weight_col_indices", lambda t: t.flip(0), "col_indices"),
        ("weight_col_indices", lambda t: t.float(), "integers"),
        ("weight_crow_indices", lambda t: t.flip(0), "crow_indices"),
        ("weight_crow_indices", lambda t: t[:-1], "crow_indices"),
        ("weight_values", lambda t: t[:-1], "values"),
        ("weight_values", lambda t: t.flatten(), "values"),
        ("weight_values", lambda t: t.double(), "float32"),
        ("weight_values", lambda t: t[:, :7], "divide"),
        ("weight_values", None, "weight_values"),
    ],
)
def test_hostile_state_changes_nothing(field, harm, message):
    layer = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    state = packed_state(layer)
    before = layer.weight.detach().clone()
    if harm is None:
        del state[field]
    else:
        state[field] = harm(state[field])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight, before)


def test_dense_state_of_another_shape_is_refused():
    layer = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    with pytest.raises(RuntimeError, match=r"\(16, 16\).*\(24, 16\)"):
        layer.load_state_dict(nn.Linear(16, 16).state_dict(), strict=False)


def test_repr():
    layer = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    assert "in_features=16, out_features=24" in repr(layer)
    assert "block_shape=(8, 1)" in repr(layer)
    assert f"density={layer.density:.3f}" in repr(layer)


def test_compiles_into_one_graph():
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear, (8, 1), "gelu").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, 16)
    with torch.no_grad():
        layer(x)
        assert_close(compiled(x), x, linear.weight, linear.bias, "gelu")


def test_exports_with_its_parameters():
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear, (8, 1)).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert set(program.state_dict) == {*FIELDS, "bias"}
        assert_close(program.module()(x), x, linear.weight, linear.bias)


def int8_layer(input_scale=None, block_shape=(8, 1), activation=None):
    linear = pruned_linear(block_shape=block_shape)
    matrix = pybsp.BlockSparseMatrix.from_dense(linear.weight, block_shape)
    return BlockSparseLinear(matrix.quantize(), linear.bias, activation, input_scale)


def int8_state(layer):
    state = {name: getattr(layer, name) for name in (*FIELDS, "weight_scales")}
    return {**state, "bias": layer.bias.detach()}


@pytest.mark.parametrize("input_scale", [None, 0.03])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_int8_computes_the_int8_product(input_scale, activation):
    layer = int8_layer(input_scale, activation=activation)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = pybsp.block_sparse_linear(
            x, layer.matrix, layer.bias, activation, input_scale=input_scale or 0.0
        )
        assert torch.equal(layer(x), expected)
        assert torch.equal(
            layer(x.as_subclass(type("X", (torch.Tensor,), {}))), expected
        )
    assert "dtype=int8" in repr(layer)
    assert layer.matrix is layer.matrix
    assert layer.matrix.values is layer.weight_values


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounded_weights_are_not_trained_and_the_rest_is(dtype):
    layer = int8_layer() if dtype == "int8" else bfloat16_layer()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.requires_grad_(True)
    x = torch.randn(3, 16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 16))
    assert layer.bias.grad is not None
    linear = layer.to_linear()
    assert linear.weight.requires_grad
    assert linear.weight.dtype == torch.float32


def test_int8_from_linear_and_from_a_float32_layer():
    linear = pruned_linear()
    layer = BlockSparseLinear.from_linear(linear.eval(), (8, 1), dtype="int8")
    assert layer.is_int8
    assert not layer.training
    packed = BlockSparseLinear.from_linear(linear, (8, 1), "relu")
    other = packed.quantize(0.02)
    assert torch.equal(other.weight_values, layer.weight_values)
    assert other.bias is packed.bias
    assert other.activation == "relu"
    assert other.static_scale == pytest.approx(0.02)
    assert other.quantize() is other
    assert not packed.is_int8


def test_an_input_scale_is_for_int8_and_positive():
    matrix = pybsp.BlockSparseMatrix.from_dense(torch.eye(8), (8, 1))
    with pytest.raises(ValueError, match="for int8 weights"):
        BlockSparseLinear(matrix, input_scale=0.1)
    with pytest.raises(ValueError, match="input_scale must be"):
        BlockSparseLinear(matrix.quantize(), input_scale=-0.1)


@pytest.mark.parametrize("change", ["buffer", "values", "scales", "input", "to"])
def test_int8_notices_changed_tensors(change):
    layer = int8_layer(0.03)
    x = torch.randn(3, 16)
    before = layer(x)
    if change == "buffer":
        layer.weight_values = torch.zeros_like(layer.weight_values)
    elif change == "values":
        layer.weight_values.zero_()
    elif change == "scales":
        layer.weight_scales.zero_()
    elif change == "input":
        layer.input_scale.fill_(1e6)
    else:
        layer.double().float()
        assert torch.equal(layer(x), before)
        return
    with torch.no_grad():
        assert torch.equal(layer(x), layer.bias.expand(3, 24))


def test_int8_with_scales_of_another_type_is_refused():
    with pytest.raises(TypeError, match="scales must be float32"):
        int8_layer().half()(torch.randn(3, 16))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_int8_copies_are_independent(clone):
    layer = int8_layer(0.03)
    x = torch.randn(3, 16)
    before = layer(x)
    twin = clone(layer)
    assert torch.equal(twin(x), before)
    twin.weight_scales.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


def test_int8_to_linear_is_dequantized():
    layer = int8_layer(0.03)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert linear.weight.requires_grad
    assert torch.equal(linear.weight, layer.matrix.to_dense())
    again = BlockSparseLinear.from_linear(linear, (8, 1), dtype="int8")
    assert torch.equal(again.weight_values, layer.weight_values)


@pytest.mark.parametrize("input_scale", [None, 0.03])
def test_int8_state_dict_is_the_dense_one_and_loads_back(input_scale):
    layer = int8_layer(input_scale)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias"}
    nn.Linear(16, 24).load_state_dict(state)
    twin = int8_layer(input_scale)
    twin.weight_values.zero_()
    x = torch.randn(3, 16)
    twin(x)
    twin.load_state_dict(state)
    assert torch.equal(twin.weight_values, layer.weight_values)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_int8_state_with_another_pattern_and_block_shape(assign, static):
    source = int8_layer(0.07 if static else None, (4, 2))
    layer = int8_layer(0.03)
    x = torch.randn(3, 16)
    layer(x)
    state = int8_state(source)
    if static:
        state["input_scale"] = source.input_scale
    layer.load_state_dict(state, assign=assign)
    assert layer.block_shape == (4, 2)
    assert layer.static_scale == pytest.approx(0.07 if static else 0.03)
    with torch.no_grad():
        expected = pybsp.block_sparse_linear(
            x, source.matrix, source.bias, input_scale=layer.static_scale
        )
        assert torch.equal(layer(x), expected)


def test_a_layer_keeps_its_type_whatever_is_loaded():
    linear = pruned_linear()
    layer, packed = int8_layer(), BlockSparseLinear.from_linear(linear, (8, 1))
    packed.load_state_dict(int8_state(layer))
    assert not packed.is_int8
    assert torch.equal(packed.weight, layer.weight)
    layer.load_state_dict(packed_state(BlockSparseLinear.from_linear(linear, (8, 1))))
    assert layer.is_int8
    quantized = pybsp.BlockSparseMatrix.from_dense(linear.weight, (8, 1)).quantize()
    assert torch.equal(layer.weight_values, quantized.values)


@pytest.mark.parametrize(
    ("field", "harm", "message"),
    [
        ("weight_scales", lambda t: t[:-1], "scales"),
        ("weight_scales", lambda t: -t, "not negative"),
        ("weight_scales", lambda t: t * torch.nan, "finite"),
        ("weight_scales", lambda t: t.double(), "float32"),
        ("weight_scales", None, "need scales"),
        ("weight_values", lambda t: t.to(torch.int16), "belong to int8"),
        ("weight_values", lambda t: t[:-1], "values"),
        ("weight_col_indices", lambda t: t + 100, "col_indices"),
    ],
)
def test_hostile_int8_state_changes_nothing(field, harm, message):
    layer = int8_layer()
    state = int8_state(layer)
    before = layer.weight.clone()
    if harm is None:
        del state[field]
    else:
        state[field] = harm(state[field])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("input_scale", [None, 0.03])
def test_int8_compiles_and_exports(input_scale):
    layer = int8_layer(input_scale, activation="gelu").eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x), expected)
        assert {*FIELDS, "weight_scales", "bias"} <= set(program.state_dict)


@pytest.mark.parametrize("before", [None, 0.03])
def test_compiled_code_takes_the_input_scale_that_was_loaded(before):
    layer, x = int8_layer(before).eval(), torch.randn(6, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    state = {field: getattr(layer, field).clone() for field in FIELDS}
    state |= {"weight_scales": layer.weight_scales, "bias": layer.bias.detach()}
    state["input_scale"] = torch.tensor(0.5)
    with torch.no_grad():
        first = compiled(x)
        layer.load_state_dict(state)
        loaded = compiled(x)
        exported = torch.export.export(copy.deepcopy(layer), (x,)).module()(x)
        expected = layer(x)
    assert not torch.equal(first, expected)
    assert torch.equal(loaded, expected)
    assert torch.equal(exported, expected)


def test_an_input_scale_that_is_none_is_refused_when_it_is_loaded():
    layer = int8_layer(0.03)
    with pytest.raises(RuntimeError, match="input_scale: input_scale must be"):
        layer.load_state_dict({"input_scale": torch.tensor(-1.0)}, strict=False)


@pytest.mark.parametrize("field", ["weight_values", "weight_scales", "input_scale"])
def test_int8_made_in_inference_mode_notices_writes(field):
    with torch.inference_mode():
        layer = int8_layer(0.03)
        layer.bias = None
        x = torch.randn(3, 16)
        before = layer(x)
        getattr(layer, field).fill_(3)
        after = layer(x)
    assert not torch.equal(before, after)
    values, scales = layer.weight_values.clone(), layer.weight_scales.clone()
    fresh = pybsp.BlockSparseMatrix(
        layer.weight_crow_indices, layer.weight_col_indices, values, (24, 16), scales
    )
    expected = pybsp.ops.block_sparse_linear(x, fresh, input_scale=layer.static_scale)
    assert torch.equal(after, expected)


def bfloat16_layer(activation=None):
    return BlockSparseLinear.from_linear(
        pruned_linear(), (8, 1), activation, dtype="bfloat16"
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_bfloat16_computes_the_product_of_rounded_weights(activation):
    linear, x = pruned_linear(), torch.randn(2, 5, 16)
    layer = BlockSparseLinear.from_linear(linear, (8, 1), activation, dtype="bfloat16")
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
        wide = BlockSparseLinear.from_linear(linear, (8, 1), activation)
        assert torch.equal(layer(x), wide(x))
        assert torch.equal(
            layer(x.as_subclass(type("X", (torch.Tensor,), {}))), wide(x)
        )
        assert torch.equal(wide.quantize(dtype="bfloat16")(x), wide(x))
        widened = copy.deepcopy(layer).float()
        assert widened.dtype == "float32"
        assert torch.equal(widened(x), wide(x))
    assert layer.dtype == "bfloat16"
    assert "dtype=bfloat16" in repr(layer)
    assert layer.matrix.values is layer.weight_values
    assert layer.quantize(dtype="bfloat16") is layer
    assert layer.weight_values.nbytes * 2 == wide.weight_values.nbytes


def test_bfloat16_sees_writes_copies_and_states():
    layer, x = bfloat16_layer(), torch.randn(3, 16)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    with torch.inference_mode():
        before = layer(x)
        layer.weight_values.mul_(2)
        assert not torch.equal(layer(x), before)
        assert torch.equal(twin(x), before)
    other = bfloat16_layer()
    other.load_state_dict(twin.state_dict())  # dense
    fields = {name: getattr(twin, name) for name in FIELDS}
    layer.load_state_dict({**fields, "bias": twin.bias})  # packed
    wide = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    wide.load_state_dict({**fields, "bias": twin.bias})
    with torch.no_grad():
        for loaded, dtype in (
            (other, "bfloat16"),
            (layer, "bfloat16"),
            (wide, "float32"),
        ):
            assert loaded.dtype == dtype
            assert torch.equal(loaded(x), before)
        layer.weight_values = layer.weight_values.contiguous()  # block by block
        assert torch.equal(layer(x), before)
        assert layer.matrix.values is layer.weight_values


def test_bfloat16_has_no_input_scale():
    matrix = bfloat16_layer().matrix
    with pytest.raises(ValueError, match="for int8 weights; these are bfloat16"):
        BlockSparseLinear(matrix, input_scale=0.1)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        bfloat16_layer().half()(torch.randn(3, 16))
    frozen = BlockSparseLinear.from_linear(pruned_linear(), (8, 1))
    with pytest.raises(TypeError, match="bfloat16 values are not trained"):
        frozen.bfloat16()(torch.randn(3, 16))
