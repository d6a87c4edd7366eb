import pytest
import torch

from pybsp.cli import bench, onnx_session
from pybsp.cli.models import load_classifier


def test_json_has_times_and_the_layers(cli, pruned):
    run = cli(
        "bench", pruned, "--seconds", "0.1", "--seq", "16", "--batch", "2", "--json"
    )
    assert run.status == 0
    latency = run.data["latency"]
    assert (latency["batch"], latency["sequence"], latency["threads"]) == (2, 16, 1)
    dense, packed = (latency["candidates"][name] for name in ("dense", "packed"))
    for timing in (dense, packed):
        assert 0 < timing["best_ms"] <= timing["median_ms"] <= timing["p95_ms"]
    ratio = dense["median_ms"] / packed["median_ms"]
    assert latency["speedup"]["median"] == pytest.approx(ratio, rel=1e-2)
    assert run.data["report"]["tokens"] == 32
    assert len(run.data["report"]["layers"]) == 14
    assert run.data["environment"]["cpu"]


def test_tables(cli, pruned):
    run = cli("bench", pruned, "--seconds", "0.1", "--seq", "8")
    assert run.status == 0
    assert "median ms" in run.stdout
    assert "bert.encoder.layer.0.output.dense" in run.stdout


def test_a_model_without_zero_blocks(cli, model):
    run = cli("bench", model)
    assert run.status == 1
    assert "zero blocks" in run.stderr


def test_folders_that_are_no_model(cli, tmp_path):
    assert cli("bench", tmp_path / "nowhere").status == 2
    run = cli("bench", tmp_path)
    assert run.status == 2
    assert "has no config.json" in run.stderr


def test_a_sequence_that_is_too_long(cli, pruned):
    run = cli("bench", pruned, "--seq", "4096")
    assert run.status == 1
    assert "at most 128 tokens" in run.stderr


def test_different_outputs_are_not_timed(pruned):
    packed, _ = load_classifier(str(pruned), 2)
    other, _ = load_classifier(str(pruned), 2)
    bench.check_same(other.dequantize(), packed, 8)
    with torch.no_grad():
        other.classifier.weight.add_(1.0)
    with pytest.raises(bench.WorkError, match="differs"):
        bench.check_same(other, packed, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_onnx_runtime_computes_the_same(pruned, attention):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    classifier, _ = load_classifier(str(pruned), 2)
    dense = classifier.dequantize().base_model.eval()
    dense.set_attn_implementation(attention)
    inputs = {"input_ids": torch.arange(10).reshape(2, 5)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    call = onnx_session.session(dense, inputs, threads=1)
    with torch.inference_mode():
        expected = dense(**inputs)[0]
    torch.testing.assert_close(torch.from_numpy(call()), expected, atol=1e-4, rtol=1e-4)
    assert dense.config._attn_implementation == attention
