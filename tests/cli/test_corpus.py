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


@pytest.fixture(scope="module")
def data():
    return corpus.load(train=120, dev=40)


def test_areas_are_balanced_and_splits_disjoint(data):
    for split, each in ((data.train, 30), (data.dev, 10)):
        counts = [split.labels.count(label) for label in range(len(corpus.AREAS))]
        assert counts == [each] * len(corpus.AREAS)
    assert not set(data.train.texts) & set(data.dev.texts)
    assert len(set(data.train.texts)) == len(data.train)


def test_passages_are_prose_of_bounded_length(data):
    for (text,) in data.train.texts:
        assert corpus.FEWEST_WORDS <= len(text.split()) <= corpus.WORDS
        assert ">>>" not in text


def test_the_seed_decides(data):
    assert corpus.load(120, 40) == data
    assert corpus.load(120, 40, seed=1) != data


def test_a_small_library_gives_fewer_passages(tmp_path):
    for modules in corpus.AREAS.values():
        words = " ".join(f"{modules[0]}{i}" for i in range(corpus.WORDS * 4))
        (tmp_path / f"{modules[0]}.py").write_text(f'"""{words}"""\n')
    (tmp_path / "heapq.py").write_text("this is (no Python")
    data = corpus.load(1000, 1000, root=tmp_path)
    assert len(data.dev) == 4
    assert len(data.train) == 12


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
