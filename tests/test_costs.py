import pytest

from pybsp import costs
from pybsp.costs import interleaved_medians, linear_cost


def test_measures_both_and_remembers(monkeypatch):
    cost = linear_cost((64, 64), (8, 1), 0.2, tokens=16)
    assert cost.dense_us > 0
    assert cost.sparse_us > 0
    assert cost.gain == cost.dense_us / cost.sparse_us
    monkeypatch.setattr(costs, "interleaved_medians", None)
    assert linear_cost((64, 64), (8, 1), 0.201, tokens=16) is cost


def test_another_density_or_thread_count_is_measured_again(monkeypatch):
    results = iter([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)])
    monkeypatch.setattr(costs, "interleaved_medians", lambda *_: next(results))
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 901)
    assert linear_cost((64, 64), (8, 1), 0.2).gain == 1.0
    assert linear_cost((64, 64), (8, 1), 0.4).gain == 2.0
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 902)
    assert linear_cost((64, 64), (8, 1), 0.4).gain == 3.0


@pytest.mark.parametrize("density", [0.0, 1e-9, 1.0])
def test_empty_nearly_empty_and_full(density):
    assert linear_cost((8, 8), (8, 8), density, tokens=1).sparse_us > 0


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
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_cost(*arguments)


def test_calls_are_timed_in_turn():
    order = []
    interleaved_medians(lambda: order.append("a"), lambda: order.append("b"), rounds=2)
    assert order == ["a", "b"] * 3
