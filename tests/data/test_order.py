from itertools import pairwise

import pytest

from seqtrain.data.order import permute, window_at


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_bijection(size):
    for epoch in range(3):
        assert sorted(permute(place, size, 7, epoch) for place in range(size)) == list(range(size))


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(permute(place, 50, seed, epoch) for place in range(50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_pinned():
    # A change of the order silently breaks every run that is resumed.
    expected = [(0, 0), (0, 7), (0, 2), (0, 5), (0, 9), (0, 6), (0, 3), (0, 4), (0, 1), (0, 8), (1, 2), (1, 3)]
    assert [window_at(sample, 10, 0) for sample in range(12)] == expected


def test_neighbours_are_scattered():
    size = 10_000
    order = [permute(place, size, 1, 0) for place in range(size)]
    steps = sum(abs(a - b) for a, b in pairwise(order)) / (size - 1)
    # Two independent uniform places lie a third of the range apart; 10,000 pairs leave a deviation of under 1%.
    assert steps == pytest.approx(size / 3, rel=0.03)


def test_huge_ranges_need_no_table():
    size = 2**45 + 3
    images = {permute(place, size, 1, 0) for place in range(1000)}
    assert len(images) == 1000
    assert max(images) > size // 2
    assert max(images) < size
