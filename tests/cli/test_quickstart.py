import pytest

from pybsp.cli import quickstart
from pybsp.cli.tasks import load
from pybsp.cli.workspace import Workspace


@pytest.fixture
def tiny(monkeypatch, data):
    """The quickstart on the tests' task: the standard library takes seconds to read."""
    monkeypatch.setattr(quickstart.corpus, "load", lambda *_: load("sst2", data))


@pytest.mark.usefixtures("tiny")
def test_it_ends_with_a_table_and_what_to_do_next(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli("quickstart", "--tiny")
    assert run.status == 0
    for word in ("accuracy", "sparsity", "file size", "latency", "faster"):
        assert word in run.stdout
    assert "pybsp bench runs/quickstart" in run.stdout
    assert (tmp_path / "runs" / "quickstart" / "kept_blocks.png").is_file()
    again = cli("quickstart", "--tiny", "--json")
    assert (tmp_path / "runs" / "quickstart-2" / "README.md").is_file()
    assert again.data["sparsity"]["reached"] == pytest.approx(0.8, abs=1e-3)
    assert again.data["config"]["phases"] == [0.0, 0.0, 1.0]
    assert again.data["recipe"]["reconstruct"], "as pybsp prune does"


def test_an_unfinished_run_goes_on_if_it_is_the_same(tmp_path):
    wanted, options = tmp_path / "quickstart", {"command": "quickstart", "seed": 0}
    assert quickstart.free_folder(wanted, options) == wanted
    with Workspace(wanted, options, resume=True):
        pass
    assert quickstart.free_folder(wanted, options) == wanted
    other = {**options, "seed": 1}
    second = tmp_path / "quickstart-2"
    assert quickstart.free_folder(wanted, other) == second
    (tmp_path / "quickstart.work" / "run.json").write_text("{")
    assert quickstart.free_folder(wanted, options) == second


@pytest.mark.usefixtures("tiny")
def test_an_out_that_is_taken(cli, tmp_path):
    (tmp_path / "notes").touch()
    run = cli("quickstart", "--tiny", "--out", tmp_path)
    assert run.status == 2
    assert "not empty" in run.stderr


def test_the_pretrained_model_is_used_when_it_is_installed(data, model):
    found = load("sst2", data)
    loaded, _ = quickstart.subject(model, found, quickstart.TINY, 0).load()
    assert loaded.config.hidden_size == 32
    scratch, _ = quickstart.subject(None, found, quickstart.TINY, 0).load()
    assert scratch.config.hidden_size == quickstart.TINY.hidden


def test_the_real_sizes_are_worth_packing():
    for size in (quickstart.FROM_SCRATCH, quickstart.PRETRAINED):
        assert size.hidden >= 256
        assert size.layers >= 2
