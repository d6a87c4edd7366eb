"""Tables and pictures of the documentation, from result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import figures, layers, result, section, tables
from benchmarks.sections import SECTIONS
from pybsp.cli import environment

ROW = {"layer": "bert_base_ffn_up", "M": 128, "K": 768, "N": 3072, "peak_gflops": 240.0}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for result files."""
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def test_every_table_of_the_documentation_is_known() -> None:
    for page in tables.PAGES:
        text = (tables.ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table:(\w+) -->", text):
            assert name in tables.TABLES, (page, name)


@pytest.mark.usefixtures("results")
def test_targets_stand_beside_their_cpu_and_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cpu, isa, name, found in (
        ("AMD EPYC", "avx512_vnni", "kernel", 0.9),
        ("Intel(R) Xeon(R) Processor", "amx", "kernel_xeon", 0.5),
    ):
        where = {"cpu": cpu, "isa": isa}
        monkeypatch.setattr(environment, "describe", lambda where=where: where)
        targets = section.reach("speed", [found], every=0.8)
        result.save(name, {"rows": [], "targets": targets})
    command = "`python -m benchmarks.kernel`"
    assert tables.numbers().splitlines()[2:] == [
        f"| speed | >= 0.80 | 0.90 | yes | AMD, avx512_vnni | {command} |",
        f"| speed | >= 0.80 | 0.50 | **no** | Intel, amx | {command} |",
    ]
    kinds = [line.split(", ")[0] for line in tables.machine().splitlines()]
    assert kinds == ["- AMD EPYC", "- Intel(R) Xeon(R) Processor"]
    assert tables.machine().endswith(": kernel_xeon")


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("part", SECTIONS, ids=lambda part: part.name)
def test_a_section_without_results_names_its_command(part: section.Section) -> None:
    assert tables.TABLES[part.name]() == f"Run `python -m benchmarks.{part.name}`."


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_picture_without_results_is_left_out(name: str) -> None:
    assert figures.FIGURES[name]() is None


def write_run(place: Path, dense: float, packed: float, **more: object) -> None:
    """What ``pybsp glue`` leaves of a run."""
    scores = {"dense": {"accuracy": dense}, "packed": {"accuracy": packed}}
    text = json.dumps({"scores": scores, "options": {}, **more})
    place.parent.mkdir(exist_ok=True)
    place.with_name(f"{place.name}.json").write_text(text, encoding="utf-8")


def test_the_dense_score_is_that_of_the_headline_or_of_most_seeds(
    results: Path,
) -> None:
    for name, dense in (
        ("mrpc-reconstruct-44-8x1-seed0", 0.86),
        ("mrpc-reconstruct-80-8x1-seed0", 0.80),
        ("mrpc-reconstruct-80-8x1-seed1", 0.90),
        ("mrpc-layer-error-80-8x1-seed2", 0.10),
        ("cola-reconstruct-44-8x1-seed0", 0.30),
        ("cola-reconstruct-80-8x1-seed0", 0.31),
        ("cola-reconstruct-90-8x1-seed0", 0.32),
    ):
        write_run(results / "glue" / name, dense, packed=0.5)
    found = tables.by_variant("reconstruct")
    assert tables.mean_dense(found, "mrpc") == pytest.approx(85.0)
    assert tables.mean_dense(found, "cola") == pytest.approx(31.0)


def test_studies_stand_beside_the_dense_model(results: Path) -> None:
    for name, dense, packed in (
        ("mrpc-reconstruct-80-8x1-seed0", 0.86, 0.85),
        ("mrpc-reconstruct-80-8x1-seed1", 0.88, 0.86),
        ("cola-reconstruct-80-8x1-seed0", 0.30, 0.31),
        ("mrpc-reconstruct-44-8x1-seed0", 0.86, 0.87),
        ("mrpc-logits-alone-80-8x1-seed0", 0.86, 0.84),
        ("cola-logits-alone-80-8x1-seed0", 0.30, 0.28),
        ("mrpc-dropout-44-8x1-seed0", 0.86, 0.90),
        ("mrpc-dropout-90-8x1-seed0", 0.86, 0.10),
    ):
        fidelity = {"fidelity": {"logits": 1 - packed}} if "mrpc" in name else {}
        write_run(results / "glue" / name, dense, packed, **fidelity)
    times = {"packed": {"median_ms": 2.0}, "dense": {"median_ms": 9.0},
             "openvino": {"median_ms": 8.0}}  # fmt: skip
    row = {"run": "mrpc-reconstruct-80-8x1-seed0", "candidates": times}
    result.save("encoder_zen4", {"rows": [row]})
    assert tables.glue().splitlines()[2:] == [
        "|  | dense | 87.0 | 30.0 |  |  |  |",
        "| (8, 1) | 44% | 87.0 (+1.0) |  | +1.0 |  |  |",
        "| (8, 1) | 80% | 85.5 +- 0.7 (-1.5) | 31.0 (+1.0) | -0.2 | 2.00 | 4.0x |",
    ]
    assert tables.glue("layer-error").splitlines()[2:] == ["|  | dense |  |  |  |"]
    assert tables.variants(usual="reconstruct").splitlines()[2:] == [
        "| reconstruct | (8, 1) | 44% | 87.0 (+1.0) |  |  |  |",
        "| dropout | (8, 1) | 44% | 90.0 (+4.0) |  | +3.0 | 0.77x |",
        "| reconstruct | (8, 1) | 80% | 85.0 (-1.0) | 31.0 (+1.0) |  |  |",
        "| logits-alone | (8, 1) | 80% | 84.0 (-2.0) | 28.0 (-2.0) | -2.0 +- 1.0 "
        "| 1.07x |",
    ]
    assert figures.accuracy() is not None


def test_all_rows_of_a_task_take_the_place_of_a_part(results: Path) -> None:
    write_run(results / "glue" / "mrpc-layer-error-80-8x1-seed0", 0.86, 0.85)
    write_run(results / "glue" / "sst2-layer-error-80-8x1-seed0", 0.88, 0.80)
    write_run(results / "glue_whole" / "sst2-layer-error-80-8x1-seed0", 0.90, 0.89)
    write_run(results / "glue" / "cola-reconstruct-80-8x1-seed0", 0.30, 0.31)
    write_run(results / "glue_whole" / "sst2-reconstruct-80-8x1-seed0", 0.91, 0.92)
    assert tables.whole_tasks().splitlines() == [
        "| variant | sparsity | mrpc | cola | sst2 | mean change |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| reconstruct | dense |  | 30.0 | 91.0 |  |",
        "|  | 80% |  | 31.0 (+1.0) | 92.0 (+1.0) | +1.0 |",
        "| layer-error | dense | 86.0 |  | 90.0 |  |",
        "|  | 80% | 85.0 (-1.0) |  | 89.0 (-1.0) | -1.0 |",
    ]


@pytest.mark.usefixtures("results")
def test_memory_and_service_are_shown_as_they_were_saved() -> None:
    parts = {"total": 9.0, "file": 5.0, "anonymous": 3.0, "libraries": 1.0}
    times = dict.fromkeys(
        ("load_s", "load_again_s", "load_and_answer_s", "from_disk_s"), 0.25
    )
    memory = dict.fromkeys(("load", "first answer", "51 answers", "all words"), parts)
    form = {"form": "packed", "file_mb": 8.0, "held_over_file": 1.0,
            "memory_mb": memory, **times}  # fmt: skip
    result.save("memory", {"rows": [form]})
    lines = tables.memory().splitlines()
    assert lines[0] == "|  | packed |"
    assert "| of these: pages of the file | 5.0 |" in lines
    assert lines[-1].endswith("over the file | 1.00x |")
    assert tables.loading().count("| 0.250 |") == 4
    megabytes = [{"anonymous": 300.0}, {"anonymous": 301.5}]
    result.save("service", {"requests": 10000, "threads": 4, "errors": [], "wrong": [],
                            "serial_s": 8.0, "seconds": 5.0,
                            "memory_mb": megabytes})  # fmt: skip
    assert (
        tables.service()
        .splitlines()[-1]
        .endswith("| 10,000 | 0 | 0 | 8.0 | 5.0 | 300.0 | 301.5 |")
    )


def test_the_best_8_bit_peer_is_dense_and_another() -> None:
    times = {"pybsp int8": 1.0, "torch.ao sparse int8 1x4": 2.0, "openvino": 3.0,
             "torch int8 dynamic": 5.0, "openvino int8": 4.0}  # fmt: skip
    row = {"times": {name: {"median_ms": time} for name, time in times.items()}}
    assert figures._best_int8(row) == 4.0


def test_blocks_are_compared_with_the_usual_ones_first(results: Path) -> None:
    for block, packed in (("16x4", 0.82), ("1xinover8", 0.79), ("8x1", 0.84)):
        write_run(results / "glue" / f"mrpc-layer-error-80-{block}-seed0", 0.86, packed)
    assert tables.blocks().splitlines()[2:] == [
        "| layer-error | (8, 1) | 80% | 84.0 (-2.0) |  |  |",
        "| layer-error | (1, in/8) | 80% | 79.0 (-7.0) | -5.0 |  |",
        "| layer-error | (16, 4) | 80% | 82.0 (-4.0) | -2.0 |  |",
    ]


def test_an_ablation_has_its_own_folder_and_its_own_variants(results: Path) -> None:
    for variant, packed in (("no-penalty", 0.80), ("fixed", 0.82), ("dropout", 0.99)):
        write_run(results / "ablation" / f"mrpc-{variant}-80-8x1-seed0", 0.86, packed)
    head, _, *rows = tables.TABLES["ablation_penalty"]().splitlines()
    assert "against `no-penalty`" in head
    assert rows == [
        "| fixed | (8, 1) | 80% | 82.0 (-4.0) | +2.0 |  |",
        "| no-penalty | (8, 1) | 80% | 80.0 (-6.0) |  |  |",
    ]
    assert tables.TABLES["ablation_recipe"]().count("\n") == 1


@pytest.mark.usefixtures("results")
def test_pictures_show_what_was_measured() -> None:
    rows = [
        {**ROW, "block_shape": list(block), "sparsity": 0.8, "of_peak": 0.5,
         "best_dense_ms": 4.0, "over_line": {"49": 0.1},
         "milliseconds": {"48": 0.3, "49": 0.4, "0.80": 0.9}}
        for block in layers.BLOCKS
    ]  # fmt: skip
    result.save("block_sparse_linear", {"rows": rows})
    by_tokens = [{**row, "milliseconds": {"48": 0.3, "49": 0.4}} for row in rows]
    result.save("tokens", {"rows": by_tokens})
    by_sparsity = [{**row, "milliseconds": {"0.50": 2.0, "0.80": 0.9}} for row in rows]
    result.save("work", {"rows": by_sparsity})
    for name, draw in figures.FIGURES.items():
        figure = draw()
        if name == "accuracy":
            continue
        assert isinstance(figure, Figure), name
        for axis in figure.axes:
            assert axis.get_xlabel(), name
            assert axis.get_ylabel(), name
            legend = axis.get_legend()
            assert legend is not None, name
            labels = " ".join(text.get_text() for text in legend.get_texts())
            for block in layers.BLOCKS:
                assert section.block_text(block) in labels, name
