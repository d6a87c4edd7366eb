"""Norms, reweighting, penalty, proximal step and masks against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EPS, assert_within, block_sparse_weight, same_bits

from pybsp import ops, reference
from pybsp.blocks import expand_blocks, grid_shape

GRIDS = [
    ((48, 40), (8, 1)),
    ((64, 48), (16, 4)),
    ((64, 96), (32, 32)),
    ((35, 27), (5, 3)),
    ((33, 29), (1, 1)),
    ((19, 1100), (1, 11)),
    ((12, 768), (1, 96)),
    ((6, 260), (2, 65)),
    ((9, 195), (3, 195)),
    ((31, 17), (31, 1)),
    ((13, 7), (13, 7)),
    ((24, 2100), (3, 1)),
    ((4, 2048), (4, 1024)),
    ((4, 126), (2, 63)),
    ((0, 8), (4, 1)),
    ((8, 0), (4, 1)),
]
grids = pytest.mark.parametrize(
    ("shape", "block_shape"), GRIDS, ids=lambda pair: "x".join(map(str, pair))
)


def weights(shape: tuple[int, int], block_shape: Any) -> dict[str, torch.Tensor]:
    """The same sizes in every memory layout that has contiguous rows."""
    out, inner = shape
    dense = torch.randn(out, inner)
    holes = (
        block_sparse_weight(shape, block_shape, 0.5) if out and inner else dense.clone()
    )
    wide = torch.randn(out, inner + 5)
    return {
        "dense": dense,
        "holes": holes,
        "view": wide[:, :inner],
        "offset": wide[:, 5:],
        "rows": torch.randn(2 * out, inner)[::2],
    }


def norm_bound(norms: torch.Tensor, block_shape: Any) -> torch.Tensor:
    """Half the relative error of a sum of ``r c`` squares, and the root's own."""
    return EPS * (3 + (block_shape[0] * block_shape[1]) ** 0.5) * norms + 1e-30


@grids
def test_block_norms(isa: str, shape: Any, block_shape: Any) -> None:
    for layout, weight in weights(shape, block_shape).items():
        norms = ops.block_norms(weight, block_shape)
        expected = reference.block_norms(weight.double(), block_shape)
        assert norms.dtype == torch.float32
        bound = norm_bound(expected, block_shape)
        assert_within(norms, expected, bound, f"{isa} {layout}")
    transposed = torch.randn(shape[1], shape[0]).t()
    copied = ops.block_norms(transposed.contiguous(), block_shape)
    assert same_bits(ops.block_norms(transposed, block_shape), copied)


@grids
def test_group_lasso_grad(isa: str, shape: Any, block_shape: Any) -> None:
    for layout, weight in weights(shape, block_shape).items():
        factors = torch.rand(grid_shape(shape, block_shape)) + 0.1
        store = torch.randn(shape[0], shape[1] + 3)
        outside = store[:, shape[1] :].clone()
        grad = store[:, : shape[1]]
        expected = grad.double()
        before = (grad.clone(), weight.clone())
        penalty = ops.group_lasso_grad_(grad, weight, factors, 0.37, block_shape)
        expected_penalty = reference.group_lasso_grad_(
            expected, weight.double(), factors.double(), 0.37, block_shape
        )
        assert isinstance(penalty, float)
        assert penalty == pytest.approx(expected_penalty, rel=1e-6)
        added = (expected - before[0].double()).abs()
        bound = EPS * (expected.abs() + added + before[0].abs()) + norm_bound(
            added, block_shape
        )
        assert_within(grad, expected, bound, f"{isa} {layout}")
        assert same_bits(weight, before[1])
        assert same_bits(store[:, shape[1] :], outside)
        zero = expand_blocks(
            reference.block_norms(weight, block_shape) == 0, block_shape
        )
        assert same_bits(grad[zero], before[0][zero])


@grids
def test_group_lasso_prox(isa: str, shape: Any, block_shape: Any) -> None:
    for layout, weight in weights(shape, block_shape).items():
        original = weight.clone()
        norms = reference.block_norms(original.double(), block_shape)
        thresholds = (norms * torch.rand(norms.shape) * 1.6).float()
        # Far enough from the norm for rounding not to decide whether the block stays.
        close = (thresholds / norms - 1).abs() < 1e-4
        thresholds[close] *= 0.9
        expected = original.double()
        returned = ops.group_lasso_prox_(weight, thresholds, block_shape)
        reference.group_lasso_prox_(expected, thresholds.double(), block_shape)
        assert returned is weight
        bound = 1e-5 * expected.abs() + 2 * EPS * original.double().abs() + 1e-30
        # 1 - threshold / norm cancels: the error is absolute, that of the quotient.
        scale = expand_blocks(norm_bound(norms, block_shape) / norms, block_shape)
        bound = bound + scale.nan_to_num(0) * original.double().abs() * 10
        assert_within(weight, expected, bound, f"{isa} {layout}")
        zeroed = weight[expected == 0]
        assert same_bits(zeroed, torch.zeros_like(zeroed))


def test_prox_at_the_threshold_is_exactly_zero(isa: str) -> None:
    weight = torch.tensor([[3.0, -1.0], [4.0, -0.0]])
    ops.group_lasso_prox_(weight, torch.tensor([[5.0, 0.0]]), (2, 1))
    expected = torch.tensor([[0.0, -1.0], [0.0, -0.0]])
    assert same_bits(weight, expected), isa
    weight = torch.tensor([[-3.0], [-4.0]])
    ops.group_lasso_prox_(weight, torch.tensor([[2.5]]), (2, 1))
    assert same_bits(weight, torch.tensor([[-1.5], [-2.0]]))


@grids
def test_apply_block_mask(isa: str, shape: Any, block_shape: Any) -> None:
    for layout, weight in weights(shape, block_shape).items():
        if weight.numel() > 2:
            weight[-1, -1], weight[0, 0], weight[0, -1] = -0.0, torch.nan, -torch.inf
        mask = torch.rand(grid_shape(shape, block_shape)) < 0.5
        expected = reference.apply_block_mask_(weight.clone(), mask, block_shape)
        assert ops.apply_block_mask_(weight, mask, block_shape) is weight
        assert same_bits(weight, expected), (isa, layout)
        removed = expand_blocks(~mask, block_shape)
        assert same_bits(weight[removed], torch.zeros_like(weight[removed]))


@pytest.mark.parametrize("cols", [1, 3, 100])
def test_neighbours_of_a_view_stay(isa: str, cols: int) -> None:
    store = torch.randn(12, 3 * cols)
    before = store.clone()
    view = store[4:8, cols : 2 * cols]
    mask = torch.zeros(2, 1, dtype=torch.bool)
    ops.apply_block_mask_(view, mask, (2, cols))
    ops.group_lasso_prox_(view, torch.ones(2, 1), (2, cols))
    assert not view.any()
    store[4:8, cols : 2 * cols] = before[4:8, cols : 2 * cols]
    assert same_bits(store, before), isa


def test_nan_stays_visible_and_in_its_block(isa: str) -> None:
    for block_shape in ((4, 1), (1, 8), (2, 64)):
        weight = torch.randn(8, 128)
        weight[5, 70] = torch.nan
        hit = reference.block_norms(weight, block_shape).isnan()
        assert int(hit.sum()) == 1
        assert torch.equal(ops.block_norms(weight, block_shape).isnan(), hit), isa
        grad = torch.zeros(8, 128)
        factors = torch.ones(hit.shape)
        penalty = ops.group_lasso_grad_(grad, weight, factors, 1.0, block_shape)
        assert penalty != penalty
        element = expand_blocks(hit, block_shape)
        assert grad[5, 70].isnan()
        assert grad[~element].isfinite().all()
        ops.group_lasso_prox_(weight, factors * 0.1, block_shape)
        assert torch.equal(weight.isnan(), element), (isa, block_shape)
        # A threshold that is NaN must not look like a block that was pruned.
        weight = torch.randn(8, 128)
        thresholds = torch.where(hit, torch.nan, 0.1)
        ops.group_lasso_prox_(weight, thresholds, block_shape)
        assert torch.equal(weight.isnan(), element), (isa, block_shape)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-10, 1e10, 1e17])
def test_magnitudes(isa: str, magnitude: float) -> None:
    for block_shape in ((8, 1), (1, 96), (4, 4)):
        weight = torch.randn(16, 96) * magnitude
        exact = reference.block_norms(weight.double(), block_shape)
        norms = ops.block_norms(weight, block_shape)
        assert_within(norms, exact, norm_bound(exact, block_shape), f"{isa} norms")
        grad = torch.zeros(16, 96)
        ops.group_lasso_grad_(grad, weight, torch.ones(exact.shape), 1.0, block_shape)
        unit = weight.double() / expand_blocks(exact, block_shape)
        assert_within(grad, unit, 20 * EPS * unit.abs(), f"{isa} gradient")
        ops.group_lasso_prox_(weight, (exact / 2).float(), block_shape)
        assert_within(
            weight, unit * expand_blocks(exact, block_shape) / 2,
            40 * EPS * weight.abs(), f"{isa} proximal step",
        )  # fmt: skip


def test_norms_that_overflow_do_no_harm(isa: str) -> None:
    weight = torch.tensor([[1e30, 1.0], [1e30, 1.0]])
    assert ops.block_norms(weight, (2, 1))[0, 0] == torch.inf
    grad = torch.zeros(2, 2)
    ops.group_lasso_grad_(grad, weight, torch.ones(1, 2), 1.0, (2, 1))
    assert grad.isfinite().all(), isa
    ops.group_lasso_prox_(weight, torch.ones(1, 2), (2, 1))
    assert weight[0, 0] == 1e30


def test_reweight() -> None:
    norms = torch.rand(7, 11) * 10
    norms[0, 0] = 0
    factors = ops.reweight(norms, 1e-3)
    expected = reference.reweight(norms.double(), 1e-3)
    assert factors.shape == norms.shape
    assert_within(factors, expected, 4 * EPS * expected)
    assert float(factors[0, 0]) == pytest.approx(1000)
    strided = torch.rand(6, 8)[::2, ::2]
    assert same_bits(ops.reweight(strided, 0.5), ops.reweight(strided.clone(), 0.5))
    assert ops.reweight(torch.tensor([[torch.inf, torch.nan]]), 1.0)[0, 0] == 0
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be positive"):
            ops.reweight(norms, eps)
    with pytest.raises(TypeError, match="norms must be float32"):
        ops.reweight(norms.double(), 1e-3)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 6), (2, 3, 4), (0,)])
def test_block_mask_keeps_exactly_the_largest(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape)
    for keep in range(scores.numel() + 1):
        mask = ops.block_mask(scores, keep)
        assert mask.dtype == torch.bool
        assert mask.shape == scores.shape
        assert torch.equal(mask, reference.block_mask(scores, keep))
        assert int(mask.sum()) == keep


def test_block_mask_breaks_ties_by_position() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        scores = torch.randint(0, 4, (6, 7), generator=generator).float()
        scores[0, 0], scores[0, 1], scores[5, 5] = -0.0, 0.0, torch.inf
        for keep in (0, 1, 5, 20, 41, 42):
            mask = ops.block_mask(scores, keep)
            assert torch.equal(mask, reference.block_mask(scores, keep)), keep
    mask = ops.block_mask(torch.ones(10), 4)
    assert mask.tolist() == [True] * 4 + [False] * 6
    strided = torch.rand(6, 8).t()
    assert torch.equal(ops.block_mask(strided, 9), ops.block_mask(strided.clone(), 9))
    negative = torch.tensor([-torch.inf, -3.0, -torch.inf])
    assert ops.block_mask(negative, 2).tolist() == [True, True, False]


def test_block_mask_ranks_other_types_exactly() -> None:
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert ops.block_mask(close, 1).tolist() == [False, True]
    integers = torch.tensor([2**24, 2**24 + 1])
    assert ops.block_mask(integers, 1).tolist() == [False, True]
    assert ops.block_mask(torch.tensor([1.0, 2.0]).bfloat16(), 1).tolist() == [
        False,
        True,
    ]


def test_block_mask_refuses() -> None:
    scores = torch.randn(2, 3)
    for keep in (-1, 7):
        with pytest.raises(ValueError, match="keep must lie between 0 and the 6"):
            ops.block_mask(scores, keep)
    with pytest.raises(TypeError):
        ops.block_mask(scores, 2.5)  # type: ignore[arg-type]
    scores[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ops.block_mask(scores, 3)


Call = Callable[[torch.Tensor, torch.Tensor], Any]
IN_PLACE: dict[str, Call] = {
    "group_lasso_grad_": lambda changed, other: ops.group_lasso_grad_(
        changed, other, torch.ones(2, 6), 0.1, (4, 1)
    ),
    "group_lasso_prox_": lambda changed, _: ops.group_lasso_prox_(
        changed, torch.full((2, 6), 0.1), (4, 1)
    ),
    "apply_block_mask_": lambda changed, _: ops.apply_block_mask_(
        changed, torch.zeros(2, 6, dtype=torch.bool), (4, 1)
    ),
}
in_place = pytest.mark.parametrize("name", IN_PLACE)


@in_place
def test_in_place_operations_tell_autograd(name: str) -> None:
    weight = torch.randn(8, 6, requires_grad=True)
    changed = weight * 1  # what exp() saves
    result = changed.exp().mul(changed).sum()
    version = changed._version
    with torch.no_grad():
        IN_PLACE[name](changed, torch.randn(8, 6))
    assert changed._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@in_place
def test_in_place_operations_refuse_what_requires_grad(name: str) -> None:
    leaf = torch.randn(8, 6, requires_grad=True)
    for changed in (leaf, leaf * 1):
        before = changed.detach().clone()
        with pytest.raises(ValueError, match=r"requires grad.*torch\.no_grad"):
            IN_PLACE[name](changed, torch.randn(8, 6))
        assert same_bits(changed, before)
    with torch.no_grad():
        IN_PLACE[name](leaf, torch.randn(8, 6))
    assert not same_bits(leaf, before)
    with torch.inference_mode():
        IN_PLACE[name](torch.randn(8, 6), torch.randn(8, 6))


@in_place
@pytest.mark.parametrize("dtype", ops.TRAINED_DTYPES)
def test_in_place_operations_change_any_layout(
    isa: str, name: str, dtype: torch.dtype
) -> None:
    other = torch.randn(8, 6).to(dtype)
    for changed in (
        torch.randn(6, 8).to(dtype).t(),
        torch.randn(8, 12).to(dtype)[:, ::2],
        torch.randn(12, 8).to(dtype).t()[:, 3:9],
    ):
        expected = changed.contiguous()
        IN_PLACE[name](expected, other)
        version = changed._version
        IN_PLACE[name](changed, other)
        assert same_bits(changed, expected), isa
        assert changed._version > version


@in_place
def test_in_place_operations_refuse_shared_elements(name: str) -> None:
    for changed in (torch.randn(1, 6).expand(8, 6), torch.randn(8, 1).expand(8, 6)):
        before = changed.clone()
        with pytest.raises(ValueError, match="elements share memory"):
            IN_PLACE[name](changed, torch.randn(8, 6))
        assert same_bits(changed, before)


@grids
@pytest.mark.parametrize("name", ["norms", "grad", "prox", "mask"])
def test_bfloat16_is_float32_rounded_once(
    isa: str, name: str, shape: Any, block_shape: Any
) -> None:
    for layout, values in weights(shape, block_shape).items():
        weight = torch.empty_strided(shape, values.stride(), dtype=torch.bfloat16)
        weight.copy_(values)
        wide = weight.float()
        grid = grid_shape(shape, block_shape)
        factors = torch.rand(grid) + 0.1
        grad = torch.randn(shape).bfloat16()
        wide_grad = grad.float()
        if name == "norms":
            norms = ops.block_norms(weight, block_shape)
            assert same_bits(norms, ops.block_norms(wide, block_shape)), (isa, layout)
            continue
        if name == "grad":
            penalties = {
                ops.group_lasso_grad_(grad, weight, factors, 0.37, block_shape),
                ops.group_lasso_grad_(wide_grad, wide, factors, 0.37, block_shape),
            }
            assert len(penalties) == 1
            weight, wide = grad, wide_grad
        elif name == "prox":
            for changed in (weight, wide):
                ops.group_lasso_prox_(changed, factors, block_shape, step=0.5)
        else:
            for changed in (weight, wide):
                ops.apply_block_mask_(changed, factors > 0.6, block_shape)
        assert same_bits(weight, wide.bfloat16()), (isa, layout)


def test_bfloat16_agrees_with_the_reference(isa: str) -> None:
    for block_shape in ((8, 1), (1, 48), (4, 4), (1, 3), (1, 1)):
        weight = torch.randn(16, 96).bfloat16()
        factors = torch.rand(grid_shape((16, 96), block_shape))
        grad = torch.randn(16, 96).bfloat16()
        twin, before = grad.clone(), grad.clone()
        penalty = ops.group_lasso_grad_(grad, weight, factors, 0.5, block_shape)
        other = reference.group_lasso_grad_(twin, weight, factors, 0.5, block_shape)
        assert penalty == pytest.approx(other, rel=1e-6)
        # Sums that differ by rounding in float32 may round to neighbours here.
        assert_within(grad, twin.double(), 2**-8 * (twin.abs() + before.abs()), isa)
        assert float((grad != twin).double().mean()) < 0.01
        assert not torch.equal(grad, before)
        shrunk, twin = weight.clone(), weight.clone()
        ops.group_lasso_prox_(shrunk, factors, block_shape, step=0.7)
        reference.group_lasso_prox_(twin, factors, block_shape, step=0.7)
        assert torch.equal(shrunk == 0, twin == 0)
        assert_within(shrunk, twin.double(), 2**-8 * twin.abs() + 1e-6, isa)


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_special(isa: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    weight = bits.to(torch.int16).view(torch.bfloat16).view(256, 256)
    weight = weight[weight.isfinite().all(1)].contiguous()
    scale = torch.rand(weight.shape) + 0.5
    grad = torch.zeros_like(weight)
    ops.group_lasso_grad_(grad, weight.sign(), scale, 1.0, (1, 1))
    zero = weight.sign() == 0
    assert same_bits(grad, torch.where(zero, 0.0, scale * weight.sign()).bfloat16())
    # Every value but the removed ones comes back as it was, with NaN and infinities.
    special = torch.tensor([[torch.nan, -torch.inf, -0.0, 1e-40, -1e-40, 3e38, 1, 0]])
    special = special.repeat(1, 8).bfloat16()
    kept = special.clone()
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, ::9] = False
    ops.apply_block_mask_(kept, mask, (1, 1))
    assert same_bits(kept[mask], special[mask]), isa
    assert same_bits(kept[~mask], torch.zeros_like(kept[~mask]))


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    r, c, rows, cols, gap = (
        int(torch.randint(low, high, (), generator=generator))
        for low, high in ((1, 41), (1, 41), (1, 6), (1, 120), (0, 4))
    )
    shape, block_shape = (rows * r, cols * c), (r, c)
    store = torch.randn(shape[0], shape[1] + gap, generator=generator)
    weight = store[:, : shape[1]]
    weight *= torch.rand(shape, generator=generator) < 0.9
    exact = reference.block_norms(weight.double(), block_shape)
    norms = ops.block_norms(weight, block_shape)
    assert_within(norms, exact, norm_bound(exact, block_shape), f"{isa} {shape}")
    factors = torch.rand(exact.shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    expected = grad.double()
    added = -expected.clone()
    ops.group_lasso_grad_(grad, weight, factors, 0.4, block_shape)
    reference.group_lasso_grad_(
        expected, weight.double(), factors.double(), 0.4, block_shape
    )
    added += expected
    bound = EPS * (expected.abs() + 2 * added.abs() + (expected - added).abs())
    bound = bound + norm_bound(added.abs(), block_shape)
    assert_within(grad, expected, bound, f"{isa} {shape} {block_shape}")
    mask = factors > 0.5
    masked = reference.apply_block_mask_(weight.clone(), mask, block_shape)
    outside = store[:, shape[1] :].clone()
    ops.apply_block_mask_(weight, mask, block_shape)
    assert same_bits(weight, masked)
    assert same_bits(store[:, shape[1] :], outside)


def test_the_penalty_of_a_weight_on_itself_is_a_gradient_step(isa: str) -> None:
    for block_shape in ((8, 1), (1, 96), (16, 4), (1, 1)):
        for weight in (torch.randn(16, 96), torch.randn(96, 16).t()):
            factors = torch.rand(grid_shape((16, 96), block_shape))
            expected = weight.clone(memory_format=torch.contiguous_format)
            ops.group_lasso_grad_(expected, weight.clone(), factors, -0.1, block_shape)
            ops.group_lasso_grad_(weight, weight, factors, -0.1, block_shape)
            assert same_bits(weight, expected), (isa, block_shape)


def test_the_penalty_reads_any_layout_of_its_inputs(isa: str) -> None:
    weight, factors = torch.randn(6, 8).t(), torch.rand(6, 2).t()
    expected, grad = torch.zeros(8, 6), torch.zeros(8, 6)
    ops.group_lasso_grad_(
        expected, weight.contiguous(), factors.contiguous(), 0.5, (4, 1)
    )
    ops.group_lasso_grad_(grad, weight, factors, 0.5, (4, 1))
    assert same_bits(grad, expected), isa
    grad.zero_()
    tracked = factors.clone().requires_grad_()
    ops.group_lasso_grad_(
        grad, torch.nn.Parameter(weight.clone()), tracked, 0.5, (4, 1)
    )
    assert same_bits(grad, expected)


@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_threads(isa: str) -> None:
    for block_shape in ((8, 1), (1, 96), (40, 4)):
        weight = torch.randn(40, 192)
        factors = torch.rand(grid_shape((40, 192), block_shape))
        mask = factors > 0.5
        results = []
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            grad, prox, masked = torch.ones(40, 192), weight.clone(), weight.clone()
            norms = ops.block_norms(weight, block_shape)
            penalty = ops.group_lasso_grad_(grad, weight, factors, 0.3, block_shape)
            ops.group_lasso_prox_(prox, factors, block_shape)
            ops.apply_block_mask_(masked, mask, block_shape)
            results.append((norms, grad, prox, masked, torch.tensor([penalty])))
            assert torch.get_num_threads() == number
        for other in results[1:]:
            pairs = zip(results[0], other, strict=True)
            assert all(same_bits(a, b) for a, b in pairs), (isa, block_shape)


def test_default_dtype_and_device_do_not_matter() -> None:
    weight = torch.randn(8, 6)
    expected = ops.block_norms(weight, (4, 1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        norms, mask = ops.block_norms(weight, (4, 1)), ops.block_mask(expected, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(norms, expected)
    with torch.device("meta"):
        assert same_bits(ops.block_norms(weight, (4, 1)), expected)
        assert torch.equal(ops.block_mask(expected, 3), mask)
        assert same_bits(ops.reweight(expected, 0.1), 1 / (expected + 0.1))


WEIGHT = torch.ones(8, 6)
PER_BLOCK = torch.ones(2, 6)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "norms float64": (
        lambda: ops.block_norms(WEIGHT.double(), (4, 1)), TypeError, "must be float32",
    ),
    "norms float16": (
        lambda: ops.block_norms(WEIGHT.half(), (4, 1)),
        TypeError, "must be float32 or bfloat16; got torch.float16",
    ),
    "grad bfloat16": (
        lambda: ops.group_lasso_grad_(
            WEIGHT.bfloat16(), WEIGHT, PER_BLOCK, 0.1, (4, 1)
        ), TypeError, "grad must be float32; got torch.bfloat16",
    ),
    "prox float64": (
        lambda: ops.group_lasso_prox_(WEIGHT.double(), PER_BLOCK, (4, 1)),
        TypeError, "must be float32 or bfloat16",
    ),
    "masked float16": (
        lambda: ops.apply_block_mask_(WEIGHT.half(), PER_BLOCK > 0, (4, 1)),
        TypeError, "must be float32 or bfloat16",
    ),
    "norms 1d": (
        lambda: ops.block_norms(WEIGHT[0], (1, 1)), ValueError, "two dimensions",
    ),
    "norms 3d": (
        lambda: ops.block_norms(WEIGHT[None], (1, 1)), ValueError, "two dimensions",
    ),
    "norms list": (
        lambda: ops.block_norms([[1.0]], (1, 1)), TypeError, "torch tensor",  # type: ignore[arg-type]
    ),
    "norms do not divide": (
        lambda: ops.block_norms(WEIGHT, (3, 1)), ValueError, "does not divide",
    ),
    "norms zero block": (
        lambda: ops.block_norms(WEIGHT, (0, 1)), ValueError, "positive integers",
    ),
    "norms negative block": (
        lambda: ops.block_norms(WEIGHT, (-4, 1)), ValueError, "positive integers",
    ),
    "norms fraction": (
        lambda: ops.block_norms(WEIGHT, (1, "in/2")), ValueError, "two integers",  # type: ignore[arg-type]
    ),
    "grad shape": (
        lambda: ops.group_lasso_grad_(
            torch.zeros(6, 8), WEIGHT, PER_BLOCK, 0.1, (4, 1)
        ), ValueError, "they must be equal",
    ),
    "grad float64": (
        lambda: ops.group_lasso_grad_(
            WEIGHT.double(), WEIGHT, PER_BLOCK, 0.1, (4, 1)
        ), TypeError, "grad must be float32",
    ),
    "factors shape": (
        lambda: ops.group_lasso_grad_(
            WEIGHT.clone(), WEIGHT, PER_BLOCK.t(), 0.1, (4, 1)
        ), ValueError, "factors needs one entry for each block",
    ),
    "thresholds shape": (
        lambda: ops.group_lasso_prox_(WEIGHT.clone(), PER_BLOCK[0], (4, 1)),
        ValueError, "thresholds needs one entry for each block",
    ),
    "mask shape": (
        lambda: ops.apply_block_mask_(WEIGHT.clone(), PER_BLOCK[:1] > 0, (4, 1)),
        ValueError, "mask needs one entry for each block",
    ),
    "mask not bool": (
        lambda: ops.apply_block_mask_(WEIGHT.clone(), PER_BLOCK, (4, 1)),
        TypeError, "mask must be bool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_named(case: str) -> None:
    function, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function()
    assert same_bits(WEIGHT, torch.ones(8, 6))
