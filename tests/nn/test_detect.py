import pytest
import torch

from pybsp.blocks import expand_blocks
from pybsp.nn.detect import detect_block_shape


def blocks_of_zeros(shape, block_shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = (shape[0] // block_shape[0], shape[1] // block_shape[1])
    mask = torch.rand(grid, generator=generator) < density
    weight = torch.randn(shape, generator=generator)
    return weight * expand_blocks(mask, block_shape)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "block_shape", [(8, 1), (1, 8), (16, 4), (4, 4), (32, 32), (1, 48), (2, 1), (3, 5)]
)
def test_finds_the_shape_that_made_the_zeros(block_shape, density):
    weight = blocks_of_zeros((384, 480), block_shape, density)
    assert detect_block_shape(weight) == block_shape


@pytest.mark.parametrize("block_shape", [(1, 480), (384, 1), (48, 480)])
def test_whole_rows_and_columns(block_shape):
    weight = blocks_of_zeros((384, 480), block_shape, 0.5)
    assert detect_block_shape(weight) == block_shape


@pytest.mark.parametrize("density", [0.005, 0.05, 0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_scattered_zeros_are_no_blocks(density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(384, 384, generator=generator)
    weight *= torch.rand(384, 384, generator=generator) < density
    assert detect_block_shape(weight) is None


def test_blocks_with_scattered_zeros_inside_are_not_explained():
    weight = blocks_of_zeros((384, 384), (8, 1), 0.5)
    weight *= torch.rand(384, 384, generator=torch.Generator().manual_seed(1)) < 0.5
    assert detect_block_shape(weight) is None


def test_a_few_chance_zeros_inside_blocks_do_not_hide_the_shape():
    weight = blocks_of_zeros((384, 384), (8, 1), 0.2)
    nonzero = weight.nonzero()[::500]
    weight[nonzero[:, 0], nonzero[:, 1]] = 0
    assert detect_block_shape(weight) == (8, 1)


def test_no_zeros_and_only_zeros():
    assert detect_block_shape(torch.ones(8, 8)) is None
    assert detect_block_shape(torch.zeros(8, 8)) == (8, 8)
