import pytest

from pybsp.cli import corpus
from pybsp.cli.errors import WorkError

MODULE = '''
"""One two three four five six seven eight nine."""

class Thing:
    """A second text that is certainly long enough to count here.

    >>> this paragraph is an example and never prose at all
    """

def short():
    """Too short."""
'''


@pytest.fixture
def library(tmp_path):
    """A standard library with 40 passages in each area."""
    for area, modules in corpus.AREAS.items():
        words = " ".join(f"{area}{i}" for i in range(corpus.WORDS * 40))
        (tmp_path / f"{modules[0]}.py").write_text(f'"""{words}"""\n')
    (tmp_path / "heapq.py").write_text("this is (no Python")
    (tmp_path / "socket.py").write_bytes(b"\xff")
    return tmp_path


def test_this_interpreter_has_enough_text():
    data = corpus.load(train=1000, dev=400)
    assert (len(data.train), len(data.dev)) == (1000, 400)
    for (text,) in data.dev.texts:
        assert corpus.FEWEST_WORDS <= len(text.split()) <= corpus.WORDS
        assert ">>>" not in text


def test_areas_are_balanced_and_splits_disjoint(library):
    data = corpus.load(80, 20, root=library)
    for split, each in ((data.train, 20), (data.dev, 5)):
        counts = [split.labels.count(label) for label in range(len(corpus.AREAS))]
        assert counts == [each] * len(corpus.AREAS)
    assert not set(data.train.texts) & set(data.dev.texts)
    assert len(set(data.train.texts)) == len(data.train)
    areas = list(corpus.AREAS)
    for (text,), label in zip(data.train.texts, data.train.labels, strict=True):
        assert text.startswith(areas[int(label)])


def test_the_seed_decides(library):
    data = corpus.load(80, 20, root=library)
    assert corpus.load(80, 20, root=library) == data
    assert corpus.load(80, 20, seed=1, root=library) != data


def test_a_small_library_gives_fewer_passages(library):
    data = corpus.load(1000, 1000, root=library)
    assert len(data.dev) == 40
    assert len(data.train) == 120


def test_only_prose_paragraphs_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    assert sorted(corpus._passages(path)) == [
        "A second text that is certainly long enough to count here.",
        "One two three four five six seven eight nine.",
    ]


def test_a_python_without_sources(tmp_path):
    with pytest.raises(WorkError, match="no docstrings found"):
        corpus.load(100, 40, root=tmp_path)
