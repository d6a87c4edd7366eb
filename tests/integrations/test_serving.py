"""Packed models as a service runs them: mapped from the file, in forked and spawned
processes, and called by several threads at once."""

import copy
import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import same_bits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import pybsp
from pybsp.blocks import expand_blocks
from pybsp.integrations.packed_file import PACKED_FILE, metadata_for_file
from pybsp.nn import BlockSparseLinear

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
VOCABULARY = 99


def pruned(seed=0, block_shape=(8, 1)):
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config).eval()
    with torch.no_grad():
        for linear in model.encoder.modules():
            if isinstance(linear, nn.Linear):
                rows, cols = linear.weight.shape
                grid = (rows // block_shape[0], cols // block_shape[1])
                nn.init.normal_(linear.weight, std=0.1)
                linear.weight *= expand_blocks(torch.rand(grid) < 0.4, block_shape)
    return model


@pytest.fixture(autouse=True)
def quiet():
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture
def directory(tmp_path):
    pybsp.save_packed(pruned(), tmp_path / "out", dense=False)
    return tmp_path / "out"


def requests(count, seed=0):
    """Batches of several sizes and lengths, some of them padded."""
    generator = torch.Generator().manual_seed(seed)

    def random(low, high, *shape):
        return torch.randint(low, high, shape or (1,), generator=generator)

    made = []
    for _ in range(count):
        batch, length = int(random(1, 5)), int(random(1, 49))
        inputs = {"input_ids": random(1, VOCABULARY, batch, length)}
        if int(random(0, 3)):
            lengths = random(1, length + 1, batch)
            lengths[0] = length
            inputs["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        made.append(inputs)
    return made


def answer(model, inputs):
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
    # The stock modules give some numbers at padding, which mean nothing.
    mask = inputs.get("attention_mask")
    return states if mask is None else states * mask[..., None]


def answers_are(expected, model, inputs):
    answers = [answer(model, i) for i in inputs]
    return all(map(same_bits, answers, expected))


def weights(model):
    return [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


# ------------------------------------------------------------------- the mapped file


def mapped_addresses(file):
    """The address ranges of this process that show ``file``."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            begin, _, end = line.split()[0].partition("-")
            found.append(range(int(begin, 16), int(end, 16)))
    return found


@linux
@pytest.mark.parametrize("block_shape", [(8, 1), (16, 4), (1, 32)])
def test_weights_are_read_from_the_mapped_file(block_shape, tmp_path):
    dense = pruned(block_shape=block_shape)
    file = pybsp.save_packed(dense, tmp_path / "out", dense=False)
    model = AutoModel.from_pretrained(file.parent)
    inputs = requests(1)[0]
    expected = answer(dense, inputs)
    error = (answer(model, inputs) - expected).norm() / expected.norm()
    assert error < 100 * torch.finfo(torch.float32).eps
    ranges = mapped_addresses(file)
    for layer in weights(model):
        assert layer.block_shape == block_shape
        assert any(layer.weight_values.data_ptr() in r for r in ranges)
        # What lies before them are other blocks, and vectors of the model's width.
        assert layer.weight_values.data_ptr() % 32 == 0
        # Checked when loaded, and the file may be written to: not in the file.
        for indices in (layer.weight_crow_indices, layer.weight_col_indices):
            assert not any(indices.data_ptr() in r for r in ranges)
    embeddings = model.get_input_embeddings().weight
    assert any(embeddings.data_ptr() in r for r in ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", ["a", "Gewicht Größe"])
def test_the_tensors_of_a_file_begin_aligned(dtype, name, tmp_path):
    for count in range(1, 12):
        tensors = {
            **{f"{name}.{i}": torch.zeros(i, 3, dtype=dtype) for i in range(count)},
            "flags": torch.zeros(5, dtype=torch.bool),
            "weight_col_indices": torch.zeros(7, dtype=torch.int16),
        }
        save_file(tensors, tmp_path / "file", metadata_for_file(tensors))
        start = (tmp_path / "file").read_bytes()[:8]
        assert (8 + int.from_bytes(start, "little")) % 64 == 0


def test_tensors_of_any_type_are_saved(tmp_path):
    tensors = {"a": torch.ones(4).to(torch.float8_e4m3fn), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "file", metadata_for_file(tensors))
    loaded = load_file(tmp_path / "file")
    assert loaded["a"].dtype == torch.float8_e4m3fn
    assert same_bits(loaded["b"], tensors["b"])


def test_writing_to_mapped_weights_leaves_the_file_alone(directory):
    model = AutoModel.from_pretrained(directory)
    before = (directory / PACKED_FILE).read_bytes()
    inputs = requests(1)[0]
    expected = answer(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).last_hidden_state.square().mean().backward()
    optimizer.step()
    assert not same_bits(answer(model, inputs), expected)
    assert (directory / PACKED_FILE).read_bytes() == before
    fresh = AutoModel.from_pretrained(directory)
    assert same_bits(answer(fresh, inputs), expected)


def test_a_file_that_is_replaced_or_removed_stays_as_it_was_loaded(directory):
    model = AutoModel.from_pretrained(directory)
    pybsp.save_packed(pruned(seed=1), directory, dense=False)
    other = AutoModel.from_pretrained(directory)
    (directory / PACKED_FILE).unlink()
    for loaded, seed in ((model, 0), (other, 1)):
        dense = pruned(seed)
        for inputs in requests(3):
            expected = answer(dense, inputs)
            error = (answer(loaded, inputs) - expected).norm() / expected.norm()
            assert error < 100 * torch.finfo(torch.float32).eps


def test_copies_of_a_mapped_model_answer_alike(directory):
    model = AutoModel.from_pretrained(directory)
    inputs = requests(1)[0]
    expected = answer(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    shared = copy.deepcopy(model).share_memory()
    for other in (*copies, shared):
        assert same_bits(answer(other, inputs), expected)
    dense = AutoModel.from_pretrained(directory).dequantize()
    assert not weights(dense)
    error = (answer(dense, inputs) - expected).norm() / expected.norm()
    assert error < 100 * torch.finfo(torch.float32).eps


# --------------------------------------------------------------------- other processes


def wait(process):
    process.join(60)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive, "the child hangs"
    return process.exitcode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_a_forked_child_answers(directory):
    torch.set_num_threads(2)
    model = AutoModel.from_pretrained(directory)
    inputs = requests(8)
    expected = [answer(model, i) for i in inputs]

    def child():
        # Torch's rule for its own operations in forked children.
        torch.set_num_threads(1)
        os._exit(0 if answers_are(expected, model, inputs) else 3)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child) for _ in range(2)]
    for process in children:
        process.start()
    assert [wait(process) for process in children] == [0, 0]
    assert answers_are(expected, model, inputs)


def test_a_spawned_child_answers(directory):
    model = AutoModel.from_pretrained(directory).requires_grad_(False)
    inputs = requests(3)
    expected = [answer(model, i).clone() for i in inputs]
    # The model itself is what the child calls; pickling moves it to shared memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for i, e in zip(inputs, expected, strict=True):
            result = pool.apply_async(model, kwds=i).get(timeout=120)
            assert same_bits(result.last_hidden_state, e)
    assert answers_are(expected, model, inputs)


# ---------------------------------------------------------------------- several threads


@pytest.mark.parametrize("torch_threads", [1, 2])
@pytest.mark.usefixtures("threads")
def test_four_threads_answer_as_one(directory, torch_threads):
    torch.set_num_threads(torch_threads)
    model = AutoModel.from_pretrained(directory)
    inputs = requests(300)
    expected = [answer(model, i) for i in inputs]
    barrier = threading.Barrier(4, timeout=60)

    def serve(worker):
        barrier.wait()
        return [answer(model, i) for i in inputs[worker::4]]

    with ThreadPoolExecutor(4) as pool:
        for worker, answers in enumerate(pool.map(serve, range(4), timeout=60)):
            for found, e in zip(answers, expected[worker::4], strict=True):
                assert same_bits(found, e)


@linux
def test_answering_does_not_fill_the_memory(directory):
    """What 2000 answers leave is what the allocator of each thread keeps, about a
    megabyte; a tenth of the answers themselves would be more than the bound."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    model = AutoModel.from_pretrained(directory)
    inputs = requests(50)

    def serve(_):
        return sum(answer(model, i).nbytes for i in inputs)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, range(8)))
        before = resident()
        total = sum(pool.map(serve, range(40)))
        grown = resident() - before
    assert total > 60e6
    assert grown < 0.08 * total, f"{grown} bytes after answers of {total} bytes"
