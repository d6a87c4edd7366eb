import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
