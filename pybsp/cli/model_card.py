"""The README.md that lies beside a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .reporting import megabytes

#: Hub names of the models that packages carry.
HUB_NAMES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}

BODY = """\
# {title}

{model} fine-tuned on {task}, then pruned in blocks of {blocks} (out x in) with
[pybsp](https://pypi.org/project/pybsp/): {removed:.1f} % of {counted} are zero.

## Use

```python
import pybsp  # lets transformers load the packed weights
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/folder")
```

Without `import pybsp` the same folder loads as an ordinary dense model with the same
outputs.

## Results

| | dense | right after the {last}cut | pruned and retrained |
| --- | ---: | ---: | ---: |
{scores}

Evaluated on the {dev} dev examples of {task}, trained on {train}; seed {seed}.{cuts}
Cutting the dense model to the same sparsity by block norms alone, without any training,
gives {magnitude}.

| | dense | packed | ratio |
| --- | ---: | ---: | ---: |
| encoder, file size | {dense_size} | {packed_size} | {size_ratio:.2f} |
{latency}

Latency: {what}, batch {batch}, {sequence} tokens, {threads} thread(s), float32, on
{cpu} ({isa}); median of {rounds} interleaved rounds. {versions}.

![kept blocks](kept_blocks.png)

## Density of the pruned layers

| layer | shape | block | density |
| --- | --- | --- | ---: |
{layers}

Every number above is in `results.json`, with the command that made it.
"""


def model_card(results: Mapping[str, Any]) -> str:
    """The card as Markdown with a YAML head, from the contents of ``results.json``."""
    return f"---\n{front_matter(results)}\n---\n\n{body(results)}"


def front_matter(results: Mapping[str, Any]) -> str:
    """The YAML that the Hugging Face hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    task, scores = results["task"], results["scores"]["final"]
    data = ModelCardData(
        base_model=base_model(results["model"]["name"]),
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["pybsp", "block-sparse", "pruned"],
        model_name=results["title"],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type="glue" if task["name"] != "stdlib" else "stdlib",
                dataset_name=task["name"],
                dataset_split="dev",
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in scores.items()
        ],
    )
    return str(data.to_yaml()).strip()


def base_model(name: str) -> str | None:
    """The hub name of the model that was pruned; None for a directory."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return None if is_path or " " in name or "/" not in name else name


def first_cuts(cuts: Sequence[Mapping[str, Any]], metric: str) -> str:
    """What the model was worth at the sparsities before the last, in a sentence."""
    if not cuts:
        return ""
    ways = [
        f"{100 * cut['sparsity']:g} % ({metric} {cut['scores'][metric]:.4f})"
        for cut in cuts
    ]
    return f" Cut and trained on the way at {', '.join(ways)}."


def body(results: Mapping[str, Any]) -> str:
    sparsity, files, latency = (
        results[key] for key in ("sparsity", "files", "latency")
    )
    environment, scores = results["environment"], results["scores"]
    metric = results["metric"]
    task = results["task"]
    return BODY.format(
        title=results["title"],
        model=base_model(results["model"]["name"]) or results["model"]["architecture"],
        task=task["name"],
        blocks=" x ".join(map(str, results["config"]["block_shape"])),
        removed=100 * sparsity["reached"],
        counted=sparsity["counted"],
        scores="\n".join(
            f"| {name} | {scores['dense'][name]:.4f} | {scores['after_cut'][name]:.4f} "
            f"| {scores['final'][name]:.4f} |"
            for name in task["metrics"]
        ),
        last="last " if results["first_cuts"] else "",
        cuts=first_cuts(results["first_cuts"], metric),
        dev=task["dev_examples"],
        train=task["train_examples"],
        seed=results["options"]["seed"],
        magnitude=f"{metric} {scores['magnitude_cut'][metric]:.4f}",
        dense_size=megabytes(files["dense_encoder_bytes"]),
        packed_size=megabytes(files["packed_encoder_bytes"]),
        size_ratio=files["encoder_ratio"],
        latency=_latency_rows(latency),
        what=latency["what"],
        batch=latency["batch"],
        sequence=latency["sequence"],
        threads=latency["threads"],
        cpu=environment["cpu"],
        isa=environment["isa"],
        rounds=latency["candidates"]["dense"]["rounds"],
        versions=", ".join(
            f"{name} {number}" for name, number in environment["versions"].items()
        ),
        layers="\n".join(
            f"| `{row['name']}` | {' x '.join(map(str, row['shape']))} | "
            f"{' x '.join(map(str, row['block_shape']))} | {row['density']:.3f} |"
            for row in results["layers"]
        ),
    )


def _latency_rows(latency: Mapping[str, Any]) -> str:
    packed = latency["candidates"]["packed"]["median_ms"]
    return "\n".join(
        f"| latency, {'torch' if name == 'dense' else name} | "
        f"{timing['median_ms']:.2f} ms | {packed:.2f} ms | "
        f"{packed / timing['median_ms']:.2f} |"
        for name, timing in latency["candidates"].items()
        if name != "packed"
    )
