"""``pybsp glue``: which runs it does, in which order, and what it says of them."""

import json
import sys
import time

import pytest

from pybsp.cli import study
from pybsp.cli.glue import summary_table
from pybsp.cli.study import ABLATIONS, VARIANTS, Cell, Runner, Summary, cells

from .conftest import write_sst2

QUICK = (
    "--", "--epochs-dense", "1", "--epochs", "1", "--lr", "1e-3", "--seconds", "0.1",
    "--max-train-samples", "32",
)  # fmt: skip


@pytest.fixture
def arguments(model, data, tmp_path):
    return [
        "glue", "--model", model, "--data", data, "--out", tmp_path / "out",
        "--tasks", "sst2", "--json",
    ]  # fmt: skip


def test_runs_share_a_dense_model_and_are_not_repeated(cli, arguments, tmp_path):
    both = [*arguments, "--variants", "reconstruct", "no-penalty", *QUICK]
    run = cli(*both)
    assert run.status == 0, run.stderr
    assert [s["variant"] for s in run.data["settings"]] == ["reconstruct", "no-penalty"]
    files = sorted((tmp_path / "out" / "results").iterdir())
    names = ["sst2-no-penalty-80-8x1-seed0", "sst2-reconstruct-80-8x1-seed0"]
    assert [file.stem for file in files] == names
    found = [json.loads(file.read_text()) for file in files]
    assert found[0]["scores"]["dense"] == found[1]["scores"]["dense"]
    assert found[0]["config"]["method"] == "magnitude"
    assert found[0]["config"]["ramp"] == "cubic"
    assert str(tmp_path) not in files[0].read_text()
    assert [p.name for p in (tmp_path / "out" / "dense").iterdir()] == ["sst2-seed0"]
    started = time.perf_counter()
    again = cli(*both)
    assert again.data == run.data
    assert time.perf_counter() - started < 5
    assert "1/" not in again.stderr
    refused = cli(*both, "--epochs", "2")
    assert refused.status == 2
    assert "epochs" in refused.stderr


def test_list_does_nothing(cli, arguments, tmp_path):
    run = cli(*arguments, "--sparsities", "0.8", "0.5", "--seeds", "0", "1", "--list")
    assert [row["name"] for row in run.data["runs"]] == [
        "sst2-reconstruct-80-8x1-seed0", "sst2-reconstruct-50-8x1-seed0",
        "sst2-reconstruct-80-8x1-seed1", "sst2-reconstruct-50-8x1-seed1",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_takes_no_other_along(cli, model, tmp_path):
    write_sst2(tmp_path / "d")
    run = cli(
        "glue", "--model", model, "--data", tmp_path / "d", "--out", tmp_path / "out",
        "--tasks", "mrpc", "sst2", "--json", *QUICK,
    )  # fmt: skip
    assert run.status == 1
    assert run.data["failed"] == ["mrpc-reconstruct-80-8x1-seed0"]
    assert list(run.data["settings"][0]["tasks"]) == ["sst2"]
    log = tmp_path / "out" / "logs" / "mrpc-reconstruct-80-8x1-seed0.log"
    assert "mrpc/train.tsv does not exist" in log.read_text()


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ("unknown task 'sst9'", ["--tasks", "sst9"]),
        ("leave --variants", ["--ablation", "penalty", "--variants", "paper"]),
        ("invalid choice", ["--ablation", "magic"]),
        ("a block shape is two extents", ["--block-shapes", "8"]),
        ("do not suit pybsp prune", ["--", "--magic", "1"]),
        ("add --recipe ramp", ["--", "--ramp", "cubic"]),
        ("must be a fraction above 0", ["--sparsities", "80"]),
    ],
)
def test_wrong_usage(cli, arguments, tmp_path, message, more):
    run = cli(*arguments, *more)
    assert run.status == 2
    assert message in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ABLATIONS)
def test_options_of_every_ablation_are_those_of_prune(cli, arguments, name):
    run = cli(*arguments, "--ablation", name, "--list")
    assert run.status == 0, run.stderr
    variants, blocks = ABLATIONS[name]
    assert len(run.data["runs"]) == len(variants) * len(blocks) > 2


@pytest.mark.parametrize("name", VARIANTS)
def test_options_of_every_variant_are_those_of_prune(cli, arguments, name):
    run = cli(*arguments, "--variants", name, "--list")
    assert run.status == 0, run.stderr


def test_order_compares_early():
    names = [c.name for c in cells(["a", "b"], ["x"], [0.8, 0.5], ["8,1"], [0, 1])]
    assert names[:3] == ["a-x-80-8x1-seed0", "b-x-80-8x1-seed0", "a-x-50-8x1-seed0"]
    assert names[4] == "a-x-80-8x1-seed1"
    assert len(names) == len(set(names)) == 8


def test_names_tell_everything():
    blocks = ("8,1", "16,4", "1,in/8", "out/8,1", "1,in", "1,1")
    for cell in cells(["mrpc", "mnli_subset"], VARIANTS, [0.8, 0.44], blocks, [0, 12]):
        assert Cell.from_name(cell.name) == cell
    with pytest.raises(ValueError, match="no name of a run"):
        Cell.from_name("mrpc-reconstruct")


class TestRunner:
    """On programs that take a moment and write down when they ran."""

    @pytest.fixture
    def runner(self, monkeypatch, tmp_path):
        program = (
            "import sys, time, pathlib; name, dense, out = sys.argv[1:];"
            "log = open(out + '/times', 'a'); start = time.time(); time.sleep(0.3);"
            "pathlib.Path(dense).mkdir(parents=True, exist_ok=True);"
            "print(name, start, time.time(), file=log)"
        )
        original = study.subprocess.Popen

        def popen(command, **_options):
            line = command[3:]
            dense = line[line.index("--dense-checkpoint" if "--dense-checkpoint" in line
                                    else "--save-dense") + 1]  # fmt: skip
            return original([sys.executable, "-c", program, line[0], dense, tmp_path])

        monkeypatch.setattr(study.subprocess, "Popen", popen)
        return lambda jobs: Runner(tmp_path / "out", lambda c: [c.name], jobs)

    def times(self, tmp_path):
        lines = (tmp_path / "times").read_text().splitlines()
        return {n: (float(a), float(b)) for n, a, b in map(str.split, lines)}

    def overlap(self, one, other):
        return one[0] < other[1] and other[0] < one[1]

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_waits_for_the_dense_model_another_makes(self, runner, tmp_path, jobs):
        todo = cells(["a", "b"], ["x", "y"], [0.8], ["8,1"], [0])
        done = list(runner(jobs).run(todo))
        assert {cell for cell, _, _ in done} == set(todo)
        assert all(status == 0 for _, status, _ in done)
        times = self.times(tmp_path)
        first, second = (times[f"a-{v}-80-8x1-seed0"] for v in ("x", "y"))
        assert not self.overlap(first, second) or jobs == 1
        assert first[0] < second[0]
        at_once = [self.overlap(times[c.name], times[d.name])
                   for c in todo for d in todo if c != d]  # fmt: skip
        assert any(at_once) == (jobs > 1)

    def test_stops_what_runs_when_it_is_stopped(self, runner):
        started = runner(1)
        going = started.run(cells(["a"], ["x", "y"], [0.8], ["8,1"], [0]))
        next(going)
        cell = Cell("c", "x", 0.8, "8,1", 0)
        started._start(cell)
        process = started._running[cell]
        going.close()
        assert process.poll() is not None


def test_summary_counts_tasks_alike(tmp_path):
    for seed, final in ((0, 0.80), (1, 0.82)):
        for task, metrics in (("mrpc", ("f1", "accuracy")), ("sst2", ("accuracy",))):
            scores = {
                "dense": dict.fromkeys(metrics, 0.9),
                "packed": {**dict.fromkeys(metrics, final), metrics[0]: final + 0.02},
            }
            name = Cell(task, "paper", 0.8, "8,1", seed).name
            (tmp_path / f"{name}.json").write_text(json.dumps({"scores": scores}))
    wanted = cells(["mrpc", "sst2"], ["paper"], [0.8, 0.5], ["8,1"], [0, 1])
    found = study.summaries(tmp_path, wanted)
    assert list(found) == [("paper", 0.8, "8,1")]
    row = found["paper", 0.8, "8,1"]
    assert row["mrpc"].change == pytest.approx(-8.0)
    assert row["sst2"].change == pytest.approx(-7.0)
    assert study.mean_change(row) == pytest.approx(-7.5)
    assert row["sst2"].text() == "83.0 +- 1.4 (-7.0)"
    assert Summary([90.0], [83.0]).text() == "83.0 (-7.0)"
    table = summary_table(found, ["sst2", "cola", "mrpc"])
    heads = [column.header for column in table.columns]
    assert heads == ["variant", "sparsity", "block", "sst2", "mrpc", "mean change"]
