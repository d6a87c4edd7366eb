"""Whole encoders, from token ids to last hidden states, against other engines.

BERT-base, and the layers of MiniLM-L6, with random weights and zero blocks, the same in
every engine, without padding. Every turn begins with an untimed call, which fetches the
engine's weights into the last cache level that has room for them. ``over_floor`` is the
time over that of the arithmetic alone: kept weights and attention at the multiply-add
peak, which is measured in every round. ``over_dense`` and ``over_deepsparse`` are the
times of the fastest dense peer and of DeepSparse over ours. All three are medians over
the rounds; ``best_...`` is that of the shortest turns of all rounds.
``dense`` is the same call with one zero block in the whole model: dense layers in the
native layout. ``ragged``: tokens a second of 32 rows of the lengths of sst2's
sentences, padded to the longest, over those of as many full rows. Checkpoints with an
accuracy are timed by ``benchmarks.encoder``.

    python -m benchmarks.whole_encoder [--deepsparse PYTHON] [--quick]
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

import pybsp
from benchmarks import deepsparse, peers
from benchmarks.section import Options, Section, Summary, block_text, main, reach
from benchmarks.turns import OneOperation, Rounds, take_turns
from pybsp.blocks import BlockShape, expand_blocks, grid_shape

MODELS = {
    "bert_base": {},
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
}
Case = tuple[str, BlockShape, float, int, int]
#: model, block shape, sparsity, batch, length; the headline's two first.
CASES: tuple[Case, ...] = (
    ("bert_base", (8, 1), 0.8, 1, 128),
    ("minilm", (8, 1), 0.8, 1, 128),
    ("bert_base", (8, 1), 0.8, 1, 16),
    ("bert_base", (8, 1), 0.9, 1, 128),
    ("bert_base", (1, 96), 0.8, 1, 128),
    ("bert_base", (16, 4), 0.8, 1, 128),
    ("bert_base", (8, 1), 0.0, 1, 128),
    ("bert_base", (8, 1), 0.8, 32, 128),
    ("minilm", (8, 1), 0.8, 1, 16),
    ("minilm", (8, 1), 0.8, 32, 128),
)
HEADLINE = CASES[:2]
#: Rounds of one sequence, and of the headline's cases: neighbours come and go within
#: minutes.
MIN_ROUNDS, HEADLINE_ROUNDS = 20, 60
#: Multiply-adds on registers, among the candidates.
PEAK = "peak_gflops"
#: Tokens of the development sentences of sst2 by BERT's tokenizer: 32 quantiles.
SST2_LENGTHS = (
    4, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
    24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 36, 38, 41, 45, 55,
)  # fmt: skip


class FromIds(nn.Module):
    """The last hidden states of token ids, and nothing else, for the exporter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.model(x).last_hidden_state
        return states


def measure(options: Options) -> dict[str, Any]:
    cases = chosen(HEADLINE if options.quick else CASES, options)
    rows = [compare(*case, options, rounds_of(case, HEADLINE)) for case in cases]
    ragged = [ragged_rate(name) for name in MODELS]
    dense = [row for row in rows if row["sparsity"] == 0]
    targets = [
        *headline("bert_base", rows, floor=1.3, dense=5.0, sparse=1.5),
        # The same within 10 %.
        *headline("minilm", rows, floor=1.43, dense=4.5, sparse=1.35),
        *reach("dense layers in the native layout, over the best dense peer",
               [row["over_dense"] for row in dense], median=0.9, form="{:.2f}x"),
        *reach("padded rows of sst2's lengths, tokens a second over full rows",
               [row["of_full"] for row in ragged], every=0.9),
    ]  # fmt: skip
    return {"rows": rows, "ragged": ragged, "targets": targets}


def chosen(cases: tuple[Case, ...], options: Options) -> list[Case]:
    """Those that the options narrow a run to; dense layers have a sparsity of 0."""
    return [
        (name, block, sparsity, batch, tokens)
        for name, block, sparsity, batch, tokens in cases
        if not options.blocks or block in options.blocks
        if not options.sparsities or sparsity in options.sparsities
        if not options.tokens or tokens in options.tokens
    ]


def headline(
    name: str, rows: list[dict[str, Any]], *, floor: float, dense: float, sparse: float
) -> list[dict[str, Any]]:
    """Targets of a model at 80 % in (8, 1) blocks, one sequence of 128 tokens."""
    head = [
        row
        for row in rows
        if (row["model"], row["block_shape"], row["sparsity"], row["batch"], row["M"])
        == (name, [8, 1], 0.8, 1, 128)
    ]
    what = f"{name}, ids to states, 1 x 128, 80 %"
    return [
        *floor_targets(what, head, floor),
        *ratio_targets(f"{what}, over the best dense peer", head, "over_dense", dense),
        *ratio_targets(f"{what}, over DeepSparse", head, "over_deepsparse", sparse),
    ]


def floor_targets(
    what: str, rows: list[dict[str, Any]], floor: float
) -> list[dict[str, Any]]:
    what = f"{what}, time over its arithmetic floor"
    return ratio_targets(what, rows, "over_floor", floor, at_most=True)


def ratio_targets(
    what: str,
    rows: list[dict[str, Any]],
    field: str,
    bound: float,
    *,
    at_most: bool = False,
) -> list[dict[str, Any]]:
    """For the median over the rounds, and for the best turn of each candidate, when
    neighbours took least of its cache and cycles."""
    return [
        target
        for prefix, words in (("", ""), ("best_", ", shortest turns"))
        for target in reach(
            what + words,
            [row[prefix + field] for row in rows if prefix + field in row],
            median=bound, at_most=at_most, form="{:.2f}x",
        )
    ]  # fmt: skip


def rounds_of(case: Case, headline: tuple[Case, ...]) -> int:
    """The least rounds of ``case``; ``headline`` are the cases that take the most."""
    if case[3] > 1:
        return 2
    return HEADLINE_ROUNDS if case in headline else MIN_ROUNDS


def compare(
    name: str, block: BlockShape, sparsity: float, batch: int, length: int,
    options: Options, min_rounds: int,
) -> dict[str, Any]:  # fmt: skip
    model, kept = pruned(name, block, sparsity)
    ids = torch.randint(1000, 30000, (batch, length))
    dense = FromIds(model).eval()  # the exporter restores the mode it finds
    packed = FromIds(pack(model, block)).eval()
    exported = onnx_bytes(dense, ids)
    dense_calls = {"torch": lambda: dense(ids), **peers.onnx_calls(exported, ids)}
    calls: dict[str, Any] = {"pybsp": lambda: packed(ids), **dense_calls}
    expected = copy.deepcopy(dense).double()(ids[:1])
    with contextlib.ExitStack() as stack:
        for peer, call in calls.items():
            check(peer, torch.as_tensor(call())[:1], expected)
        if options.deepsparse:
            server = stack.enter_context(
                deepsparse.serve_model(options.deepsparse, ids, exported)
            )
            check("DeepSparse", server.output[:1], expected)
            calls["DeepSparse"] = server
        # A large batch reads its weights many times and needs no call before.
        rounds = take_turns(
            {PEAK: OneOperation(pybsp.ops.fma_peak), **calls}, seconds=4.0,
            min_rounds=min_rounds, always_warm=batch == 1,
        )  # fmt: skip
    operations = arithmetic(model.config, kept, batch, length)
    sparse = ["DeepSparse"] if options.deepsparse else []
    return {
        **describe(name, model, block, sparsity, batch, length),
        **over_floor(rounds, {PEAK: operations}),
        **over_peers(rounds, calls, over_dense=dense_calls, over_deepsparse=sparse),
    }


def over_floor(rounds: Rounds, operations: Mapping[str, float]) -> dict[str, Any]:
    """Time over that of ``operations`` by kind, as fields of a row."""
    threads = torch.get_num_threads()
    share = {kind: count / threads for kind, count in operations.items()}
    floor = sum(count * rounds.median(kind) for kind, count in share.items())
    least = sum(count * rounds.best(kind) for kind, count in share.items())
    return {
        **{kind: round(threads / rounds.median(kind) / 1e9, 1) for kind in share},
        "floor_ms": round(floor * 1e3, 3),
        "over_floor": round(rounds.over("pybsp", share), 3),
        "best_over_floor": round(rounds.best("pybsp") / least, 3),
    }


def over_peers(
    rounds: Rounds, calls: Iterable[str], **fastest_of: Iterable[str]
) -> dict[str, Any]:
    """Times of all candidates and how many times faster ``pybsp`` is, as fields of a
    row: than each of the others, and than the fastest of some by a name."""
    peers = [peer for peer in calls if peer != "pybsp"]
    ratios = {
        "": {peer: rounds.ratio(peer, "pybsp") for peer in peers},
        "best_": {peer: rounds.best(peer) / rounds.best("pybsp") for peer in peers},
    }
    fields: dict[str, Any] = {
        "times": {peer: rounds.to_dict(peer) for peer in ("pybsp", *peers)},
        "speedup": {peer: round(ratio, 2) for peer, ratio in ratios[""].items()},
    }
    for prefix, ratio in ratios.items():
        for name, some in fastest_of.items():
            if found := [ratio[peer] for peer in some]:
                fields[prefix + name] = round(min(found), 2)
    return fields


def floor_head(rows: list[dict[str, Any]]) -> str:
    has_best = any("best_over_floor" in row for row in rows)
    return "over the floor (best)" if has_best else "over the floor"


def floor_text(row: dict[str, Any]) -> str:
    """Median over the rounds and, where it was recorded, the best of them."""
    best = row.get("best_over_floor")
    return f"{row['over_floor']:.2f}x" + (f" ({best:.2f}x)" if best else "")


def pack(model: Any, block: BlockShape, dtype: str = "float32") -> Any:
    """A packed copy that runs natively."""
    packed = copy.deepcopy(model)
    report = pybsp.pack_(packed, block_shape=block, min_gain=0, dtype=dtype)
    assert all(encoder.native for encoder in report.encoders), report.encoders
    return packed


def describe(
    name: str, model: Any, block: BlockShape, sparsity: float, batch: int, length: int,
    dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """What was timed, for a row."""
    return {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "batch": batch,
        "M": length,
        "block_shape": list(block),
        "sparsity": sparsity,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "isa": pybsp.ops.active_isa(),
    }


def arithmetic(config: BertConfig, kept: int, batch: int, length: int) -> int:
    """Operations of a call: kept weights, and two products of (length, length, hidden)
    a layer for attention."""
    attention = config.num_hidden_layers * 2 * length * config.hidden_size
    return 2 * batch * length * (kept + attention)


def ragged_rate(name: str) -> dict[str, Any]:
    """Tokens a second of padded rows over those of full ones, in turns."""
    model, _ = pruned(name, (8, 1), 0.8)
    pybsp.pack_(model, block_shape=(8, 1), min_gain=0)
    lengths = torch.tensor(SST2_LENGTHS)
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    # Full rows of as many tokens: a longer sequence has more attention for each.
    ids = torch.randint(1000, 30000, (len(lengths), longest))
    calls = {
        "ragged": lambda: model(ids, attention_mask=mask),
        "full": lambda: model(ids),
    }
    rounds = take_turns(calls, seconds=3.0, min_rounds=7, always_warm=True)
    per_token = rounds.ratio("full", "ragged") * int(lengths.sum()) / ids.numel()
    return {
        "model": name,
        "rows": len(lengths),
        "longest": longest,
        "tokens": int(lengths.sum()),
        "times": {kind: rounds.to_dict(kind) for kind in calls},
        "of_full": round(per_token, 3),
    }


def pruned(name: str, block: BlockShape, sparsity: float) -> tuple[Any, int]:
    """A random model with zero blocks in its encoder's linear weights, one at least in
    all, and how many of these weights are kept."""
    torch.manual_seed(0)
    config = BertConfig(**MODELS[name])
    model = BertModel(config, add_pooling_layer=False).eval()
    kept = 0
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            scores = torch.rand(grid_shape(module.weight.shape, block))
            keep = round((1 - sparsity) * scores.numel())
            if kept == 0:
                keep = min(keep, scores.numel() - 1)
            mask = pybsp.ops.block_mask(scores, keep)
            module.weight.mul_(expand_blocks(mask, block))
            kept += int(mask.sum()) * block[0] * block[1]
    return model, kept


def onnx_bytes(states: FromIds, ids: torch.Tensor) -> bytes:
    """The exporter takes eager attention; torch, a peer too, is left its fastest."""
    buffer = io.BytesIO()
    model = copy.deepcopy(states)
    model.model.set_attn_implementation("eager")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The exporter warns about itself and about traced shapes, both intended.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (ids,), buffer, input_names=["x"], output_names=["y"],
            opset_version=14, dynamo=False,
        )  # fmt: skip
    return buffer.getvalue()


def check(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Hidden states are normalised: ten thousandths are many roundings, no mistake."""
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-3, msg=lambda text: f"{what}: {text}"
    )


def summary(data: dict[str, Any]) -> Summary:
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["speedup"]))
    head = [
        "model",
        "block",
        "sparsity",
        "batch x tokens",
        "ms",
        floor_head(data["rows"]),
        *names,
    ]
    rows = [
        [
            row["model"],
            block_text(row["block_shape"]),
            f"{row['sparsity']:.0%}" if row["sparsity"] else "dense",
            f"{row['batch']} x {row['M']}",
            f"{row['times']['pybsp']['median_ms']:.2f}",
            floor_text(row),
            *(f"{row['speedup'].get(name, float('nan')):.2f}x" for name in names),
        ]
        for row in data["rows"]
    ]
    return head, rows


SECTION = Section("whole_encoder", measure, summary)

if __name__ == "__main__":
    main(SECTION, __doc__)
