"""A sequence hands document boundaries, state and backend to any operator, and knows each token's place."""

import torch

from seqtrain.parallel.sequence import SequenceContext


def test_positions_restart_with_each_document():
    boundaries = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert SequenceContext(boundaries).positions(7, boundaries.device).tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert SequenceContext().positions(4, boundaries.device).tolist() == [0, 1, 2, 3]


def test_an_operator_gets_what_the_sequence_knows():
    def operator(x, *, power, initial_state, cu_seqlens, backend):
        return x**power, (initial_state, cu_seqlens, backend)

    boundaries = torch.tensor([0, 2])
    out, came = SequenceContext(boundaries, backend="chunked").run(
        operator, torch.full((1, 2), 3.0), power=2, initial_state="past"
    )
    assert out.tolist() == [[9.0, 9.0]]
    assert came == ("past", boundaries, "chunked")


def test_a_token_repeated_keeps_its_document():
    assert SequenceContext(torch.tensor([0, 3, 7])).repeated(2).cu_seqlens.tolist() == [0, 6, 14]
    assert SequenceContext().repeated(2) == SequenceContext()


def test_counts_go_on_from_earlier_calls():
    rows = SequenceContext()
    before, after = rows.count(None, 2, 4, torch.device("cpu"))
    assert (before + rows.positions(4, before.device)).tolist() == [[0, 1, 2, 3]]
    before, after = rows.count(after + torch.tensor([0, 5]), 2, 3, before.device)
    assert (before + rows.positions(3, before.device)).tolist() == [[4, 5, 6], [9, 10, 11]]
    assert after.tolist() == [7, 12]
    packed = SequenceContext(torch.tensor([0, 2, 5]))
    before, after = packed.count(torch.tensor([10, 20]), 1, 5, before.device)
    assert (before + packed.positions(5, before.device)).tolist() == [[10, 11, 20, 21, 22]]
    assert after.tolist() == [12, 23]


def test_reversing_turns_every_row_or_document():
    x = torch.arange(12).view(2, 6)
    assert SequenceContext().reverse(x).tolist() == [[5, 4, 3, 2, 1, 0], [11, 10, 9, 8, 7, 6]]
    packed = SequenceContext(torch.tensor([0, 2, 2, 5, 6]))
    assert packed.reverse(x[:1, :, None])[0, :, 0].tolist() == [1, 0, 4, 3, 2, 5]
