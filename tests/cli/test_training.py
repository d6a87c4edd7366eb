import json
import math
import shutil

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
    middle, newest = sorted(
        tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    shutil.rmtree(newest)
    steps = json.loads((middle / training.TRAINER_STATE).read_text())["global_step"]
    assert steps % math.ceil(len(features) / 16) != 0, "in the midst of an epoch"
    again, _ = load_classifier(str(model), 2)
    training.fit(again, features, tokenizer, settings, tmp_path)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, after[name], msg=name)


@pytest.mark.parametrize("count", [1, 7, 32, 1003])
def test_batches_hold_like_lengths_in_random_order(count):
    lengths = np.random.default_rng(count).integers(3, 60, count).tolist()
    sampler = training.LikeLengths(lengths, 4, seed=1)
    assert len(sampler) == count
    first = list(sampler)
    assert sorted(first) == list(range(count))
    assert first == list(sampler), "the same when an epoch is resumed"
    if count < 32:
        return
    whole = [first[start : start + 4] for start in range(0, count - count % 4, 4)]
    padding = [4 * max(lengths[i] for i in batch) - sum(lengths[i] for i in batch)
               for batch in whole]  # fmt: skip
    assert sum(padding) < 0.15 * sum(lengths) + 60
    longest = np.array([max(lengths[i] for i in batch) for batch in whole])
    rises = (np.diff(longest) > 0).mean()
    assert 0.25 < rises < 0.75, "neither from long to short nor the other way"
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(training.LikeLengths(lengths, 4, seed=2)) != first


def test_every_epoch_has_an_order_of_its_own(model, features, monkeypatch, tmp_path):
    network, tokenizer = load_classifier(str(model), 2)
    seen = []
    original = training.LikeLengths.__iter__

    def watch(sampler):
        order = list(original(sampler))
        seen.append(order)
        return iter(order)

    monkeypatch.setattr(training.LikeLengths, "__iter__", watch)
    settings = training.Fit(2, 1e-3, 16, seed=0, checkpoints=0)
    training.fit(network, features, tokenizer, settings, tmp_path)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1])


def test_mixed_precision_leaves_nothing_on_the_model(model, features, tmp_path):
    network, tokenizer = load_classifier(str(model), 2)
    settings = training.Fit(1, 1e-3, 16, seed=0, checkpoints=0, bfloat16=True)
    training.fit(network, features, tokenizer, settings, tmp_path / "run")
    found = training.predict(network, features, tokenizer)
    network.save_pretrained(tmp_path / "saved")
    again, _ = load_classifier(str(tmp_path / "saved"), 2)
    np.testing.assert_array_equal(training.predict(again, features, tokenizer), found)


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
