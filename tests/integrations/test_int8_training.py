"""What int8 training has computed is what the packed model computes."""

from __future__ import annotations

import copy

import pytest
import torch
from encoders import build, text

from pybsp import QuantizationAwareTraining, pack_
from pybsp.quantization import calibrate


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_packed_after_int8_training(name, static):
    model = build(name, "ForSequenceClassification").train()
    batches = [text(4, 16, seed=seed) for seed in range(3)]
    qat = QuantizationAwareTraining(model)
    if static:
        found = calibrate(model, batches, qat.modules)
        qat = QuantizationAwareTraining(model, input_scales=found)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    qat.begin()
    for batch in batches:
        model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    arguments = text(3, 20, "right", seed=9)
    scales = qat.finalize()
    calibration = scales if static else None
    packed = copy.deepcopy(model)
    again = QuantizationAwareTraining(model, input_scales=calibration)
    again.begin()
    pack_(packed, block_shape=(8, 1), dtype="int8", min_gain=0, fuse=False,
          shrink=False, calibration=calibration)  # fmt: skip
    with torch.inference_mode():
        assert torch.equal(packed(**arguments).logits, model(**arguments).logits)
