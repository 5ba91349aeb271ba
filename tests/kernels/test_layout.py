"""The chunk layout: every token lies in exactly one chunk, and states meet their documents' chunks in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqtrain.kernels.layout import chunk_layout
from seqtrain.testing import boundaries

CPU = torch.device("cpu")


def packed(lengths, chunk=16, smallest_chunk=16):
    return chunk_layout(1, sum(lengths), boundaries(lengths), chunk=chunk, device=CPU, smallest_chunk=smallest_chunk)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(1, 12), st.integers(1, 3))
def test_take_and_put_cover_every_token_once(lengths, limit, heads):
    tokens = sum(lengths)
    x = 1 + torch.arange(tokens * heads * 2, dtype=torch.float32).view(1, tokens, heads, 2)
    back = torch.zeros_like(x)
    total = torch.zeros(())
    for segment in packed(lengths).segments(limit):
        rows = segment.take(x, torch.float32)
        assert rows.shape == (segment.chunks * heads, 16, 2)
        total += rows.sum(dtype=torch.float64)
        segment.put(back, rows)
    assert torch.equal(back, x)
    assert total == x.sum(dtype=torch.float64), "padding is not zero, or a token was taken twice"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(1, 12))
def test_steps_carry_each_documents_state_through_its_own_chunks(lengths, limit):
    heads, tokens = 2, sum(lengths)
    x = torch.randint(1, 100, (1, tokens, heads, 1), dtype=torch.float64)
    initial = torch.randint(1, 100, (len(lengths), heads, 1), dtype=torch.float64)
    layout = packed(lengths)
    carry = layout.sort_states(initial).flatten(0, 1)
    before = torch.empty_like(x)  # what the state is when a token's chunk begins
    for segment in layout.segments(limit):
        rows = segment.take(x, torch.float64)
        starts = torch.empty(rows.shape[0], 1, dtype=torch.float64)
        for where, count in segment.steps(heads):
            starts[where] = carry[:count]
            carry[:count] += rows[where].sum(1)
        segment.put(before, starts[:, None].expand(-1, 16, -1))
    final = layout.restore_states(carry.view_as(initial))

    ends = torch.tensor(lengths).cumsum(0).tolist()
    for n, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        document = x[0, end - length : end]
        assert torch.equal(final[n], initial[n] + document.sum(0))
        for t in range(length):
            expected = initial[n] + document[: t // 16 * 16].sum(0)
            assert torch.equal(before[0, end - length + t], expected)


@pytest.mark.parametrize("tokens", [0, 1, 16, 33])
def test_plain_rows_are_documents_of_equal_length(tokens):
    x = torch.randn(3, tokens, 2, 4)
    plain = chunk_layout(3, tokens, None, chunk=16, device=CPU)
    flat = chunk_layout(1, 3 * tokens, boundaries([tokens] * 3), chunk=16, device=CPU)
    assert plain.counts == flat.counts
    for a, b in zip(plain.segments(4), flat.segments(4), strict=True):
        assert torch.equal(a.take(x, torch.float32), b.take(x.view(1, 3 * tokens, 2, 4), torch.float32))


def test_segments_hold_at_most_their_limit_of_chunks_but_whole_steps():
    layout = packed([100, 16, 90, 16, 5])
    assert layout.counts == (5, 2, 2, 2, 2, 2, 1)
    assert [segment.counts for segment in layout.segments(4)] == [(5,), (2, 2), (2, 2), (2, 1)]


def test_chunks_shrink_where_documents_are_short():
    assert packed([3] * 20, chunk=64).chunk == 16
    assert packed([640] * 3, chunk=64).chunk == 64
    assert packed([3] * 20, chunk=64, smallest_chunk=64).chunk == 64


def test_layouts_are_cached_by_their_boundaries():
    assert packed([5, 7]) is packed([5, 7])
    assert packed([5, 7]) is not packed([7, 5])


def test_a_layout_first_met_in_inference_mode_serves_training():
    with torch.inference_mode():
        segment = packed([11, 31, 2]).segments(100)[0]
        segment.take(torch.randn(1, 44, 2, 3), torch.float32)
    x = torch.randn(1, 44, 2, 3, requires_grad=True)
    segment.take(x, torch.float32).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
