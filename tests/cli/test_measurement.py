import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from pybsp.cli import measurement
from pybsp.cli.errors import WorkError


@pytest.mark.parametrize(
    ("layers", "prefix"),
    [
        (["bert.encoder.layer.0.a.q", "bert.encoder.layer.1.b"], "bert.encoder.layer."),
        (["bert.encoder.layer.0.a", "bert.encoder.layer.0.b"], "bert.encoder.layer."),
        (["vision.x.a", "text.x.a"], ""),
        (["a", "b"], ""),
    ],
)  # fmt: skip
def test_the_encoder_is_what_all_pruned_layers_lie_below(layers, prefix):
    assert measurement.encoder_prefix(layers) == prefix


@pytest.mark.parametrize("outputs", [1, 3])
def test_fidelity_is_a_mean_over_the_examples_without_padding(outputs):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=outputs,
    )  # fmt: skip
    teacher, pruned = (BertForSequenceClassification(config) for _ in range(2))
    with torch.no_grad():
        teacher.classifier.weight *= 30  # not all classes alike
    ids = torch.tensor([[2, 7, 9, 4], [2, 8, 0, 0], [2, 9, 5, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    batches = [
        {k: v[:2] for k, v in inputs.items()},
        {k: v[2:] for k, v in inputs.items()},
    ]
    found = measurement.fidelity(teacher, pruned, batches)
    hidden = logits = 0.0
    with torch.no_grad():
        for batch in batches:
            rows = batch["attention_mask"].bool()
            theirs, ours = (
                m.eval()(**batch, output_hidden_states=True) for m in (teacher, pruned)
            )
            error = sum(
                (((a - b)[rows] ** 2).sum() / (b[rows] ** 2).sum()).item() / 2
                for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:],
                                strict=True)
            )  # fmt: skip
            hidden += error * len(rows) / 3
            if outputs == 1:
                logits += ((ours.logits - theirs.logits) ** 2).sum().item() / 3
            else:
                p, q = (x.logits.softmax(-1) for x in (theirs, ours))
                logits += (p * (p / q).log()).sum().item() / 3
    assert found["hidden_states"] == pytest.approx(hidden, rel=1e-3)
    assert found["logits"] == pytest.approx(logits, rel=1e-3)
    assert measurement.fidelity(teacher, teacher, batches) == {
        "hidden_states": 0, "logits": 0,
    }  # fmt: skip


def test_fidelity_of_models_that_give_no_hidden_states():
    def constant(*logits):
        model = torch.nn.Identity()
        output = SequenceClassifierOutput(logits=torch.tensor([logits]).log())
        model.forward = lambda **_: output
        return model

    found = measurement.fidelity(constant(0.5, 0.5), constant(0.75, 0.25), [{"a": 1}])
    assert found == {"logits": pytest.approx(0.5 * math.log(4 / 3), rel=1e-3)}


def test_agreement_is_judged_by_the_size_of_the_logits():
    dense = np.array([[1.0, -2.0], [0.5, 4.0]], dtype=np.float32)
    same = measurement.agreement(dense, dense.copy(), [384, 1536])
    assert same["agree"] is True
    assert same["tolerance"] == pytest.approx(
        4.0 * 2.0**-23 * (384**0.5 + 1536**0.5), rel=1e-6
    )
    within = dense + np.float32(0.5 * same["tolerance"])
    assert measurement.agreement(dense, within, [384, 1536])["agree"] is True
    beyond = dense + np.float32(3 * same["tolerance"])
    assert measurement.agreement(dense, beyond, [384, 1536])["agree"] is False
    assert same["same_predictions"] == 1
    turned = measurement.agreement(dense, -dense, [384])
    assert turned["same_predictions"] == 0
    one = measurement.agreement(dense[:, :1], -dense[:, :1], [384])
    assert one["same_predictions"] is None
    broken = np.full_like(dense, np.nan)
    assert measurement.agreement(dense, broken, [384, 1536])["agree"] is False


def test_file_sizes_count_the_encoder_s_tensors(tmp_path):
    dense = {"m.enc.0.weight": torch.zeros(4, 4), "head.weight": torch.zeros(2)}
    packed = {
        "m.enc.0.weight_values": torch.zeros(2, 2, 1),
        "m.enc.0.weight_col_indices": torch.zeros(2, dtype=torch.int16),
        "head.weight": torch.zeros(2),
    }
    save_file(dense, tmp_path / "model.safetensors")
    save_file(packed, tmp_path / "model.pybsp.safetensors")
    found = measurement.file_sizes(tmp_path, ["m.enc.0"])
    assert found["encoder"] == "m.enc"
    assert found["dense_encoder_bytes"] == 64
    assert found["packed_encoder_bytes"] == 4 * 4 + 2 * 2
    assert found["encoder_ratio"] == pytest.approx(20 / 64, abs=1e-4)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(WorkError, match="missing or damaged"):
        measurement.file_sizes(tmp_path, ["m.enc.0"])
