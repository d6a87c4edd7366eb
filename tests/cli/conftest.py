"""A tiny model, a tiny task, and one pruned checkpoint that several tests look at."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from pybsp.cli import engines, models, small_bert, tasks
from pybsp.cli.main import main

GOOD = ("good", "great", "fine", "lovely")
BAD = ("bad", "poor", "dull", "weak")
FILLER = ("the", "film", "was", "a", "plot", "with", "actor", "and")


def write_sst2(folder: Path, train: int = 96, dev: int = 24) -> Path:
    """``folder/sst2/{train,dev}.tsv`` whose label hangs on one word."""
    generator = random.Random(0)
    (folder / "sst2").mkdir(parents=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel"]
        for row in range(rows):
            label = row % 2
            words = generator.choices(FILLER, k=generator.randint(3, 9))
            words.append(generator.choice((BAD, GOOD)[label]))
            lines.append(f"{' '.join(words)}\t{label}")
        (folder / "sst2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sst2(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A two-layer BERT of width 32 with random weights and its tokenizer."""
    models.quiet()
    split = tasks.load("sst2", data).train
    tokenizer = small_bert.train_tokenizer(split, vocabulary=120)
    network = small_bert.build(tokenizer, 2, hidden=32, layers=2, seed=0)
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def without_onnx():
    """Exporting takes seconds; the test of it calls the exporter itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "installed", lambda: ())
        yield


@dataclass(frozen=True)
class Run:
    """What one command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def data(self) -> dict:
        return json.loads(self.stdout)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    """Run ``pybsp`` in this process."""

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(status, captured.out, captured.err)

    return run


def prune_arguments(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    options: list[object] = [
        "prune", "--model", model, "--task", "sst2", "--data", data, "--out", out,
        "--recipe", "ramp", "--epochs-dense", "1", "--epochs", "2", "--lr", "1e-3",
        "--threads", "1",
    ]  # fmt: skip
    options += ["--seconds", "0.1", "--no-onnx"]
    return [str(option) for option in (*options, *more)]


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    """Made once by ``pybsp prune``; not to be changed."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    dense = out.parent / "dense"
    assert main(prune_arguments(model, data, out, "--save-dense", dense)) == 0
    return out


@pytest.fixture
def own_pruned(pruned: Path, tmp_path: Path) -> Path:
    """A copy of ``pruned`` that a test may damage."""
    folder = tmp_path / "own"
    shutil.copytree(pruned, folder)
    return folder
