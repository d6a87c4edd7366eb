import math

import numpy as np
import pytest
import torch

from pybsp.cli import training
from pybsp.cli.errors import WorkError
from pybsp.cli.models import load_classifier
from pybsp.cli.tasks import Split, load


@pytest.fixture(scope="module")
def loaded(model):
    return load_classifier(str(model), 2)


@pytest.fixture(scope="module")
def features(loaded, data):
    _, tokenizer = loaded
    return training.encode(tokenizer, load("sst2", data).train, 16, classes=True)


def test_encode_keeps_pairs_and_label_types(loaded):
    _, tokenizer = loaded
    split = Split([("the film", "was good"), ("a", "b")], [1, 0])
    classes = training.encode(tokenizer, split, 16, classes=True)
    assert [type(row["labels"]) for row in classes] == [int, int]
    first = tokenizer("the film", "was good")["input_ids"]
    assert classes[0]["input_ids"] == first
    regression = training.encode(tokenizer, split, 4, classes=False)
    assert type(regression[0]["labels"]) is float
    assert len(regression[0]["input_ids"]) == 4


def test_predict_answers_in_the_order_of_the_examples(loaded, features):
    model, tokenizer = loaded
    model.train()
    found = training.predict(model, features[:20], tokenizer, batch_size=3)
    assert model.training
    model.eval()
    for row, logits in zip(features[:20], found, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_fit_trains_quietly_and_again_from_its_checkpoint(
    model, features, tmp_path, capsys
):
    network, tokenizer = load_classifier(str(model), 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    settings = training.Fit(2, 1e-3, 16, seed=0, checkpoints=2, title="a title")
    training.fit(network, features, tokenizer, settings, tmp_path)
    after = network.state_dict()
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a title" in captured.err
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    again, _ = load_classifier(str(model), 2)
    training.fit(again, features, tokenizer, settings, tmp_path)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, after[name], msg=name)


def test_a_checkpoint_that_was_cut_off_is_removed(tmp_path):
    for step, names in ((10, ("a", "b")), (20, ("a",)), (30, ())):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    newest = training.last_checkpoint(tmp_path, ("a", "b"))
    assert newest == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-30").exists()
    assert training.last_checkpoint(tmp_path / "nowhere", ()) is None


def test_divergence_is_an_error_that_names_the_remedy():
    good = torch.nn.Linear(2, 2)
    training.check_finite(good.named_parameters())
    with torch.no_grad():
        good.bias[0] = math.inf
    with pytest.raises(WorkError, match=r"bias holds NaN.*--lr"):
        training.check_finite(good.named_parameters())
