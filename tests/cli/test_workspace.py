import json
import shutil

import pytest

from pybsp.cli.errors import UsageError, WorkError
from pybsp.cli.workspace import (
    RESULTS,
    Workspace,
    copy_folder,
    finished_results,
    read_json,
    write_json,
)

OPTIONS = {"seed": 0, "sparsity": 0.8}


def test_a_stage_runs_once_over_two_lives(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"score": 0.5}

    with Workspace(tmp_path / "out", OPTIONS, resume=False) as first:
        assert first.once("dense", work) == {"score": 0.5}
    with Workspace(tmp_path / "out", OPTIONS, resume=True) as second:
        assert second.once("dense", work) == {"score": 0.5}
    assert len(calls) == 1


def test_a_stage_that_fails_is_not_recorded(tmp_path):
    def work():
        raise KeyboardInterrupt

    with (
        Workspace(tmp_path / "out", OPTIONS, resume=False) as workspace,
        pytest.raises(KeyboardInterrupt),
    ):
        workspace.once("dense", work)
    with Workspace(tmp_path / "out", OPTIONS, resume=True) as workspace:
        assert workspace.once("dense", lambda: {"score": 1}) == {"score": 1}


def test_an_unfinished_run_needs_resume_with_the_same_options(tmp_path):
    with Workspace(tmp_path / "out", OPTIONS, resume=False):
        pass
    with (
        pytest.raises(UsageError, match="--resume"),
        Workspace(tmp_path / "out", OPTIONS, resume=False),
    ):
        pass
    other = {**OPTIONS, "seed": 1}
    with (
        pytest.raises(UsageError, match="seed: 0 there, 1 here"),
        Workspace(tmp_path / "out", other, resume=True),
    ):
        pass


def test_two_processes_cannot_share_the_work(tmp_path):
    with (
        Workspace(tmp_path / "out", OPTIONS, resume=True),
        pytest.raises(WorkError, match="another process"),
        Workspace(tmp_path / "out", OPTIONS, resume=True),
    ):
        pass
    with Workspace(tmp_path / "out", OPTIONS, resume=True):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(part):
        (part / "half").touch()
        raise OSError("disk full")

    with Workspace(tmp_path / "out", OPTIONS, resume=False) as workspace:
        with pytest.raises(OSError, match="disk full"):
            workspace.write_folder("dense", fail)
        assert not (workspace.folder / "dense").exists()
        whole = workspace.write_folder("dense", lambda part: (part / "a").touch())
        assert [path.name for path in whole.iterdir()] == ["a"]
        again = workspace.write_folder("dense", lambda part: (part / "b").touch())
        assert [path.name for path in again.iterdir()] == ["b"]


def test_publish_moves_the_folder_and_removes_the_work(tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # empty: allowed
    with Workspace(out, OPTIONS, resume=False) as workspace:
        folder = workspace.write_folder("pruned", lambda part: (part / "a").touch())
        workspace.publish(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "a").exists()


def test_finished_results(tmp_path):
    out = tmp_path / "out"
    assert finished_results(out, OPTIONS, resume=False) is None
    out.mkdir()
    assert finished_results(out, OPTIONS, resume=False) is None
    write_json(out / "results.json", {"options": OPTIONS, "score": 1})
    assert finished_results(out, OPTIONS, resume=True)["score"] == 1
    with pytest.raises(UsageError, match="other options"):
        finished_results(out, {**OPTIONS, "seed": 9}, resume=True)
    with pytest.raises(UsageError, match="not empty"):
        finished_results(out, OPTIONS, resume=False)
    (out / "results.json").write_text("{")
    with pytest.raises(WorkError, match="not JSON"):
        finished_results(out, OPTIONS, resume=True)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        finished_results(file, OPTIONS, resume=True)


def test_json_is_replaced_only_when_it_could_be_written(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    path.write_text("[1]")
    with pytest.raises(WorkError, match="no JSON object"):
        read_json(path)


def test_copy_folder_leaves_an_existing_target_alone(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.mkdir()
    (source / "a").write_text("new")
    copy_folder(source, target)
    assert (target / "a").read_text() == "new"
    (source / "a").write_text("newer")
    copy_folder(source, target)
    assert (target / "a").read_text() == "new"


def test_what_another_process_finished_meanwhile_is_not_done_again(tmp_path):
    with Workspace(tmp_path / "out", OPTIONS, resume=True) as first:
        late = Workspace(tmp_path / "out", OPTIONS, resume=True)
        pruned = first.write_folder("pruned", lambda part: (part / RESULTS).touch())
        first.publish(pruned)
    with pytest.raises(WorkError, match="just finished"):
        late.__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / RESULTS).is_file()


def test_a_lock_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def removes(*_: object) -> None:
        shutil.rmtree(tmp_path / "out.work")

    monkeypatch.setattr("pybsp.cli.workspace.fcntl.flock", removes)
    with pytest.raises(WorkError, match="just finished"):
        Workspace(out, OPTIONS, resume=True).__enter__()


def test_files_in_the_way_remove_no_work(tmp_path):
    out = tmp_path / "out"
    with Workspace(out, OPTIONS, resume=True) as workspace:
        workspace.record("dense", {"score": 1})
    out.mkdir()
    (out / RESULTS).touch()
    with pytest.raises(WorkError, match="just finished"):
        Workspace(out, OPTIONS, resume=True).__enter__()
    assert "dense" in (tmp_path / "out.work" / "run.json").read_text()


@pytest.mark.parametrize("recipe", ["reconstruct", "ramp"])
def test_a_run_from_before_an_option_did_what_was_the_default_then(tmp_path, recipe):
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "results.json", {"options": {"recipe": recipe}, "score": 1})
    now = {"recipe": recipe, "first_cuts": [], "error": None}
    if recipe == "ramp":
        assert finished_results(out, now, resume=True)["score"] == 1
        return
    with pytest.raises(UsageError, match="error: 'layer' there, None here"):
        finished_results(out, now, resume=True)
    same = {**now, "error": "layer"}
    assert finished_results(out, same, resume=True)["score"] == 1
