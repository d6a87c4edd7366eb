"""``pybsp glue``: which runs it does, in which order, and what it says of them."""

import fcntl
import json
import signal
import sys
import time

import pytest

from pybsp.cli import study
from pybsp.cli.glue import interruptible, summary_table
from pybsp.cli.study import ABLATIONS, VARIANTS, Cell, Runner, Summary, cells

from .conftest import write_sst2

QUICK = (
    "--", "--epochs-dense", "1", "--epochs", "1", "--lr", "1e-3", "--seconds", "0.1",
    "--max-train-samples", "32", "--bf16",
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
    dense = {path.name for path in (tmp_path / "out" / "dense").iterdir()}
    assert dense == {"sst2-seed0", "sst2-seed0.json"}
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
        ("one-cut at 70 %", ["--ablation", "cuts", "--sparsities", "0.8", "0.7"]),
        ("a block shape is two extents", ["--block-shapes", "8"]),
        ("add --recipe ramp", ["--", "--ramp", "cubic"]),
        ("behind --: unrecognized arguments: --magic 1", ["--", "--magic", "1"]),
        ("--out behind -- is set for each run", ["--", "--out", "x"]),
        ("what the variant paper sets",
         ["--variants", "paper", "--", "--recipe", "ramp"]),
        ("choose --variants reweighted", ["--", "--recipe", "ramp"]),
        ("what the variant dropout sets",
         ["--variants", "dropout", "--", "--no-dropout"]),
        ("whole number from 0 on", ["--seeds", "-1"]),
        ("must be a fraction above 0", ["--sparsities", "80"]),
        ("is not a directory", ["--data", "/nowhere"]),
        ("is a file", ["--out", __file__]),
        ("is a file", ["--results", __file__]),
    ],
)  # fmt: skip
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
    assert len(run.data["runs"]) == len(variants) * len(blocks) > 1


@pytest.mark.parametrize("name", VARIANTS)
def test_options_of_every_variant_are_those_of_prune(cli, arguments, name):
    run = cli(*arguments, "--variants", name, "--list")
    assert run.status == 0, run.stderr


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_prunes(cli, pruned, model, data, tmp_path, name):
    line = [
        "prune", "--model", model, "--data", data, "--out", tmp_path / "out",
        *Cell("sst2", name, 0.8, "8,1", 0).options(), "--dense-checkpoint",
        pruned.parent / "dense", "--epochs", "1", "--max-train-samples", "64",
        "--seconds", "0.1", "--no-onnx", "--threads", "1", "--json",
    ]  # fmt: skip
    run = cli(*line)
    assert run.status == 0, run.stderr
    assert run.data["sparsity"]["reached"] == pytest.approx(0.8, abs=0.01)
    assert set(run.data["scores"]) == {
        "dense", "magnitude_cut", "after_cut", "final", "packed",
    }  # fmt: skip


def test_a_dense_model_made_otherwise_is_refused(cli, arguments, tmp_path):
    dense = tmp_path / "out" / "dense" / "sst2-seed0"
    dense.mkdir(parents=True)
    unknown = cli(*arguments, *QUICK)
    assert unknown.status == 2
    assert "which says how it was made" in unknown.stderr
    (dense.parent / "sst2-seed0.json").write_text('{"epochs_dense": 3.0}')
    other = cli(*arguments, *QUICK)
    assert other.status == 2
    assert "epochs_dense: 3.0 there, 1.0 here" in other.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt_a_study_unless_they_are_ignored(number):
    before = signal.signal(number, signal.SIG_DFL)  # whatever started the tests ignores
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with interruptible():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_two_studies_do_not_work_in_one_folder(cli, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = cli(*arguments, *QUICK)
    assert refused.status == 1
    assert "another study" in refused.stderr


@pytest.mark.parametrize(
    "text", ["", "{}", '{"options": {}}', '{"options": {}, "scores": {"dense": {}}}']
)
def test_damaged_results_are_named(cli, arguments, tmp_path, text):
    results = tmp_path / "out" / "results"
    results.mkdir(parents=True)
    (results / "sst2-reconstruct-80-8x1-seed0.json").write_text(text)
    run = cli(*arguments)
    assert run.status == 1
    assert "sst2-reconstruct-80-8x1-seed0.json" in run.stderr
    assert "Traceback" not in run.stderr


def test_words_stand_for_places_and_nothing_else(tmp_path):
    cell = Cell("a", "x", 0.8, "8,1", 0)
    runner = Runner(tmp_path / "out", lambda _: [], 1)
    runner.out(cell).mkdir(parents=True)
    scores = {"dense": {"f1": 0.5}, "packed": {"f1": 0.5}}
    results = {
        "options": {"out": f"{tmp_path}/out/runs/a", "data": f"{tmp_path}/data"},
        "scores": scores, "layers": ["out", 0.5, None], "config": ["out", 1],
        "command": f"pybsp prune --data {tmp_path}/data --out '{tmp_path}/out/runs/a'",
        "other": [f"{tmp_path}/data2", f"/x{tmp_path}/data"],
    }  # fmt: skip
    (runner.out(cell) / "results.json").write_text(json.dumps(results))
    places = {"OUT": tmp_path / "out", "DATA": tmp_path / "data"}
    found = study.results_of(cell, runner, places)
    assert found == {
        **results,
        "options": {"out": "OUT/runs/a", "data": "DATA"},
        "command": "pybsp prune --data DATA --out 'OUT/runs/a'",
    }


def test_order_compares_early():
    names = [c.name for c in cells(["a", "b"], ["x"], [0.8, 0.5], ["8,1"], [0, 1])]
    assert names[:3] == ["a-x-80-8x1-seed0", "b-x-80-8x1-seed0", "a-x-50-8x1-seed0"]
    assert names[4] == "a-x-80-8x1-seed1"
    assert len(names) == len(set(names)) == 8
    assert len(cells(["a", "a"], ["x"], [0.8, 0.80], ["8,1"], [0, 0])) == 1


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
            "name.startswith('slow') and time.sleep(60);"
            "print(name, start, time.time(), file=log)"
        )
        original = study.subprocess.Popen

        def popen(command, **_options):
            assert command[1:3] == ["-c", study.PROGRAM]
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
        started = runner(2)
        going = started.run(cells(["a", "slow"], ["x"], [0.8], ["8,1"], [0]))
        next(going)
        (process,) = started._running.values()
        assert process.poll() is None
        going.close()
        assert process.poll() == -signal.SIGTERM

    @pytest.mark.parametrize(
        ("file", "dense_checkpoint", "option"),
        [
            (None, None, "--dense-checkpoint"),
            ("c.work/run.json", None, "--save-dense"),
            ("c/results.json", None, "--save-dense"),
            ("c.work/run.json", "DENSE", "--dense-checkpoint"),
        ],
    )
    def test_a_run_goes_on_with_the_options_it_began_with(
        self, monkeypatch, tmp_path, file, dense_checkpoint, option
    ):
        cell = Cell("a", "x", 0.8, "8,1", 0)
        runner = Runner(tmp_path, lambda _: [], 1)
        runner.dense(cell).mkdir(parents=True)
        if file:
            path = tmp_path / "runs" / file.replace("c", cell.name, 1)
            path.parent.mkdir(parents=True)
            options = {"dense_checkpoint": dense_checkpoint}
            path.write_text(json.dumps({"options": options}))
        lines = []
        monkeypatch.setattr(study, "_program", lambda line, *_: lines.append(line))
        runner._start(cell)
        assert option in lines[0]


def test_summary_counts_tasks_alike(tmp_path):
    for seed, final in ((0, 0.80), (1, 0.82)):
        for task, metrics in (("mrpc", ("f1", "accuracy")), ("sst2", ("accuracy",))):
            scores = {
                "dense": dict.fromkeys(metrics, 0.9),
                "packed": {**dict.fromkeys(metrics, final), metrics[0]: final + 0.02},
            }
            name = Cell(task, "paper", 0.8, "8,1", seed).name
            text = json.dumps({"scores": scores, "options": {}})
            (tmp_path / f"{name}.json").write_text(text)
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
