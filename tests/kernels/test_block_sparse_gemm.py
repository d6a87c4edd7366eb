"""The product against float64, for every instruction set, shape and way to call it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ACTIVATIONS, GRIDS, assert_linear, block_sparse_weight, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pybsp
from pybsp import BlockSparseMatrix, ops
from pybsp.blocks import expand_blocks

ALL_GRIDS = [
    *GRIDS,
    ((41, 96), (1, 48)),
    ((1, 70), (1, 7)),
    ((70, 1), (7, 1)),
    ((1200, 30), (3, 1)),
    ((26, 1200), (13, 4)),
]
TOKENS = [*range(50), 96, 131]


def call(weight: torch.Tensor, block_shape: Any, x: torch.Tensor, *args: Any) -> Any:
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    return ops.block_sparse_linear(x, W, *args)


@pytest.mark.parametrize(
    ("shape", "block_shape"), ALL_GRIDS, ids=lambda pair: "x".join(map(str, pair))
)
def test_matches_float64(isa: str, shape: Any, block_shape: Any) -> None:
    out_features, in_features = shape
    bias = torch.randn(out_features)
    small = out_features * in_features < 10_000
    for density in (0.0, 0.02, 0.4, 1.0):
        weight = block_sparse_weight(shape, block_shape, density)
        W = BlockSparseMatrix.from_dense(weight, block_shape)
        for tokens in (1, 2, 3, 4, 5, 9, 16, 17, 33, 49) if small else (1, 4, 9, 50):
            x = torch.randn(tokens, in_features)
            what = f"{isa} density {density} tokens {tokens}"
            assert_linear(ops.block_sparse_linear(x, W), x, weight, what=what)
            y = ops.block_sparse_linear(x, W, bias)
            assert_linear(y, x, weight, bias, what=what + " bias")


@pytest.mark.parametrize(
    "block_shape", [(8, 1), (16, 4), (1, 8), (1, 2), (5, 5)], ids=str
)
def test_every_number_of_tokens(isa: str, block_shape: Any) -> None:
    shape = (40, 40) if block_shape == (5, 5) else (48, 40)
    weight = block_sparse_weight(shape, block_shape, 0.5)
    bias = torch.randn(shape[0])
    W = BlockSparseMatrix.from_dense(weight, block_shape)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1])
        y = ops.block_sparse_linear(x, W, bias, "gelu")
        assert y.shape == (tokens, shape[0])
        assert_linear(y, x, weight, bias, "gelu", f"{isa} tokens {tokens}")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_activations_are_fused(isa: str, activation: str | None, tokens: int) -> None:
    for block_shape in ((8, 1), (1, 12), (2, 3)):
        weight = block_sparse_weight((72, 48), block_shape, 0.4)
        x, bias = torch.randn(tokens, 48), torch.randn(72)
        for b in (None, bias):
            y = call(weight, block_shape, x, b, activation)
            assert_linear(y, x, weight, b, activation, f"{isa} {block_shape}")


def test_a_large_layer_takes_several_groups_of_tiles(isa: str) -> None:
    # 2 MB of transposed inputs at a time: 3072 features and 300 tokens need more.
    for block_shape in ((8, 1), (1, 384)):
        weight = block_sparse_weight((64, 3072), block_shape, 0.1)
        x, bias = torch.randn(300, 3072), torch.randn(64)
        assert_linear(call(weight, block_shape, x, bias), x, weight, bias, what=isa)


def test_empty_rows_give_the_activated_bias(isa: str) -> None:
    bias = torch.linspace(-3, 3, 24)
    expected = torch.nn.functional.gelu(bias.double())
    for block_shape in ((8, 1), (1, 8), (4, 4), (24, 8)):
        W = BlockSparseMatrix.from_dense(torch.zeros(24, 8), block_shape)
        assert W.nnz == 0
        for tokens in (1, 7, 60):
            x = torch.full((tokens, 8), torch.nan)
            y = ops.block_sparse_linear(x, W, bias, "gelu")
            assert y.shape == (tokens, 24)
            torch.testing.assert_close(
                y.double(), expected.expand(tokens, 24), rtol=1e-6, atol=1e-7
            )
            assert not ops.block_sparse_linear(x, W).any(), isa


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20, 53])
def test_nan_and_inf_reach_only_their_outputs(
    isa: str, special: float, tokens: int
) -> None:
    for block_shape in ((8, 1), (1, 8), (4, 4), (1, 1)):
        shape = (32, 32)
        weight = block_sparse_weight(shape, block_shape, 0.3, seed=tokens)
        kept = expand_blocks(
            pybsp.ops.block_norms(weight, block_shape) > 0, block_shape
        )
        token, feature = tokens - 1, 29
        x = torch.randn(tokens, 32)
        clean = call(weight, block_shape, x)
        x[token, feature] = special
        y = call(weight, block_shape, x)
        touched = torch.zeros(tokens, 32, dtype=torch.bool)
        touched[token] = kept[:, feature]
        assert not y[touched].isfinite().any(), (isa, block_shape)
        assert same_bits(y[~touched], clean[~touched]), block_shape


@pytest.mark.parametrize("tokens", [1, 6, 45, 200])
@pytest.mark.parametrize("block_shape", [(8, 1), (1, 16), (16, 4)], ids=str)
@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_threads(
    isa: str, tokens: int, block_shape: Any
) -> None:
    weight = block_sparse_weight((512, 256), block_shape, 0.5)
    weight[:256] = 0  # unbalanced
    x, bias = torch.randn(tokens, 256), torch.randn(512)
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        results.append(call(weight, block_shape, x, bias, "silu"))
        assert torch.get_num_threads() == number
    assert_linear(results[0], x, weight, bias, "silu", isa)
    assert all(same_bits(results[0], y) for y in results[1:])


@pytest.mark.usefixtures("threads")
def test_python_threads_may_call_at_once(isa: str) -> None:
    torch.set_num_threads(2)
    weight = block_sparse_weight((256, 256), (8, 1), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (8, 1))
    inputs = [torch.randn(20 + i, 256) for i in range(6)]
    expected = [ops.block_sparse_linear(x, W) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not same_bits(ops.block_sparse_linear(inputs[i], W), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, isa


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 2, 3)])
def test_leading_dimensions(isa: str, leading: tuple[int, ...]) -> None:
    weight = block_sparse_weight((16, 12), (4, 1), 0.6)
    bias = torch.randn(16)
    x = torch.randn(*leading, 12)
    y = call(weight, (4, 1), x, bias)
    assert y.shape == (*leading, 16)
    assert_linear(y.reshape(-1, 16), x.reshape(-1, 12), weight, bias, what=isa)
    y_numpy = call(weight, (4, 1), x.numpy(), bias.numpy())
    assert isinstance(y_numpy, np.ndarray)
    assert same_bits(torch.from_numpy(y_numpy), y)


def test_views_of_x_and_bias_are_read_as_what_they_show() -> None:
    weight = block_sparse_weight((16, 12), (4, 1), 0.6)
    W = BlockSparseMatrix.from_dense(weight, (4, 1))
    base = torch.randn(40, 24)
    bias = torch.randn(32)[::2]
    for x in (
        base[::2, ::2],
        base[:, 12:],
        base[:12].t(),
        base[0, :12].expand(7, 12),
        base.flip(0)[:, :12],
    ):
        y = ops.block_sparse_linear(x, W, bias)
        assert same_bits(y, ops.block_sparse_linear(x.clone(), W, bias.clone()))
        assert_linear(y, x, weight, bias)


def test_numpy_views_and_read_only_arrays() -> None:
    weight = block_sparse_weight((16, 12), (4, 1), 0.6)
    W = BlockSparseMatrix.from_dense(weight, (4, 1))
    base = np.random.default_rng(0).standard_normal((20, 24)).astype(np.float32)
    base.setflags(write=False)
    bias = base[0, :16]
    for x in (
        base[:, :12],
        base[::-1, ::2],
        base[:12].T,
        np.asfortranarray(base[:12].T),
    ):
        before = x.copy()
        y = ops.block_sparse_linear(x, W, bias, "relu")
        assert type(y) is np.ndarray
        assert y.dtype == np.float32
        as_torch = torch.from_numpy(before)
        expected = torch.from_numpy(bias.copy())
        assert_linear(torch.from_numpy(y), as_torch, weight, expected, "relu")
        assert np.array_equal(x, before)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_a_bsr_tensor_serves_as_the_weight() -> None:
    weight = block_sparse_weight((32, 24), (8, 4), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (8, 4))
    bsr = W.to_bsr()
    x = torch.randn(5, 24)
    assert same_bits(ops.block_sparse_linear(x, bsr), ops.block_sparse_linear(x, W))
    x_grad = x.clone().requires_grad_()
    ops.block_sparse_linear(x_grad, bsr).sum().backward()
    torch.testing.assert_close(x_grad.grad, weight.sum(0).expand(5, 24))
    y = ops.block_sparse_linear(x.numpy(), bsr)
    assert_linear(torch.from_numpy(y), x, weight)


def test_inputs_are_not_changed(isa: str) -> None:
    weight = block_sparse_weight((32, 24), (8, 1), 0.5)
    W = BlockSparseMatrix.from_dense(weight, (8, 1))
    x, bias = torch.randn(19, 24), torch.randn(32)
    copies = [t.clone() for t in (x, bias, W.values)]
    first = ops.block_sparse_linear(x, W, bias, "gelu")
    assert all(
        same_bits(a, b) for a, b in zip(copies, (x, bias, W.values), strict=True)
    ), isa
    assert same_bits(first, ops.block_sparse_linear(x, W, bias, "gelu"))


@pytest.mark.parametrize("tokens", [1, 20])
def test_default_dtype_and_device_do_not_matter(tokens: int) -> None:
    weight = block_sparse_weight((16, 12), (4, 1), 0.6)
    x = torch.randn(tokens, 12)
    expected = call(weight, (4, 1), x)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            y = call(weight, (4, 1), x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert same_bits(y, expected), dtype
    with torch.device("meta"):
        assert same_bits(call(weight, (4, 1), x), expected)


WRONG = {
    "x float64": (lambda x: {"x": x.double()}, TypeError, "x must be float32"),
    "x bfloat16": (lambda x: {"x": x.bfloat16()}, TypeError, "x must be float32"),
    "x int": (lambda x: {"x": x.int()}, TypeError, "x must be float32"),
    "x numpy float64": (
        lambda x: {"x": x.double().numpy()}, TypeError, "x must be float32",
    ),
    "x list": (lambda x: {"x": x.tolist()}, TypeError, "torch tensor or numpy array"),
    "x None": (lambda x: {"x": None}, TypeError, "torch tensor or numpy array"),  # noqa: ARG005
    "x too narrow": (lambda x: {"x": x[:, 1:]}, ValueError, "last dimension of x"),
    "x scalar": (lambda x: {"x": x[0, 0]}, ValueError, "last dimension of x"),
    "x numpy scalar": (
        lambda x: {"x": np.float32(x[0, 0])}, ValueError, "last dimension of x",
    ),
    "x numpy narrow": (
        lambda x: {"x": x.numpy()[:, 1:]}, ValueError, "last dimension of x",
    ),
    "bias shape": (lambda x: {"bias": x[0]}, ValueError, r"must be \(out,\)"),
    "bias 2d": (
        lambda x: {"bias": torch.zeros(1, 16)}, ValueError, r"must be \(out,\)",  # noqa: ARG005
    ),
    "bias scalar": (lambda x: {"bias": x[0, 0]}, ValueError, r"must be \(out,\)"),
    "bias float64": (
        lambda x: {"bias": torch.zeros(16).double()}, TypeError, "bias must be float32",  # noqa: ARG005
    ),
    "bias list": (lambda x: {"bias": [0.0] * 16}, TypeError, "bias must be"),  # noqa: ARG005
    "bias numpy": (
        lambda x: {"bias": np.zeros(16, np.float32)}, TypeError, "bias must be",  # noqa: ARG005
    ),
    "bias tensor for numpy": (
        lambda x: {"x": x.numpy(), "bias": torch.zeros(16)}, TypeError, "bias must be",
    ),
    "bias elsewhere": (
        lambda x: {"bias": torch.zeros(16, device="meta")}, ValueError, "on meta",  # noqa: ARG005
    ),
    "bias numpy shape": (
        lambda x: {"x": x.numpy(), "bias": np.zeros(4, np.float32)},
        ValueError, r"must be \(out,\)",
    ),
    "activation": (lambda x: {"activation": "tanh"}, ValueError, "activation must be"),  # noqa: ARG005
    "activation none": (
        lambda x: {"activation": "none"}, ValueError, "activation must be",  # noqa: ARG005
    ),
    "W dense": (lambda x: {"W": torch.eye(12)}, TypeError, "W must be"),  # noqa: ARG005
    "W None": (lambda x: {"W": None}, TypeError, "W must be"),  # noqa: ARG005
    "W csr": (lambda x: {"W": torch.eye(12).to_sparse_csr()}, TypeError, "W must be"),  # noqa: ARG005
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str, requires_grad: bool) -> None:
    change, error, message = WRONG[case]
    W = BlockSparseMatrix.from_dense(torch.randn(16, 12), (4, 1))
    W.values.requires_grad_(requires_grad)
    arguments: dict[str, Any] = {"x": torch.randn(3, 12), "W": W}
    arguments.update(change(arguments["x"]))
    with pytest.raises(error, match=message):
        ops.block_sparse_linear(**arguments)


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    block = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    grid = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    return {
        "shape": (block[0] * grid[0], block[1] * grid[1]),
        "block_shape": block,
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])),
        "tokens": draw(st.integers(0, 70)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@given(problem=problems())
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_problem(isa: str, problem: dict[str, Any]) -> None:
    shape, block_shape = problem["shape"], problem["block_shape"]
    weight = block_sparse_weight(
        shape, block_shape, problem["density"], problem["seed"]
    )
    generator = torch.Generator().manual_seed(problem["seed"])
    x = torch.randn(problem["tokens"], shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if problem["bias"] else None
    y = call(weight, block_shape, x, bias, problem["activation"])
    assert_linear(y, x, weight, bias, problem["activation"], f"{isa} {problem}")
