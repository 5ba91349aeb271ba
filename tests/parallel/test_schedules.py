"""Cuts of a state: as many blocks as asked for, each number in one of them, and back together again."""

import pytest
import torch

from seqtrain.kernels.affine import AffineShape
from seqtrain.parallel.schedules.pipeline import cut


@pytest.mark.parametrize("blocks", [1, 3, 8, 12, 64, 10_000])
@pytest.mark.parametrize(
    "shape",
    [
        AffineShape(rows=1, depth=1, columns=30, identity=True),
        AffineShape(rows=24, depth=1, columns=5, identity=False),
        AffineShape(rows=6, depth=4, columns=5, identity=False),
        AffineShape(rows=1, depth=3, columns=7, identity=False),
    ],
)
def test_a_cut_holds_every_number_once(shape, blocks):
    grid = cut(shape, blocks)
    count = len(grid.rows) * len(grid.columns)
    assert min(blocks, shape.rows * shape.columns) <= count < 2 * blocks
    for sizes in (grid.rows, grid.columns):
        assert max(sizes) - min(sizes) <= 1
    state = torch.arange(shape.state_numbers).view(shape.rows, shape.depth, shape.columns)
    views = grid.views(state)
    assert [view.numel() for view in views] == grid.sizes(shape)
    assert torch.equal(torch.cat([view.reshape(-1) for view in views]).sort().values, state.flatten())


@pytest.mark.parametrize(("blocks", "in_order"), [(4, True), (20, False)])
def test_blocks_come_together_again(blocks, in_order):
    shape = AffineShape(rows=6, depth=4, columns=5, identity=False)
    grid = cut(shape, blocks)
    state = torch.arange(shape.state_numbers).view(shape.rows, shape.depth, shape.columns)
    flat = torch.cat([view.reshape(-1) for view in grid.views(state)])
    assert grid.in_order(shape) == in_order
    whole = grid.assemble(flat, grid.flat_views(flat, shape), shape)
    assert torch.equal(whole, state)
    assert (whole.data_ptr() == flat.data_ptr()) == in_order
