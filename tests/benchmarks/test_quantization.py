"""The migration that the benchmark compares with is exact in float32."""

from __future__ import annotations

import pytest
import torch
from encoders import as_float64, assert_rounding, build, text

from benchmarks import quantization_accuracy
from benchmarks.quantization import Scheme, linears, migrate_, pruned, quantized
from pybsp.quantization.linear import FakeQuantizedLinear

GIVEN = [text(2, 9), text(3, 12, seed=1)]


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_migration_changes_nothing_but_rounding(power):
    model = build("bert")
    exact, dense = as_float64(model, GIVEN[0]), model(**GIVEN[0])[0].detach()
    zeros = {name: model.get_submodule(name).weight == 0 for name in linears(model)}
    before = {name: model.get_submodule(name).weight.clone() for name in zeros}
    migrate_(model, linears(model), power, GIVEN)
    assert_rounding(model(**GIVEN[0])[0].detach(), dense, exact)
    for name, mask in zeros.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight == 0, mask)
        assert not torch.equal(weight, before[name])


def test_schemes_quantize_a_copy():
    model = build("bert")
    names = linears(model)
    assert len(names) == 12
    scheme = Scheme("", static="max", keep=(names[0],))
    copy = quantized(model, scheme, GIVEN)
    kinds = [isinstance(copy.get_submodule(n), FakeQuantizedLinear) for n in names]
    assert kinds == [False] + [True] * 11
    assert copy.get_submodule(names[1]).input_scale > 0
    assert not any(isinstance(m, FakeQuantizedLinear) for m in model.modules())
    share = [float((pruned(model, 0.8).get_submodule(n).weight == 0).float().mean())
             for n in names]  # fmt: skip
    assert all(abs(value - 0.8) < 0.01 for value in share)


def test_differences_are_those_of_each_seed():
    forms = ("dense", "float32", "post_training", "longer", "aware")
    differences = quantization_accuracy.DIFFERENCES.values()
    runs = [
        {"task": "sst2", "metrics": ["accuracy"], "dev_examples": 100,
         "changed": {"/".join(two): {"dev": 8} for two in differences},
         "scores": {f: {"accuracy": x} for f, x in zip(forms, scores, strict=True)}}
        for scores in ((0.9, 0.8, 0.79, 0.82, 0.83), (0.9, 0.7, 0.70, 0.71, 0.70))
    ]  # fmt: skip
    head, [row] = quantization_accuracy.summary(runs)
    assert len(head) == len(row)
    assert row == [
        "sst2 (accuracy)", "90.0", "75.0 (80.0, 70.0)", "-0.50 ± 2.00 (-1.00, +0.00)",
        "+1.50 ± 2.00 (+2.00, +1.00)", "+1.50 ± 2.00 (+3.00, +0.00)",
        "+0.00 ± 2.00 (+1.00, -1.00)",
    ]  # fmt: skip


def test_cells_are_those_of_one_variant(tmp_path):
    for name in ("mrpc-layer-error-80-8x1-seed1", "mrpc-reconstruct-80-8x1-seed0",
                 "mrpc-layer-error-80-8x1-seed0", "mrpc-layer-error-90-8x1-seed0",
                 "cola-layer-error-80-8x1-seed0"):  # fmt: skip
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "results.json").touch()
    (tmp_path / "runs" / "rte-layer-error-80-8x1-seed0").mkdir()  # not finished
    found = quantization_accuracy.cells(
        tmp_path, "layer-error", ["cola", "mrpc", "rte"]
    )
    assert [cell.name for cell in found] == [
        "cola-layer-error-80-8x1-seed0", "mrpc-layer-error-80-8x1-seed0",
        "mrpc-layer-error-80-8x1-seed1",
    ]  # fmt: skip
