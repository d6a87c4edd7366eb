import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from pybsp.cli.used_rows import UsedRows, train_used_rows

TEXTS = [[2, 7, 9], [2, 7, 3, 9, 30]]
USED = [0, 2, 3, 7, 9, 30]  # with the padding
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 16,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@pytest.fixture
def model():
    return BertForSequenceClassification(BertConfig(**SIZES)).train()


def train(model, steps=3, weight_decay=0.0):
    """Like the Trainer: padded batches, clipped gradients, AdamW."""
    longest = max(map(len, TEXTS))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in TEXTS])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([0, 1]),
    }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def test_training_is_that_of_the_whole_table(model):
    whole = copy.deepcopy(model)
    train(whole)
    before = model.get_input_embeddings().weight.detach().clone()
    with train_used_rows(model, TEXTS):
        assert model.get_input_embeddings().weight.shape == (len(USED), 16)
        train(model)
    assert str(model) == str(whole)
    expected = whole.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    moved = (model.get_input_embeddings().weight != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == USED[1:]


def test_rows_that_are_not_used_do_not_decay(model):
    before = model.get_input_embeddings().weight.detach().clone()
    with train_used_rows(model, TEXTS):
        train(model, weight_decay=0.1)
    after = model.get_input_embeddings().weight
    others = [row for row in range(40) if row not in USED]
    assert torch.equal(after[others], before[others])


def test_evaluation_knows_every_row(model):
    ids = torch.tensor([[1, 2, 39]])
    with train_used_rows(model, TEXTS):
        train(model)
        found = model.eval()(ids).logits
        model.train()
        with pytest.raises(IndexError):
            model(ids)
    assert torch.equal(model.eval()(ids).logits, found)


def test_an_error_leaves_the_whole_table_with_what_was_learned(model):
    before = model.get_input_embeddings().weight.detach().clone()

    def interrupted():
        with train_used_rows(model, TEXTS):
            train(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = model.get_input_embeddings().weight
    assert isinstance(after, torch.nn.Parameter)
    assert after.shape == before.shape
    assert not torch.equal(after, before)


@pytest.mark.parametrize("what", ["tied", "frozen", "max_norm", "by_frequency"])
def test_some_tables_are_trained_whole(model, what):
    if what == "tied":
        model = BertForMaskedLM(BertConfig(**SIZES))
    table = model.get_input_embeddings()
    if what == "frozen":
        table.weight.requires_grad_(False)
    if what == "max_norm":
        table.max_norm = 1.0
    if what == "by_frequency":
        table.scale_grad_by_freq = True
    with train_used_rows(model, TEXTS):
        assert model.get_input_embeddings() is table
    assert not any(isinstance(module, UsedRows) for module in model.modules())
