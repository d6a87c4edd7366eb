"""One linear layer: ``pybsp.block_sparse_linear`` against dense and BSR peers.

Row-major in and out, bias added, weights warm, one thread. ``of_peak`` is
``2 M nnz / time`` over the register-only multiply-add peak taken in the same run;
skipped zeros do not count as work.

    python -m benchmarks.block_sparse_linear [--tokens 1 16 128] [--sparsity 0.8]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import pybsp
from benchmarks import result
from pybsp.blocks import BlockShape, expand_blocks, resolve_block_shape
from pybsp.cli.timing import interleaved, torch_threads

SHAPES = {
    "minilm_attention": (384, 384),
    "minilm_ffn_up": (1536, 384),
    "minilm_ffn_down": (384, 1536),
    "bert_base_attention": (768, 768),
    "bert_base_ffn_up": (3072, 768),
    "bert_base_ffn_down": (768, 3072),
}
BLOCKS = [(8, 1), (16, 4), (32, 32), (1, "in/8")]


def onnxruntime_linear(
    weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor
) -> Callable[[], Any] | None:
    """The dense layer in ONNX Runtime; None when it is not installed."""
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["t"]),
            helper.make_node("Add", ["t", "b"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor_value_info(
                "y", TensorProto.FLOAT, [x.shape[0], weight.shape[0]]
            )
        ],
        [
            numpy_helper.from_array(weight.t().contiguous().numpy(), "w"),
            numpy_helper.from_array(bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def measure(
    shape: tuple[int, int], block_shape: BlockShape, sparsity: float, tokens: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    grid = (shape[0] // block_shape[0], shape[1] // block_shape[1])
    scores = torch.rand(grid, generator=generator)
    mask = pybsp.ops.block_mask(scores, round((1 - sparsity) * scores.numel()))
    weight = torch.randn(shape, generator=generator) * expand_blocks(mask, block_shape)
    bias = torch.randn(shape[0], generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator)
    matrix = pybsp.BlockSparseMatrix.from_dense(weight, block_shape)
    calls: dict[str, Callable[[], Any]] = {
        "pybsp": lambda: pybsp.block_sparse_linear(x, matrix, bias),
        "torch": lambda: F.linear(x, weight, bias),
    }
    onnx_call = onnxruntime_linear(weight, bias, x)
    if onnx_call is not None:
        calls["onnxruntime"] = onnx_call
    if block_shape[0] == block_shape[1] and tokens > 1:
        bsr, columns = weight.to_sparse_bsr(block_shape), x.t().contiguous()
        calls["torch_bsr"] = lambda: bsr @ columns
    expected = x.double() @ weight.double().T + bias.double()
    for name, call in calls.items():
        found = torch.as_tensor(call())
        found = found.t() + bias if name == "torch_bsr" else found
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    peak = pybsp.ops.fma_peak()
    times = interleaved(calls, seconds=0.4, min_rounds=15, max_rounds=400)
    dense = min(
        times[name].median for name in ("torch", "onnxruntime") if name in times
    )
    work = 2 * tokens * matrix.values.numel()
    return {
        "shape": list(shape),
        "block_shape": list(block_shape),
        "sparsity": sparsity,
        "tokens": tokens,
        "times": {name: timing.to_dict() for name, timing in times.items()},
        "speedup_over_best_dense": round(dense / times["pybsp"].median, 2),
        "gflops": round(work / times["pybsp"].median / 1e6, 1),
        "of_peak": round(work / (times["pybsp"].median * 1e-3) / peak, 3),
    }


def grid(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, shape in SHAPES.items():
        for spec in BLOCKS:
            for sparsity in arguments.sparsity:
                for tokens in arguments.tokens:
                    block_shape = resolve_block_shape(spec, shape)
                    yield name, measure(shape, block_shape, sparsity, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    arguments = parser.parse_args()
    table = Table(
        "layer", "block", "sparsity", "M", "pybsp ms", "best dense", "of peak"
    )
    rows = []
    with torch.inference_mode(), torch_threads(1):
        for name, row in grid(arguments):
            rows.append({"layer": name, **row})
            table.add_row(
                name,
                "x".join(map(str, row["block_shape"])),
                f"{row['sparsity']:.0%}",
                str(row["tokens"]),
                f"{row['times']['pybsp']['median_ms']:.3f}",
                f"{row['speedup_over_best_dense']:.2f}x",
                f"{row['of_peak']:.0%}",
            )
    Console().print(table)
    print(result.save("block_sparse_linear", {"threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
