import sys
import types

import pytest

from pybsp.cli import tasks
from pybsp.cli.errors import UsageError, WorkError


def write(folder, task, train, dev=None):
    (folder / task).mkdir()
    (folder / task / "train.tsv").write_bytes(train.encode())
    (folder / task / "dev.tsv").write_bytes((dev or train).encode())


def test_quotes_and_commas_are_plain_characters(tmp_path):
    write(tmp_path, "sst2", 'sentence\tlabel\n"an open quote, and\t0\nb"c"\t1\r\n')
    data = tasks.load("sst2", tmp_path)
    assert data.train.texts == [('"an open quote, and',), ('b"c"',)]
    assert data.train.labels == [0, 1]


def test_columns_are_found_by_name(tmp_path):
    write(tmp_path, "mrpc", "label\tid\tsentence2\tsentence1\n1\t7\tsecond\tfirst\n")
    data = tasks.load("mrpc", tmp_path)
    assert data.train.texts == [("first", "second")]
    assert data.dev.labels == [1]


def test_regression_labels_are_numbers(tmp_path):
    write(tmp_path, "stsb", "sentence1\tsentence2\tlabel\na\tb\t3.75\n")
    data = tasks.load("stsb", tmp_path)
    assert data.train.labels == [3.75]
    assert data.task.outputs == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("sentence\tlabel\n", "no rows"),
        ("text\tlabel\na\t1\n", "lacks the column 'sentence'"),
        ("sentence\ttarget\na\t1\n", "lacks the column 'label'"),
        ("sentence\tlabel\na\t1\nb\n", "train.tsv:3: 1 columns where the header has 2"),
        ("sentence\tlabel\na\tb\t1\n", "3 columns"),
        ("sentence\tlabel\na\tpositive\n", "train.tsv:2: the label 'positive' is not"),
        ("sentence\tlabel\na\t1.5\n", "is not an integer"),
        ("sentence\tlabel\na\t2\n", "out of range for task 'sst2' (0 to 1)"),
        ("sentence\tlabel\na\t-1\n", "out of range"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, text, message):
    write(tmp_path, "sst2", text)
    with pytest.raises(WorkError) as error:
        tasks.load("sst2", tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", ["nan", "inf", "5.1", "high"])
def test_bad_regression_labels(tmp_path, label):
    write(tmp_path, "stsb", f"sentence1\tsentence2\tlabel\na\tb\t{label}\n")
    with pytest.raises(WorkError, match="label"):
        tasks.load("stsb", tmp_path)


def test_text_that_is_not_utf8(tmp_path):
    write(tmp_path, "sst2", "sentence\tlabel\na\t1\n")
    (tmp_path / "sst2" / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(WorkError, match="not UTF-8"):
        tasks.load("sst2", tmp_path)


def test_unknown_task_and_missing_files(tmp_path):
    with pytest.raises(UsageError, match="unknown task 'sst3': choose one of sst2"):
        tasks.load("sst3", tmp_path)
    with pytest.raises(UsageError, match="not a directory"):
        tasks.load("sst2", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"train\.tsv does not exist"):
        tasks.load("sst2", tmp_path)
    write(tmp_path, "sst2", "sentence\tlabel\na\t1\n")
    (tmp_path / "sst2" / "dev.tsv").unlink()
    with pytest.raises(UsageError, match=r"dev\.tsv does not exist"):
        tasks.load("sst2", tmp_path)


def test_subsample_is_drawn_once_and_keeps_the_dev_split(tmp_path):
    rows = "".join(f"text {i}\t{i % 2}\n" for i in range(50))
    write(tmp_path, "sst2", "sentence\tlabel\n" + rows)
    data = tasks.load("sst2", tmp_path)
    small = tasks.subsample(data, 10, seed=3)
    assert len(small.train) == 10
    assert small.dev == data.dev
    assert small == tasks.subsample(data, 10, seed=3)
    assert small != tasks.subsample(data, 10, seed=4)
    pairs = set(zip(data.train.texts, data.train.labels, strict=True))
    assert set(zip(small.train.texts, small.train.labels, strict=True)) <= pairs
    assert tasks.subsample(data, None, 0) is data
    assert tasks.subsample(data, 500, 0) is data


class TestHub:
    def test_without_datasets(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UsageError, match="pip install 'datasets>=3'"):
            tasks.load("sst2", None)

    def test_a_sample_is_not_on_the_hub(self):
        with pytest.raises(UsageError, match="--data"):
            tasks.load("mnli_subset", None)

    def test_offline(self, monkeypatch):
        def load_dataset(*_):
            raise ConnectionError("no network\nlong story")

        fake = types.SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        with pytest.raises(WorkError, match=r"could not be fetched .*--data"):
            tasks.load("sst2", None)

    def test_rows(self, monkeypatch):
        rows = [{"sentence": "a", "label": 1, "idx": 0}]
        fake = types.SimpleNamespace(
            load_dataset=lambda *_: {"train": rows, "validation": rows}
        )
        monkeypatch.setitem(sys.modules, "datasets", fake)
        data = tasks.load("sst2", None)
        assert data.train.texts == [("a",)]
        assert data.dev.labels == [1]
