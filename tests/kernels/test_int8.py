"""The int8 product is bit by bit its definition in ``pybsp.reference``."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ACTIVATIONS,
    EPS,
    GRIDS,
    SMALLEST,
    assert_within,
    block_sparse_weight,
    same_bits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybsp import BlockSparseMatrix, ops, reference
from pybsp.blocks import grid_shape

ALL_GRIDS = [*GRIDS, ((70, 1), (7, 1)), ((26, 1200), (13, 4))]


def int8_matrix(
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    density: float,
    seed: int = 0,
    extreme: bool = False,
) -> BlockSparseMatrix:
    """Any bytes, -128 too, and scales of which some are zero; ``extreme``: nothing but
    -128 and 127."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(grid_shape(shape, block_shape), generator=generator) < density
    pattern = BlockSparseMatrix.from_mask(torch.zeros(shape), mask, block_shape)
    size = pattern.values.shape
    values = torch.randint(-128, 128, size, generator=generator)
    if extreme:
        values = torch.where(values < 0, -128, 127)
    scales = torch.rand(shape[0], generator=generator) * 0.1
    scales[torch.rand(shape[0], generator=generator) < 0.1] = 0
    fields = (pattern.crow_indices, pattern.col_indices, values.to(torch.int8))
    return BlockSparseMatrix(*fields, shape, scales)


def expected(
    x: torch.Tensor,
    W: BlockSparseMatrix,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    input_scale: float = 0.0,
) -> torch.Tensor:
    assert W.scales is not None
    y = reference.block_sparse_linear_int8(
        x, W.crow_indices, W.col_indices, W.values, W.scales, W.shape, bias,
        activation, input_scale,
    )  # fmt: skip
    return y if residual is None else y + residual


def assert_int8(
    x: torch.Tensor,
    W: BlockSparseMatrix,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    input_scale: float = 0.0,
    what: str = "",
) -> None:
    """Equal bits, but for the formulas of smooth activations."""
    found = ops.block_sparse_linear(
        x, W, bias, activation, residual, input_scale=input_scale
    )
    exact = expected(x, W, bias, activation, residual, input_scale)
    if activation in (None, "relu"):
        # NaN has many bits.
        both = found.isnan() & exact.isnan()
        found, exact = found.masked_fill(both, 0), exact.masked_fill(both, 0)
        if activation == "relu":  # of -0 it is either zero
            found, exact = (y.masked_fill(y == 0, 0) for y in (found, exact))
        assert same_bits(found, exact), what
        return
    plain = expected(x, W, bias, None, None, input_scale)
    wide = reference.ACTIVATIONS[activation](plain.double())
    if residual is not None:
        wide = wide + residual.double()
    assert_within(found, wide, 16 * EPS * (wide.abs() + plain.abs()) + SMALLEST, what)


@pytest.mark.parametrize(
    ("shape", "block_shape"), ALL_GRIDS, ids=lambda pair: "x".join(map(str, pair))
)
def test_equals_the_reference(isa: str, shape: Any, block_shape: Any) -> None:
    out_features, in_features = shape
    bias = torch.randn(out_features)
    for density in (0.0, 0.05, 0.4, 1.0):
        W = int8_matrix(shape, block_shape, density)
        for tokens in (0, 1, 2, 3, 4, 7, 16, 17, 33, 49, 100):
            x = torch.randn(tokens, in_features)
            what = f"{isa} density {density} tokens {tokens}"
            residual = torch.randn(tokens, out_features)
            assert_int8(x, W, what=what)
            assert_int8(x, W, bias, "relu", residual, what=what)
            assert_int8(x, W, bias, None, residual, 0.013, what)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("input_scale", [0.0, 0.02])
def test_activations_are_fused(
    isa: str, activation: str | None, input_scale: float
) -> None:
    for block_shape in ((8, 1), (4, 4), (1, 12)):
        W = int8_matrix((72, 48), block_shape, 0.4)
        bias = torch.randn(72)
        for tokens in (1, 5, 40):
            x, residual = torch.randn(tokens, 48), torch.randn(tokens, 72)
            for b, r in ((None, None), (bias, None), (bias, residual)):
                what = f"{isa} {block_shape} tokens {tokens}"
                assert_int8(x, W, b, activation, r, input_scale, what)


@pytest.mark.parametrize("block_shape", [(8, 1), (16, 4), (1, 4), (1, 1), (5, 3)])
def test_extreme_bytes_do_not_saturate(isa: str, block_shape: Any) -> None:
    shape = (40, 120) if block_shape == (5, 3) else (64, 128)
    W = int8_matrix(shape, block_shape, 1.0, extreme=True)
    for sign in (1.0, -1.0):
        # All inputs are 127 or -127 after rounding.
        x = torch.full((19, shape[1]), sign * 3.5)
        x[1::2, ::3] *= -1
        assert_int8(x, W, what=f"{isa} dynamic")
        assert_int8(x, W, input_scale=1e-3, what=f"{isa} static, beyond its range")


def test_the_largest_sums_are_exact(isa: str) -> None:
    features = 65536
    values = torch.full((1, 8, features), -128, dtype=torch.int8)
    index = torch.tensor([0, 1]), torch.tensor([0])
    for block in ((8, features), (8, 4)):
        if block[1] == 4:
            values = torch.full((features // 4, 8, 4), -128, dtype=torch.int8)
            index = torch.tensor([0, features // 4]), torch.arange(features // 4)
        W = BlockSparseMatrix(*index, values, (8, features), torch.ones(8))
        x = torch.full((3, features), 127.0)
        x[1] = -127.0
        assert_int8(x, W, what=isa)
        y = ops.block_sparse_linear(x, W)
        assert y[0, 0] == -128.0 * 127 * features
        assert y[1, 0] == 128.0 * 127 * features


def test_more_inputs_than_are_exact_are_refused() -> None:
    values = torch.ones(1, 1, 65540, dtype=torch.int8)
    with pytest.raises(ValueError, match="65536 inputs"):
        BlockSparseMatrix(
            torch.tensor([0, 1]), torch.tensor([0]), values, (1, 65540), torch.ones(1)
        )


@pytest.mark.parametrize("block_shape", [(8, 1), (8, 4)], ids=str)
def test_tokens_do_not_see_each_other(isa: str, block_shape: Any) -> None:
    W = int8_matrix((32, 48), block_shape, 0.5)
    x = torch.randn(37, 48)
    x[3] = 0  # has no scale
    x[4] *= 1e4  # hot
    x[5] *= 1e-35  # too small for one
    x[6] = x[6].clamp(max=2.0**-101)
    x[7, 0] = 1e30  # one hot feature: the others become zero
    clean = ops.block_sparse_linear(x, W)
    assert_int8(x, W, what=isa)
    assert not clean[3].any()
    for token in range(37):
        alone = ops.block_sparse_linear(x[token : token + 1], W)
        assert same_bits(clean[token : token + 1], alone), token


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("input_scale", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [1, 3, 20, 53])
def test_what_is_not_finite_reaches_its_token_alone(
    isa: str, special: float, input_scale: float, tokens: int
) -> None:
    for block_shape in ((8, 1), (1, 8), (4, 4)):
        W = int8_matrix((32, 32), block_shape, 0.3)
        x = torch.randn(tokens, 32)
        clean = ops.block_sparse_linear(x, W, input_scale=input_scale)
        x[tokens - 1, 29] = special
        y = ops.block_sparse_linear(x, W, input_scale=input_scale)
        assert y[-1].isnan().all(), (isa, block_shape)
        assert same_bits(y[:-1], clean[:-1]), (isa, block_shape)


def test_rounding_is_to_even(isa: str) -> None:
    x = torch.arange(-10, 11, dtype=torch.float32)[None] / 2
    W = BlockSparseMatrix.from_dense(torch.eye(21), (1, 1)).quantize(clip="max")
    y = ops.block_sparse_linear(x, W, input_scale=1.0)
    assert torch.equal(y, x.round()), isa


@pytest.mark.parametrize("tokens", [1, 6, 45, 200])
@pytest.mark.parametrize("block_shape", [(8, 1), (1, 16), (16, 4)], ids=str)
@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_threads(
    isa: str, tokens: int, block_shape: Any
) -> None:
    W = int8_matrix((512, 256), block_shape, 0.3)
    x, bias = torch.randn(tokens, 256), torch.randn(512)
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        results.append(ops.block_sparse_linear(x, W, bias, "silu"))
    assert all(same_bits(results[0], y) for y in results[1:]), isa


def test_all_instruction_sets_give_the_same_bits(isa: str) -> None:
    W = int8_matrix((256, 192), (8, 1), 0.2)
    x, bias = torch.randn(70, 192), torch.randn(256)
    assert_int8(x, W, bias, what=isa)


@pytest.mark.usefixtures("threads")
def test_python_threads_may_call_at_once(isa: str) -> None:
    torch.set_num_threads(2)
    W = int8_matrix((256, 256), (8, 1), 0.5)
    inputs = [torch.randn(20 + i, 256) for i in range(6)]
    results = [ops.block_sparse_linear(x, W) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not same_bits(ops.block_sparse_linear(inputs[i], W), results[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, isa


def test_a_large_layer_takes_several_groups_of_tiles(isa: str) -> None:
    for block_shape in ((8, 1), (8, 4)):
        W = int8_matrix((64, 3072), block_shape, 0.1)
        x, bias = torch.randn(300, 3072), torch.randn(64)
        assert_int8(x, W, bias, what=isa)


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    block = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    grid = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    return {
        "shape": (block[0] * grid[0], block[1] * grid[1]),
        "block_shape": block,
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])),
        "tokens": draw(st.integers(0, 70)),
        "activation": draw(st.sampled_from([None, "relu", "gelu"])),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "input_scale": draw(st.sampled_from([0.0, 1e-3, 0.03, 1e4])),
        "extreme": draw(st.booleans()),
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
    shape, seed = problem["shape"], problem["seed"]
    W = int8_matrix(
        shape, problem["block_shape"], problem["density"], seed, problem["extreme"]
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(problem["tokens"], shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if problem["bias"] else None
    size = (problem["tokens"], shape[0])
    residual = torch.randn(size, generator=generator) if problem["residual"] else None
    assert_int8(
        x, W, bias, problem["activation"], residual, problem["input_scale"],
        f"{isa} {problem}",
    )  # fmt: skip


def test_numpy_and_leading_dimensions(isa: str) -> None:
    W = int8_matrix((16, 12), (4, 1), 0.6)
    bias = torch.randn(16)
    for leading in ((), (0,), (5,), (2, 3), (2, 0, 3)):
        x, residual = torch.randn(*leading, 12), torch.randn(*leading, 16)
        y = ops.block_sparse_linear(x, W, bias, "gelu", residual, input_scale=0.02)
        assert y.shape == (*leading, 16)
        found = ops.block_sparse_linear(
            x.numpy(), W, bias.numpy(), "gelu", residual.numpy(), input_scale=0.02
        )
        assert isinstance(found, np.ndarray)
        assert same_bits(torch.from_numpy(found), y), isa


def test_int8_is_near_the_float32_product() -> None:
    weight = block_sparse_weight((64, 128), (8, 1), 0.4)
    W = BlockSparseMatrix.from_dense(weight, (8, 1))
    x = torch.randn(33, 128)
    exact = x.double() @ weight.double().t()
    found = ops.block_sparse_linear(x, W.quantize(clip="max")).double()
    # Each weight and each input errs by half a step, 1/254 of the largest of its row.
    steps = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1) / 254
    kept = (weight != 0).double()
    bound = steps[0] * weight.abs().sum(1) + x.abs().double() @ kept.t() * steps[1]
    bound = bound + steps[0] * steps[1] * kept.sum(1)
    assert_within(found, exact, 1.0001 * bound)
