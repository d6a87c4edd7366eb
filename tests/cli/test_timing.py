import pytest
import torch

from pybsp.cli import timing


def test_candidates_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.interleaved(calls, seconds=0.0, min_rounds=5)
    assert order == ["a", "b"] * 7  # two rounds of warm-up
    assert found["a"].rounds == 5


def test_statistics(monkeypatch):
    clock = iter([0.0, 2.0] + [t for i in range(10) for t in (i, i + (i + 1) / 1e3)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    found = timing.interleaved({"a": lambda: None}, seconds=0.1, min_rounds=10)["a"]
    assert found.best == pytest.approx(1.0)
    assert found.median == pytest.approx(5.5)
    assert found.p95 == pytest.approx(9.55)


def test_speedup_is_the_ratio_of_slow_to_fast():
    slow = timing.Timing(median=6.0, best=4.0, p95=9.0, rounds=3)
    fast = timing.Timing(median=2.0, best=2.0, p95=3.0, rounds=3)
    both = {"dense": slow, "packed": fast}
    assert timing.speedup(both, "dense", "packed") == {"median": 3.0, "best": 2.0}


def test_thread_count_is_restored_after_an_error():
    before = torch.get_num_threads()
    inside = []

    def fail():
        with timing.torch_threads(before + 1):
            inside.append(torch.get_num_threads())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before
