"""A model on a sharded sequence: the loss and every gradient of the whole row, and not a scan too many."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from seqtrain.data.batches import even_offsets
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel
from seqtrain.parallel import SequenceContext, ShardedSequence, attention, flush_scans, scans_opened
from seqtrain.parallel.attention_layout import balanced
from seqtrain.parallel.halo import tokens_before
from seqtrain.parallel.ring_attention import RankLayout
from seqtrain.parallel.testing import run_ranks
from seqtrain.parallel.wires import GlooWire
from tests.models.tiny import HYBRIDS, LAYERS, TINY, assert_same_gradients, build, row
from tests.parallel.shard_cases import CUTS, Cut


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), "every weight has a gradient on every rank"
    return found


def on_whole_row(layers: tuple[str, ...], cut: Cut, *, rows: int = 1, **fields) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of one process, summed over rows."""
    model, total = build(layers, **fields), 0
    for number in range(rows):
        loss = model(*row(cut, number), sequence=SequenceContext(cut.cu_seqlens))
        loss.backward()
        total = total + loss.detach()
    return total, gradients(model)


def on_rank(
    model: LanguageModel,
    cut: Cut,
    group: dist.ProcessGroup,
    *,
    number: int = 0,
    world: dist.ProcessGroup | None = None,
    **options,
) -> tuple[torch.Tensor, dict, int]:
    """The loss and the gradients, all ranks of `world` (default: the group) together, and this rank's scans."""
    rank, (tokens, labels) = group.rank(), row(cut, number)
    own = slice(cut.offsets[rank], cut.offsets[rank + 1])
    sequence = ShardedSequence(group=group, offsets=cut.offsets, cu_seqlens=cut.cu_seqlens, **options)
    before = scans_opened(group)
    loss = model(tokens[:, own], labels[:, own], sequence=sequence)
    loss.backward()
    flush_scans(group)
    loss, found = loss.detach(), gradients(model)
    for tensor in (loss, *found.values()):
        dist.all_reduce(tensor, group=world or group)
    return loss, found, scans_opened(group) - before


# Layers of converted models: window, sinks, delay and memory together.
MEMORIES = [
    ("linearized_attention", {"memory": "gla", "window": 7, "sinks": 2, "query_group": 2, "gate_rank": 3}),
    ("linearized_attention", {"memory": "kda", "window": 25, "sinks": 3}),
    ("linearized_attention", {"memory": "gsa", "window": 0, "slots": 3}),
    ("liger_hgrn2", {"window": 6}),
    ("gsa", {"slots": 3}),
]
# One row, with documents of uneven lengths, cut for two, three and four ranks.
DEGREES = {ranks: Cut(even_offsets(201, ranks), (0, 13, 14, 160, 201)) for ranks in (2, 3, 4)}


@pytest.mark.all
@pytest.mark.parametrize("part", range(4))
def test_loss_and_gradients(part):
    """Of every mixer, many in one launch."""
    names = list(LAYERS)[part::4]
    truth = {name: on_whole_row(LAYERS[name], DEGREES[3]) for name in names}
    found = run_ranks(
        3, lambda rank: {name: on_rank(build(LAYERS[name]), DEGREES[3], dist.group.WORLD)[:2] for name in names}
    )
    for name in names:
        assert_same_gradients(found[0][name], truth[name], what=name)


@pytest.mark.all
@pytest.mark.parametrize("layers", HYBRIDS.values(), ids=HYBRIDS)
def test_every_number_of_ranks_and_two_rows_at_once(layers):
    def run(rank: int) -> dict:
        found = {}
        for ranks, cut in DEGREES.items():
            group = dist.new_group(list(range(ranks)))
            if rank < ranks:
                found[ranks] = on_rank(build(layers), cut, group)
            dist.barrier()
        # Two rows, each over two ranks.
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        options = {"number": rank // 2, "world": dist.group.WORLD}
        found["two rows"] = on_rank(build(layers), DEGREES[2], pairs[rank // 2], **options)
        return found

    found = run_ranks(4, run)
    truth = on_whole_row(layers, DEGREES[2])
    for ranks in DEGREES:
        assert_same_gradients(found[0][ranks], truth)
    both = on_whole_row(layers, DEGREES[2], rows=2)
    for part in found:
        assert_same_gradients(part["two rows"], both)


# The others are those of every operator in test_sharded.
HARD = ("across three ranks", "empty ranks", "few tokens")


@pytest.mark.all
@pytest.mark.parametrize("cut", [CUTS[name] for name in HARD], ids=HARD)
def test_any_cut(cut):
    layers = ("gated_delta_net", "sliding_attention", "s5", "attention", "gla")
    found = run_ranks(cut.ranks, lambda rank: on_rank(build(layers), cut, dist.group.WORLD))
    assert_same_gradients(found[0], on_whole_row(layers, cut))


@pytest.mark.all
@pytest.mark.parametrize("documents", [(0, 21, 24, 64), None])
def test_window_sinks_and_memory_in_float64(documents):
    cut = Cut((0, 20, 23, 64), documents)
    cases = [{"layers": (name,), "settings": {name: fields}, "dtype": torch.float64} for name, fields in MEMORIES]
    found = run_ranks(3, lambda rank: [on_rank(build(**case), cut, dist.group.WORLD) for case in cases])
    for came, case in zip(found[0], cases, strict=True):
        assert_same_gradients(came, on_whole_row(cut=cut, **case), 1e-9)


def test_groups_of_tokens():
    cut, layers = CUTS["across three ranks"], ("gla", "gated_delta_net", "attention")
    fields = {"groups": (7, 0, 64)}
    found = run_ranks(cut.ranks, lambda rank: on_rank(build(layers, **fields), cut, dist.group.WORLD))
    assert_same_gradients(found[0], on_whole_row(layers, cut, **fields))


def test_no_layer_draws_random_numbers():
    """One that did would have to draw by a token's place in the whole row: the same on any number of ranks."""
    cut = CUTS["uneven"]
    tokens, labels = row(cut)
    model = build(tuple(MIXERS.names)).train()
    before = torch.get_rng_state()
    model(tokens, labels, sequence=SequenceContext(cut.cu_seqlens)).backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.all
@pytest.mark.parametrize("recompute", [(), ("norm",), ("mlp", "projection"), ("block",)], ids=",".join)
def test_one_scan_a_layer_and_direction(recompute):
    cut, layers = CUTS["across three ranks"], ("gated_delta_net", "gla", "s5", "mamba", "tensor_attention", "attention")
    model = build(layers, recompute=recompute)
    found = run_ranks(cut.ranks, lambda rank: on_rank(model, cut, dist.group.WORLD))
    assert [scans for _, _, scans in found] == [2 * (len(layers) - 1)] * cut.ranks
    assert_same_gradients(found[0], on_whole_row(layers, cut))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_sixty_four_processes(monkeypatch):
    """Sequence 16 x data 4: parity with one process, and no message but those of the schedules."""
    layers, cut = ("gla", "attention", "sliding_attention"), Cut(even_offsets(333, 16), (0, 13, 14, 260, 333))
    fields = {"heads": 4, "width": 32, "depth": 3}
    sent = Counter()
    message = GlooWire._message

    def counted(wire, what, buffer, rank):
        sent[what] += 1
        return message(wire, what, buffer, rank)

    def two_dimensional(offsets, boundaries, heads, costs, given):
        return balanced(offsets, boundaries, 4, given)

    monkeypatch.setattr(GlooWire, "_message", counted)
    monkeypatch.setattr(attention, "cheapest", two_dimensional)

    def run(rank: int) -> tuple:
        groups = [dist.new_group(list(range(first, first + 16))) for first in range(0, 64, 16)]
        options = {"number": rank // 16, "world": dist.group.WORLD, "algorithm": "ring"}
        found = on_rank(build(layers, **fields), cut, groups[rank // 16], **options)
        return found if rank == 0 else None, dict(sent)

    found = run_ranks(64, run, limit=800, group_timeout=300)
    assert_same_gradients(found[0][0], on_whole_row(layers, cut, rows=4, **fields))
    for rank, (_, counts) in enumerate(found):
        assert counts == expected_messages(cut, rank % 16), rank


def expected_messages(cut: Cut, rank: int) -> dict[str, int]:
    """Of one layer of each kind, forward and backward: a state, keys and values in a halo, a ring of groups."""
    states = (rank > 0) + (rank < 15)
    halo = tokens_before(cut.offsets, cut.boundaries, TINY["sliding_attention"]["window"] - 1, 0)
    rows = sum(halo.wanted(*pair) is not None for other in range(16) if other != rank
               for pair in ((rank, other), (other, rank)))  # fmt: skip
    place = RankLayout(balanced(cut.offsets, cut.boundaries, 4), rank)
    came = sum(now.rows > 0 for now in place.rounds)
    passed = bool(place.first_block) + sum(bool(now.passed) for now in place.rounds)
    # Backward gradients go around with the keys, behind the first, and home.
    around_back = sum(now.rows > 0 for now in place.rounds[1:]) + sum(bool(now.back) for now in place.rounds)
    home = sum(bool(now.passed) + bool(now.home) for now in place.rounds if now.rows)
    assert place.layout.farthest == 3
    return {
        "recv": states + 2 * rows + 2 * came + around_back,
        "send": states + 2 * rows + 2 * passed + home,
    }
