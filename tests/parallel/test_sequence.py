"""A sequence hands document borders, state and backend to any operator, and knows each token's place."""

import torch

from seqtrain.parallel.sequence import Sequence


def test_positions_restart_with_each_document():
    borders = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert Sequence(borders).positions(7, borders.device).tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert Sequence().positions(4, borders.device).tolist() == [0, 1, 2, 3]


def test_an_operator_gets_what_the_sequence_knows():
    def operator(x, *, power, initial_state, cu_seqlens, backend):
        return x**power, (initial_state, cu_seqlens, backend)

    borders = torch.tensor([0, 2])
    out, came = Sequence(borders, backend="chunked").run(
        operator, torch.full((1, 2), 3.0), power=2, initial_state="past"
    )
    assert out.tolist() == [[9.0, 9.0]]
    assert came == ("past", borders, "chunked")
