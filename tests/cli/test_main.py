import json
import subprocess
import sys

import pytest

from pybsp.cli import bench
from pybsp.cli.main import COMMANDS, Result, show


def test_a_text_that_looks_like_markup_is_shown_as_it_is(capsys):
    show(Result({}, ["Saved in runs/[v2]/x, runs/[/v2] and [bold]"]), as_json=False)
    assert capsys.readouterr().out == "Saved in runs/[v2]/x, runs/[/v2] and [bold]\n"


def test_help_names_every_command(cli):
    run = cli("--help")
    assert run.status == 0
    for command in COMMANDS:
        assert command in run.stdout


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("prune",
         "--model --task --data --out --sparsity --block-shape --recipe --lambda "
         "--method --epochs-dense --epochs --lr --batch-size --max-length --seed "
         "--max-train-samples --threads --dense-checkpoint --save-dense --resume "
         "--distill --distill-hidden --saliency --schedule --seconds "
         "--dropout --no-dropout --bf16 --json"),
        ("quickstart", "--out --from-scratch --seed --threads --json"),
        ("bench", "DIR --batch --seq --ragged --threads --no-onnx --json"),
        ("check", "DIR --tokens --json"),
        ("pack", "DIR --out --block-shape --json"),
    ],
)  # fmt: skip
def test_help_of_a_command_lists_its_options(cli, command, options):
    run = cli(command, "--help")
    assert run.status == 0
    for option in options.split():
        assert option in run.stdout
    assert "exit status" in run.stdout
    assert "--tiny" not in run.stdout


def test_version_names_pybsp_torch_and_isa(cli):
    run = cli("--version")
    assert run.status == 0
    assert run.stdout.startswith("pybsp ")
    assert "torch" in run.stdout
    assert "isa" in run.stdout


@pytest.mark.parametrize(
    ("argument", "status", "begin"), [("--version", 0, "pybsp "), ("prun", 2, "")]
)
def test_the_package_runs_as_the_command(tmp_path, argument, status, begin):
    run = subprocess.run(
        [sys.executable, "-m", "pybsp", argument],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == status
    assert run.stdout.startswith(begin)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("prun",),
        ("bench",),
        ("bench", "x", "--thread", "1"),
        ("bench", "x", "--batch", "0"),
        ("bench", "x", "--seq", "16,,32"),
        ("bench", "x", "--seconds", "nan"),
        ("check", "x", "--tokens", "many"),
    ],
)
def test_wrong_usage_exits_2_without_a_traceback(cli, arguments):
    run = cli(*arguments)
    assert run.status == 2
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert "pybsp" in run.stderr


def fake(monkeypatch, work):
    monkeypatch.setattr(bench, "run", work)


def test_json_keeps_stdout_clean_of_what_libraries_print(cli, monkeypatch):
    def work(_arguments):
        print("noise of a library")
        return Result({"speed": 1.5}, ["a table"])

    fake(monkeypatch, work)
    run = cli("bench", "x", "--json")
    assert json.loads(run.stdout) == {"speed": 1.5}
    assert "noise" in run.stderr
    assert cli("bench", "x").stdout.strip() == "a table"


def test_status_of_a_result_is_returned(cli, monkeypatch):
    fake(monkeypatch, lambda _: Result({}, [], exit_status=1))
    assert cli("bench", "x", "--json").status == 1


@pytest.mark.parametrize(
    "error", [ValueError("first\nsecond"), OSError(28, "No space left", "/x")]
)
def test_an_error_is_one_line_and_exit_1(cli, monkeypatch, error):
    def work(_arguments):
        raise error

    fake(monkeypatch, work)
    run = cli("bench", "x")
    assert run.status == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("pybsp bench: error: ")


def test_a_bug_is_not_hidden(cli, monkeypatch):
    def work(_arguments):
        raise AssertionError("bug")

    fake(monkeypatch, work)
    with pytest.raises(AssertionError):
        cli("bench", "x")


def test_debug_shows_the_traceback(cli, monkeypatch):
    def work(_arguments):
        raise ValueError("details")

    fake(monkeypatch, work)
    monkeypatch.setenv("PYBSP_DEBUG", "1")
    with pytest.raises(ValueError, match="details"):
        cli("bench", "x")


def test_an_interrupt_exits_130(cli, monkeypatch):
    def work(_arguments):
        raise KeyboardInterrupt

    fake(monkeypatch, work)
    run = cli("bench", "x")
    assert run.status == 130
    assert "interrupted" in run.stderr


def test_help_imports_no_transformers():
    code = (
        "import sys; from pybsp.cli.main import main; main(['prune', '--help']); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "pybsp.cli.main", "check", "/nonexistent"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "pybsp check: error: /nonexistent is not a directory\n"
