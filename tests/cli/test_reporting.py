import numpy as np
import torch

from pybsp.cli import model_card, reporting


def test_kept_blocks_are_those_with_a_nonzero():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[3, 1] = 1.0
    kept = reporting.kept_blocks(model, {"0": (2, 1)})["0"]
    assert kept.tolist() == [[False] * 4, [False, True, False, False]]


def test_pictures_are_png_files_and_leave_nothing_else(tmp_path):
    generator = np.random.default_rng(0)
    kept = {
        f"encoder.layer.{row}.{name}": generator.random((6, 24)) < 0.3
        for row in range(3)
        for name in ("attention.query", "output.dense")
    }
    reporting.save_kept_blocks(kept, tmp_path / "blocks.png", "a title")
    histogram = reporting.norm_histogram({"a": torch.rand(4, 4)}, {"a": 8})
    reporting.save_norm_histograms({"before": histogram}, tmp_path / "norms.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "blocks.png",
        "norms.png",
    ]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_histogram_bins_hold_root_mean_squares():
    norms = torch.tensor([[0.0, 0.2, 1e9]])
    found = reporting.norm_histogram({"a": norms}, {"a": 4})
    edges, counts = found["log10_edges"], found["counts"]
    assert sum(counts) == 3
    assert counts[0] == 1  # zero
    assert counts[-1] == 1  # beyond the range
    middle = next(i for i, count in enumerate(counts[1:-1], 1) if count)
    assert edges[middle] <= np.log10(0.2 / 2) <= edges[middle + 1]


def test_base_model_is_a_hub_name_or_nothing():
    assert model_card.base_model("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert model_card.base_model("google/bert_uncased") == "google/bert_uncased"
    for folder in ("/data/bert", "./bert", "a/b/c", "small BERT", "folder"):
        assert model_card.base_model(folder) is None
