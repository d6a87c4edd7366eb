import pytest
import torch

from pybsp.cli import bench, bench_tables, breakdown, engines, measurement
from pybsp.cli.models import load_classifier
from pybsp.nn import BlockSparseLinear
from pybsp.nn.report import EncoderReport

QUICK = ("--seconds", "0.1")


def test_json_of_one_input(cli, pruned):
    run = cli("bench", pruned, *QUICK, "--seq", "16", "--batch", "2", "--json")
    assert run.status == 0
    (row,) = run.data["measurements"]
    assert (row["batch"], row["sequence"], row["threads"]) == (2, 16, 1)
    assert row["tokens"] == 32
    assert row["best_dense"] == "dense"
    dense, packed = (row["candidates"][name] for name in ("dense", "packed"))
    for timing in (dense, packed):
        assert 0 < timing["best_ms"] <= timing["median_ms"] <= timing["p95_ms"]
        seconds = timing["median_ms"] / 1e3
        assert timing["sequences_per_s"] == pytest.approx(2 / seconds, rel=1e-2)
        assert timing["tokens_per_s"] == pytest.approx(32 / seconds, rel=1e-2)
    ratio = dense["median_ms"] / packed["median_ms"]
    assert row["speedup"]["median"] == pytest.approx(ratio, rel=1e-2)
    assert row["speedup_over_best_dense"] == row["speedup"]
    assert run.data["report"]["tokens"] == 32
    assert len(run.data["report"]["layers"]) == 14
    assert run.data["environment"]["cpu"]
    assert run.data["encoders"] == [
        {"name": "bert", "architecture": "BertModel", "native": True, "reason": ""}
    ]


def test_parts_and_floor(cli, pruned):
    run = cli("bench", pruned, *QUICK, "--seq", "16", "--json")
    (row,) = run.data["measurements"]
    parts, floor = row["parts"], row["floor"]
    assert list(parts["ms"]) == list(breakdown.PARTS)
    assert all(parts["ms"][name] > 0 for name in ("attention", "up", "outside"))
    assert sum(parts["share"].values()) == pytest.approx(1, abs=1e-3)
    whole = sum(parts["ms"].values())
    assert parts["share"]["up"] == pytest.approx(parts["ms"]["up"] / whole, abs=1e-3)
    packed, _ = load_classifier(str(pruned), 2)
    kept = sum(
        module.weight_values.numel()
        for name, module in packed.named_modules()
        if hasattr(module, "weight_values") and ".layer." in name
    )
    pairs = 2 * 2 * 16**2 * 32  # of two layers
    assert floor["multiply_adds"] == 16 * kept + pairs
    least = 2e-6 * floor["multiply_adds"] / floor["peak_gflops"]
    assert floor["ms"] == pytest.approx(least, rel=0.05, abs=1e-4)


def test_every_combination_of_several_inputs(cli, pruned):
    command = ("bench", pruned, *QUICK, "--seq", "8,16", "--batch", "1,3,1")
    run = cli(*command, "--json")
    found = [(row["batch"], row["sequence"]) for row in run.data["measurements"]]
    assert found == [(1, 8), (1, 16), (3, 8), (3, 16)]
    run = cli(*command)
    assert run.status == 0
    for shape in ("1 x 8", "1 x 16", "3 x 8", "3 x 16"):
        # Times, throughput and floor, parts.
        assert sum(shape in line for line in run.stdout.splitlines()) == 3
    assert "time/floor" in run.stdout


def test_ragged_counts_real_tokens(cli, pruned):
    command = ("bench", pruned, *QUICK, "--seq", "20", "--batch", "4", "--ragged")
    (row,) = cli(*command, "--json").data["measurements"]
    (again,) = cli(*command, "--json").data["measurements"]
    assert 20 + 3 <= row["tokens"] < 80
    assert row["tokens"] == again["tokens"]
    packed = row["candidates"]["packed"]
    rate = 1e3 * row["tokens"] / packed["median_ms"]
    assert packed["tokens_per_s"] == pytest.approx(rate, rel=1e-2)
    assert (
        f"4 x 20 tokens, {80 - row['tokens']} of them padding" in cli(*command).stdout
    )


def test_ragged_inputs():
    class Config:
        vocab_size = 50

    inputs = measurement.random_inputs(Config, 40, 9, ragged=True)
    mask = inputs["attention_mask"]
    lengths = mask.sum(1)
    assert lengths[0] == 9
    assert set(lengths.tolist()) == set(range(1, 10))
    assert torch.equal(mask, mask.sort(1, descending=True).values)


def test_tables(cli, pruned):
    run = cli("bench", pruned, *QUICK, "--seq", "8")
    assert run.status == 0
    for text in (
        "median ms", "p95 ms", "tokens/s", "arithmetic floor", "weights in memory",
        *breakdown.PARTS.values(),
        "bert.encoder.layer.*.output.dense", "bert (BertModel) runs natively",
    ):  # fmt: skip
        assert text in run.stdout, text


def test_a_model_that_runs_through_its_modules(cli, pruned, monkeypatch):
    monkeypatch.setattr("pybsp.nn.encoder._READERS", {})
    run = cli("bench", pruned, *QUICK, "--seq", "8", "--json")
    assert run.status == 0
    (row,) = run.data["measurements"]
    assert row["parts"] is None
    assert row["floor"] is None
    assert row["candidates"]["packed"]["median_ms"] > 0
    (encoder,) = run.data["encoders"]
    assert not encoder["native"]
    run = cli("bench", pruned, *QUICK, "--seq", "8")
    assert "No times by part and no arithmetic floor" in run.stdout
    assert "this architecture is not known" in run.stdout


def test_fusing_that_was_turned_off_stays_off(pruned):
    packed, _ = load_classifier(str(pruned), 2)
    assert [one.native for one in breakdown.encoders(packed)] == [True]
    packed.hf_quantizer.quantization_config.fuse = False
    (report,) = breakdown.encoders(packed)
    assert not report.native
    assert "fuse=False" in report.reason


def test_weights_in_memory_are_counted_once(pruned):
    packed, _ = load_classifier(str(pruned), 2)
    stored = [*packed.parameters(), *packed.buffers()]
    everything = sum(tensor.nbytes for tensor in stored)
    aside = breakdown.weight_bytes(packed) - everything
    assert aside >= 0
    packed.classifier.weight = packed.bert.pooler.dense.weight = torch.nn.Parameter(
        torch.zeros(100, 10)
    )
    tied = {id(tensor): tensor.nbytes for tensor in packed.parameters()}
    tied |= {id(tensor): tensor.nbytes for tensor in packed.buffers()}
    assert breakdown.weight_bytes(packed) == sum(tied.values()) + aside


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
    run = cli("bench", pruned, "--seq", "8,4096")
    assert run.status == 1
    assert "at most 128 tokens" in run.stderr
    assert "timing" not in run.stderr


def test_a_model_that_takes_no_text():
    class Config:
        model_type = "vit"

    with pytest.raises(bench.WorkError, match=r"'vit' takes no token ids"):
        measurement.random_inputs(Config, 1, 1)


def test_different_outputs_are_not_timed(pruned):
    packed, _ = load_classifier(str(pruned), 2)
    other, _ = load_classifier(str(pruned), 2)
    bench.check_same(other.dequantize(), packed, 8)
    with torch.no_grad():
        other.classifier.weight.add_(1.0)
    with pytest.raises(bench.WorkError, match="differs"):
        bench.check_same(other, packed, 8)
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.bias[3] += 1.0
    with pytest.raises(bench.WorkError, match="differs"):
        measurement.latency(other, packed, batch=2, sequence=8, threads=1, seconds=0.01)


def test_an_engine_that_fails_is_left_out(pruned, monkeypatch):
    packed, _ = load_classifier(str(pruned), 2)
    other, _ = load_classifier(str(pruned), 2)
    dense = other.dequantize()

    def refuses(*_):
        raise RuntimeError("no")

    def right(_, inputs, threads):  # noqa: ARG001
        with torch.inference_mode():
            result = dense.base_model(**inputs)[0].numpy()
        return lambda: result

    def wrong(*arguments):
        result = right(*arguments)() + 1
        return lambda: result

    monkeypatch.setattr(engines, "installed", lambda: ("a", "b", "c"))
    monkeypatch.setattr(engines, "export", lambda *_: b"")
    monkeypatch.setattr(engines, "ENGINES", {"a": refuses, "b": wrong, "c": right})
    sizes = {"batch": 2, "sequence": 8, "threads": 1, "seconds": 0.01}
    found = measurement.latency(dense, packed, **sizes, ragged=True)
    assert list(found["candidates"]) == ["dense", "packed", "c"]
    assert found["best_dense"] == "c"  # it does nothing
    gain = found["speedup_over_best_dense"]["median"]
    assert gain < found["speedup"]["median"]
    assert "a left out: RuntimeError" in found["note"]
    assert "b left out: output differs" in found["note"]


def test_tables_say_why_there_are_no_parts():
    row = {
        "what": "w", "dtype": "float32", "threads": 2, "batch": 1, "sequence": 4,
        "tokens": 4,
        "candidates": {
            name: {"median_ms": ms, "p95_ms": 3 * ms, "sequences_per_s": 1e3 / ms,
                   "tokens_per_s": 4e3 / ms}
            for name, ms in (("dense", 4.0), ("packed", 2.0))
        },
        "floor": None, "parts": None, "no_parts": "its mask is odd",
    }  # fmt: skip
    data = {
        "measurements": [row],
        "environment": {"cpu": "c", "isa": "i"},
        "memory": {"dense_weight_bytes": 4, "packed_weight_bytes": 1},
    }
    native = [EncoderReport("a", "A", native=True)]
    texts = list(map(str, bench_tables.tables(data, native)))
    assert any("its mask is odd" in text for text in texts)
    assert any("(0.25x)" in text for text in texts)


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_engines_compute_the_same(pruned, attention, engine):
    pytest.importorskip("onnx")
    pytest.importorskip(engine)
    classifier, _ = load_classifier(str(pruned), 2)
    dense = classifier.dequantize().base_model.eval()
    dense.set_attn_implementation(attention)
    inputs = measurement.random_inputs(dense.config, 2, 5, ragged=True)
    call = engines.ENGINES[engine](engines.export(dense, inputs), inputs, 1)
    with torch.inference_mode():
        expected = dense(**inputs)[0]
    kept = inputs["attention_mask"] != 0
    found = torch.from_numpy(call())
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)
    assert dense.config._attn_implementation == attention


@pytest.fixture
def int8(cli, own_pruned):
    assert cli("pack", own_pruned, "--dtype", "int8").status == 0
    return own_pruned


def test_int8_beside_its_float32_form(cli, int8):
    run = cli("bench", int8, *QUICK, "--seq", "16", "--json")
    assert run.status == 0, run.stderr
    assert run.data["dtype"] == "int8"
    (row,) = run.data["measurements"]
    assert row["dtype"] == "int8"
    assert set(row["candidates"]) == {"dense", "packed", "packed float32"}
    assert row["best_dense"] == "dense"
    assert row["speedup_over_packed_float32"]["median"] > 0
    floor = row["floor"]
    assert 0 < floor["int8_multiply_adds"] < floor["multiply_adds"]
    least = (
        2e-6 * floor["int8_multiply_adds"] / floor["int8_peak_gops"]
        + 2e-6
        * (floor["multiply_adds"] - floor["int8_multiply_adds"])
        / floor["peak_gflops"]
    )
    assert floor["ms"] == pytest.approx(least, rel=0.05, abs=1e-4)
    assert row["parts"]["ms"]["up"] > 0
    (encoder,) = run.data["encoders"]
    assert encoder["native"]


def test_int8_tables(cli, int8):
    run = cli("bench", int8, *QUICK, "--seq", "8")
    assert run.status == 0, run.stderr
    for text in (
        "embeddings and encoder in int8", "packed float32", "int8, measured",
        "feed-forward down", "arithmetic floor", "8 bits at",
    ):  # fmt: skip
        assert text in run.stdout, text
    run = cli("bench", int8, *QUICK, "--seq", "8,16")
    assert run.status == 0, run.stderr


@pytest.fixture
def bfloat16(cli, own_pruned):
    assert cli("pack", own_pruned, "--dtype", "bfloat16").status == 0
    return own_pruned


def test_bfloat16_beside_its_float32_form(cli, bfloat16):
    run = cli("bench", bfloat16, *QUICK, "--seq", "16", "--json")
    assert run.status == 0, run.stderr
    assert run.data["dtype"] == "bfloat16"
    (row,) = run.data["measurements"]
    assert set(row["candidates"]) == {"dense", "packed", "packed float32"}
    assert row["speedup_over_packed_float32"]["median"] > 0
    assert row["floor"]["times_floor"] > 0  # the arithmetic is that of float32
    model, _ = load_classifier(str(bfloat16), 2)
    before = breakdown.weight_bytes(model)
    assert run.data["memory"]["packed_weight_bytes"] == before
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    weights = sum(layer.float().weight_values.numel() for layer in layers)
    assert breakdown.weight_bytes(model) == before + 2 * weights
    run = cli("bench", bfloat16, *QUICK, "--seq", "8")
    assert run.status == 0, run.stderr
    for text in ("embeddings and encoder in bfloat16", "arithmetic floor"):
        assert text in run.stdout, text


def test_int8_weights_in_memory_are_those_of_the_kernels_too(int8):
    model, _ = load_classifier(str(int8), 2)
    tensors = [*model.parameters(), *model.buffers()]
    found = breakdown.weight_bytes(model) - sum(tensor.nbytes for tensor in tensors)
    layers = [m for m in model.modules() if getattr(m, "is_int8", False)]
    assert len(layers) == 12
    native = sum(layer.matrix.pattern.nbytes for layer in layers)
    assert native >= sum(layer.weight_values.numel() for layer in layers)
    assert found >= native
