"""The cost model on synthetic times, its cache, and one real fit."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pybsp import costs, ops
from pybsp.costs import (
    Call,
    Cost,
    CostModel,
    Fit,
    Machine,
    cache,
    expected_cost,
    fit,
    linear_cost,
    measurement,
    model,
)
from pybsp.costs import linear as costs_linear
from pybsp.costs.terms import (
    dense_terms,
    few_tokens,
    portions,
    sparse_terms,
    spread,
    steps,
    tile_widths,
)

MACHINE = Machine(lanes=8, max_vectors=3)


def synthetic_sparse() -> list[tuple[dict[str, float], float]]:
    """The calls of a real fit with times from known coefficients."""
    draw = random.Random(1)
    true: dict[str, float] = {}
    rows = []
    for call in measurement.sparse_calls(MACHINE):
        terms = sparse_terms(call, MACHINE)
        for name, amount in terms.items():
            # Every term is a like part of a typical call.
            true.setdefault(name, draw.uniform(0.5, 1) / max(amount, 1.0))
        rows.append((terms, sum(true[name] * a for name, a in terms.items())))
    return rows


def test_a_fit_recovers_the_times_it_was_not_given() -> None:
    rows = synthetic_sparse()
    given, held_out = rows[::2] + rows[1::4], rows[3::4]
    found = fit([terms for terms, _ in given], [time for _, time in given])
    errors = sorted(abs(found.predict(terms) / time - 1) for terms, time in held_out)
    assert errors[len(errors) // 2] < 0.02
    assert errors[9 * len(errors) // 10] < 0.1
    assert found.error < 0.1


def test_a_fit_recovers_coefficients() -> None:
    true = {"call": 5.0, "in": 0.25, "weights": 0.01}
    draw = random.Random(0)
    terms = [
        {"call": 1, "in": draw.randint(1, 99), "weights": draw.randint(1, 9999)}
        for _ in range(40)
    ]
    times = [sum(true[name] * amount for name, amount in t.items()) for t in terms]
    found = fit(terms, times).coefficients
    assert found == pytest.approx(true, rel=0.02)


def test_a_disturbed_measurement_changes_little() -> None:
    terms = [{"call": 1.0, "weights": 10.0 * i} for i in range(1, 50)]
    times = [2 + 10.0 * i for i in range(1, 50)]
    times[20] *= 8
    found = fit(terms, times)
    assert found.predict({"call": 1.0, "weights": 100.0}) == pytest.approx(
        102, rel=0.03
    )


def test_problems_without_a_common_term_are_solved_apart() -> None:
    found = fit([{"a": 1.0}, {"b": 2.0}, {"a": 2.0}], [3.0, 8.0, 6.0])
    assert found.coefficients == pytest.approx({"a": 3.0, "b": 4.0}, rel=1e-4)


def test_parts_of_terms_add_up() -> None:
    for value in (1.0, 4.0, 5.0, 63.0, 1e9):
        assert sum(spread("", 3.0, value, (4, 16, 64)).values()) == pytest.approx(3.0)
        assert sum(portions("", 2.0, value, (4, 16)).values()) == value / 2
    assert steps("", 2.0, 4.0, (4, 16)) == {"": 2.0}
    assert steps("", 2.0, 8.0, (4, 16)) == pytest.approx({"": 2.0, "16": 1.0})


@pytest.fixture(scope="module")
def synthetic() -> CostModel:
    rows = synthetic_sparse()
    sparse = fit([terms for terms, _ in rows], [time for _, time in rows])
    calls = measurement.dense_calls()
    times = [1 + 1e-5 * call.tokens * call.weights for call in calls]
    dense = fit([dense_terms(call) for call in calls], times)
    return CostModel(sparse, dense, MACHINE)


@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (32, 32), (1, 64), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 24, 40, 200])
def test_more_blocks_never_take_less_time(
    synthetic: CostModel, block_shape: tuple[int, int], tokens: int
) -> None:
    times = [
        synthetic.predict_sparse(tokens, (768, 1024), block_shape, density / 40)
        for density in range(41)
    ]
    assert times == sorted(times)
    assert times[-1] > times[0] > 0


def test_more_tokens_never_take_less_time(synthetic: CostModel) -> None:
    """From whole tiles on: which way fewer tokens go is the kernel's choice."""
    whole = MACHINE.lanes * MACHINE.max_vectors
    for rest in range(1, whole + 1, 5):
        times = [
            synthetic.predict_sparse(whole * tiles + rest, (768, 1024), (8, 1), 0.2)
            for tiles in range(1, 20)
        ]
        assert times == sorted(times)
    dense = [synthetic.predict_dense(tokens, (768, 768)) for tokens in range(1, 700)]
    assert dense == sorted(dense)


def test_dense_times_are_straight_lines_between_measured_tokens() -> None:
    found = Fit({"dense96.call": 10.0, "dense128.call": 20.0, "dense512.call": 80.0}, 0)
    model = CostModel(Fit({}, 0), found, MACHINE)
    assert model.predict_dense(96, (64, 64)) == 10.0
    assert model.predict_dense(104, (64, 64)) == pytest.approx(12.5)
    assert model.predict_dense(1024, (64, 64)) == 160.0


def test_tokens_are_taken_as_the_kernels_take_them() -> None:
    """Few: the rest of a vector, up to half of it and four. Tiles of similar width."""
    assert [few_tokens(tokens, 16) for tokens in (4, 5, 16, 17, 37, 96)] == [
        4, 0, 0, 1, 0, 0,
    ]  # fmt: skip
    assert [few_tokens(tokens, 4) for tokens in (2, 3, 6)] == [2, 0, 2]
    assert [few_tokens(tokens, 16, (1, 8)) for tokens in (2, 3, 18)] == [2, 0, 2]
    assert [tile_widths(vectors, 3) for vectors in (1, 3, 4, 5, 7, 8)] == [
        {1: 1}, {3: 1}, {2: 2}, {3: 1, 2: 1}, {3: 1, 2: 2}, {3: 2, 2: 1},
    ]  # fmt: skip


def test_terms_of_a_rest_are_those_of_few_tokens_alone() -> None:
    layer = (768, 1024), (8, 1), 0.2
    both, tiles, few = (
        sparse_terms(Call.sparse(tokens, *layer), MACHINE) for tokens in (27, 24, 3)
    )
    assert few.pop("few.call") == 1
    assert both == tiles | few


def small_model(sparse_error: float = 0.1) -> CostModel:
    """Dense: 1 us a token. Sparse: 64 us of 64 tokens at density 1."""
    machine = measurement.this_machine()
    dense = Fit({f"dense{at}.call": float(at) for at in (1, 48, 64, 80, 512)}, 0.0)
    call = Call.sparse(64, (64, 64), (8, 1), 1.0)
    strips = {
        name: amount
        for name, amount in sparse_terms(call, machine).items()
        if "strip" in name and amount
    }
    each = 64 / sum(strips.values())
    return CostModel(Fit(dict.fromkeys(strips, each), sparse_error), dense, machine)


def test_expected_cost_measures_only_what_is_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CostModel, "load_or_fit", lambda: small_model())
    monkeypatch.setattr(costs_linear, "linear_cost", lambda *_: Cost(1.0, 3.0))

    def gain(density: float, threshold: float) -> float:
        return expected_cost((64, 64), (8, 1), density, 64, threshold).gain

    assert gain(0.25, 1.0) == pytest.approx(4.0)
    assert gain(1.0, 1.5) == pytest.approx(1.0)
    assert gain(1.0, 1.0) == 1 / 3
    assert gain(0.25, 4.2) == 1 / 3
    assert not expected_cost((64, 64), (8, 1), 0.25, 64).measured


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache folder of the test's own, and a list of the fits made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_models", {})
    fits: list[CostModel] = []

    def count() -> CostModel:
        fits.append(small_model())
        return fits[-1]

    monkeypatch.setattr(CostModel, "fit", count)
    return fits


def next_process(monkeypatch: pytest.MonkeyPatch) -> CostModel:
    monkeypatch.setattr(model, "_models", {})
    return CostModel.load_or_fit()


def test_a_model_is_measured_once_and_kept(
    empty_cache: list[CostModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = CostModel.load_or_fit()
    assert CostModel.load_or_fit() is first
    assert next_process(monkeypatch) == first
    assert len(empty_cache) == 1
    files = list(tmp_path.rglob("*"))
    assert costs.cache_file() in files
    assert [file.name for file in files if file.is_file()] == [costs.cache_file().name]
    assert costs.cache_file().parent == tmp_path / "pybsp"


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda text: text.replace('"isa"', '"other"'),
        lambda text: text.replace('"sparse"', '"nothing"'),
        lambda text: json.dumps({**json.loads(text), "model": None}),
        lambda text: text.replace('"error": 0.1', '"error": NaN'),
        lambda text: text.replace('"error": 0.1', '"error": -1'),
        lambda text: text.replace('"lanes": ', '"lanes": 7'),
        lambda text: text.replace('"lanes": ', '"strips": '),
        lambda text: text.replace('"l2_bytes": ', '"l2_bytes": 7'),
        lambda _: "\x00\xff",
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(
    empty_cache: list[CostModel], monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    first = CostModel.load_or_fit()
    file = costs.cache_file()
    text = file.read_text()
    damaged = damage(text)
    assert damaged != text
    file.write_text(damaged, encoding="latin-1")
    assert next_process(monkeypatch) == first
    assert len(empty_cache) == 2
    assert file.read_text() == text


@pytest.mark.usefixtures("threads")
def test_another_cpu_build_or_thread_count_is_another_model(
    empty_cache: list[CostModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    CostModel.load_or_fit()
    torch.set_num_threads(torch.get_num_threads() + 1)
    CostModel.load_or_fit()
    assert len(empty_cache) == 2
    for name in ("cpu_name", "build_id"):
        monkeypatch.setattr(ops, name, lambda name=name: f"another {name}")
        CostModel.load_or_fit()
    assert len(empty_cache) == 4
    # A file under this name that is of another CPU.
    file = costs.cache_file()
    content = json.loads(file.read_text())
    content["key"]["cpu"] = "a third"
    file.write_text(json.dumps(content))
    next_process(monkeypatch)
    assert len(empty_cache) == 5


@pytest.mark.usefixtures("empty_cache")
def test_each_instruction_set_has_its_own_model(isa: str) -> None:
    assert cache.cache_key()["isa"] == isa
    assert CostModel.load_or_fit().machine.lanes == ops.token_tile()[0]


def test_a_folder_that_cannot_be_written_to_is_a_warning(
    empty_cache: list[CostModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="XDG_CACHE_HOME"):
        CostModel.load_or_fit()
    CostModel.load_or_fit()
    assert len(empty_cache) == 1


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert costs.cache_file().parent == Path("/home/somebody/.cache/pybsp")


def test_processes_may_write_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = (
        "import sys, torch; from pybsp.costs import cache;"
        "torch.set_num_threads(int(sys.argv[2]));"  # a part of the key
        "model = {'number': int(sys.argv[1]), 'padding': 'x' * 20_000};"
        "[cache.write(model) for _ in range(200)]"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), str(torch.get_num_threads())]
        )
        for number in range(2)
    ]
    seen = set()
    while any(process.poll() is None for process in processes):
        found = cache.read()
        seen.add(None if found is None else len(found["padding"]))
    assert [process.wait() for process in processes] == [0, 0]
    assert seen == {None, 20_000}
    assert cache.read()["number"] in range(2)
    assert len(list((tmp_path / "pybsp").iterdir())) == 1


def test_a_real_fit_predicts_for_all_kinds_of_layers() -> None:
    found = CostModel.load_or_fit()
    assert 0 < found.error < math.inf
    for block_shape in ((8, 1), (4, 4), (1, 39), (24, 24), (312, 312), (1, 1)):
        for tokens in (1, 7, 33, 128, 1000):
            cost = found.predict(tokens, (312, 312), block_shape, 0.3)
            assert cost.sparse_us > 0
            assert cost.dense_us > 0
            assert not cost.measured
    assert found.predict_sparse(128, (64, 64), (8, 1), 0.0) > 0


def test_linear_cost_measures_both_and_remembers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = linear_cost((64, 64), (8, 1), 0.2, tokens=16)
    assert cost.measured
    assert cost.dense_us > 0
    assert cost.sparse_us > 0
    assert cost.gain == cost.dense_us / cost.sparse_us
    monkeypatch.setattr(costs_linear, "best_times", None)
    assert linear_cost((64, 64), (8, 1), 0.201, tokens=16) is cost


def test_another_density_or_thread_count_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = iter([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)])
    monkeypatch.setattr(costs_linear, "best_times", lambda *_, **__: next(results))
    monkeypatch.setattr(costs_linear.torch, "get_num_threads", lambda: 901)
    assert linear_cost((64, 64), (8, 1), 0.2).gain == 1.0
    assert linear_cost((64, 64), (8, 1), 0.4).gain == 2.0
    monkeypatch.setattr(costs_linear.torch, "get_num_threads", lambda: 902)
    assert linear_cost((64, 64), (8, 1), 0.4).gain == 3.0


@pytest.mark.parametrize("density", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_empty_nearly_empty_and_full(density: float, activation: str | None) -> None:
    assert linear_cost((8, 8), (8, 8), density, 1, activation).sparse_us > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 8), (3, 1), 0.5), "does not divide"),
        (((8, 8), (8, 1), 1.5), "density"),
        (((8, 8), (8, 1), float("nan")), "density"),
        (((8, 8), (8, 1), 0.5, 0), "tokens"),
        (((8, 8), (8, 1), 0.5, 1, "tanh"), "activation"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cost(*arguments)


def test_predictions_refuse_the_same(synthetic: CostModel) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        synthetic.predict(1, (8, 8), (3, 1), 0.5)
    with pytest.raises(ValueError, match="tokens"):
        synthetic.predict_dense(0, (8, 8))


def test_calls_are_timed_in_turn_and_the_best_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(measurement.time, "perf_counter_ns", lambda: next(clock))
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert measurement.best_times(calls, sweeps=2) == [1.0, 1.0]
    first, second = ["a"] * 4, ["b"] * 4
    assert order in (2 * (first + second), 2 * (second + first))


@pytest.mark.parametrize(
    ("shape", "block_shape", "blocks"),
    [
        ((64, 64), (8, 1), 100),
        ((64, 64), (8, 8), 0),
        ((512, 512), (1, 1), 40_000),
        ((256, 256), (1, 1), 65_536),
        ((256, 256), (1, 1), 3),
    ],
)
def test_measured_layers_have_exactly_their_blocks(
    shape: tuple[int, int], block_shape: tuple[int, int], blocks: int
) -> None:
    layers = measurement.Layers()
    matrix = layers._matrix(Call(1, shape, block_shape, blocks))
    assert matrix.nnz == blocks
    assert matrix.shape == shape
    assert matrix.block_shape == block_shape


@pytest.mark.parametrize(("lanes", "max_vectors"), [(4, 3), (8, 3), (16, 3), (16, 2)])
def test_every_term_is_measured_often_enough(lanes: int, max_vectors: int) -> None:
    seen: dict[str, int] = {}
    machine = Machine(lanes, max_vectors)
    for call in measurement.sparse_calls(machine):
        for name, amount in sparse_terms(call, machine).items():
            seen[name] = seen.get(name, 0) + (amount > 0)
    for tokens in range(1, 40 * lanes):
        for block_shape in ((8, 1), (16, 4), (1, 96)):
            call = Call.sparse(tokens, (768, 768), block_shape, 0.2)
            for name, amount in sparse_terms(call, machine).items():
                assert amount == 0 or seen.get(name, 0) >= 2, (name, tokens)
