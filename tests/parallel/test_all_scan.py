"""All-Scan against one process, on every rank: states and gradients, for every schedule, form and rank count."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from seqtrain.parallel import ALGORITHMS, all_scan, flush_scans, open_all_scan
from seqtrain.parallel.schedules import SCHEDULES, candidates
from seqtrain.parallel.schedules.tree import Tree
from seqtrain.parallel.testing import run_ranks
from tests.parallel.ranks import on_ranks
from tests.parallel.scan_cases import FORMS, check, gradients_of, loss, own_leaves, random_case, start_all_scan, truth

# One number of ranks in the quick loop.
RANKS = [pytest.param(ranks, marks=() if ranks == 3 else pytest.mark.all) for ranks in (1, 2, 3, 4)]


def scan_and_check(case, rank, group, what, *, place=None, dtype=None, tolerance=1e-12, **options):
    """`place`: this rank's position in the group, where that is not its rank."""
    place = rank if place is None else place
    leaves = own_leaves(case, place, dtype)
    transition, update, initial = leaves
    states = all_scan(transition, update, group=group, initial_state=initial, **options)
    assert [state.shape for state in states] == [update.shape] * 2
    assert states[0].dtype == update.dtype
    weights = tuple(w.to(dtype or w.dtype) for w in case.weights[place])
    loss(weights, *states).backward()
    check(case, place, states, gradients_of(*leaves), tolerance, what)


def every_form(rank, ranks):
    for algorithm, form, initial in product(ALGORITHMS, FORMS, (True, False)):
        case = random_case(form, ranks, initial=initial)
        what = f"{algorithm} {form} initial={initial}"
        scan_and_check(case, rank, dist.group.WORLD, what, algorithm=algorithm)


# Initial state on rank 0 and the final state's gradient at once, and gradients on every rank.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", RANKS)
def test_states_and_gradients_on_every_rank(ranks):
    run_ranks(ranks, every_form, ranks)


@pytest.mark.all
def test_a_new_schedule_is_one_class(monkeypatch):
    class Later(Tree):
        name = "later"

    monkeypatch.setitem(SCHEDULES, "later", Later)
    assert Later() in candidates.__wrapped__("auto")  # what is cached stays as it is

    def on_rank(rank):
        scan_and_check(random_case("dense", 3), rank, dist.group.WORLD, "later", algorithm="later")

    run_ranks(3, on_rank)


def any_number_of_blocks(ranks):
    for form, blocks in product(FORMS, (1, 2, 3, 5, 7, 16, 1000)):
        yield random_case(form, ranks, seed=blocks), {"algorithm": "pipeline", "blocks": blocks}


def complex_states_and_float32(ranks):
    for algorithm, form in product(("pipeline", "tree", "all_gather"), FORMS):
        yield random_case(form, ranks, dtype=torch.complex128), {"algorithm": algorithm}
        yield random_case(form, ranks), {"algorithm": algorithm, "dtype": torch.float32, "tolerance": 2e-6}


def empty_ranks(ranks):
    """A rank without tokens is the identity, whichever ranks they are."""
    empty = ((0,), (3,), (1, 2), (0, 1, 3), (0, 1, 2, 3))
    for identity, form, algorithm in product(empty, ("head", "dense", "diagonal"), ALGORITHMS):
        yield random_case(form, ranks, identity=identity), {"algorithm": algorithm}


def zero_transitions(ranks):
    """A document's start makes a transition zero; nothing divides by it."""
    for form, algorithm in product(("head", "channel", "dense", "diagonal"), ALGORITHMS):
        case = random_case(form, ranks)
        case.transitions[1] = torch.zeros_like(case.transitions[1])
        case.transitions[2].view(-1)[::2] = 0
        yield case, {"algorithm": algorithm}


def strided_on_one_rank(ranks):
    """gloo rejects non-contiguous tensors on the rank that has them, and the others die by time-out."""
    for form, algorithm in product(("head", "channel", "dense"), ALGORITHMS):
        case = random_case(form, ranks)
        case.updates[1] = case.updates[1].transpose(0, 3).contiguous().transpose(0, 3)
        case.transitions[1] = case.transitions[1].transpose(0, 1).contiguous().transpose(0, 1)
        yield case, {"algorithm": algorithm}


@pytest.mark.all
@pytest.mark.parametrize(
    "cases", [any_number_of_blocks, complex_states_and_float32, empty_ranks, zero_transitions, strided_on_one_rank]
)
def test_every_kind_of_map(cases):
    def on_rank(rank):
        for number, (case, options) in enumerate(cases(4)):
            scan_and_check(case, rank, dist.group.WORLD, f"{number} {options}", **options)

    run_ranks(4, on_rank)


@on_ranks(5, quick=True)
def test_a_reset_selects_and_does_not_multiply(rank):
    """Ranks up to the second reset have no numbers but infinities and NaN: nothing of it passes, there or back."""
    resets = (2, 4)
    for form, algorithm in product(("none", "head", "dense"), ALGORITHMS):
        results = []
        for bad in (1.0, float("inf")):
            case = random_case(form, 5)
            transition, update, _ = own_leaves(case, rank)
            factor = bad if rank < 2 else 1.0
            state, final = start_all_scan(
                transition, update * factor, group=dist.group.WORLD, algorithm=algorithm, resets=resets
            ).wait()
            weights = case.weights[rank][0] * (float("nan") if bad > 1 and rank <= 2 else 1.0), case.weights[rank][1]
            loss(weights, state, final).backward()
            results.append({"state": state.detach(), "final": final.detach()} | gradients_of(transition, update, None))
        clean, found = results
        same = {0: (), 1: (), 2: ("final", "update"), 3: tuple(clean), 4: tuple(clean)}[rank]
        for name in set(same) - ({"transition"} if rank in resets else set()):
            assert clean[name].isfinite().all()
            assert torch.equal(found[name], clean[name]), (form, algorithm, name)
    flush_scans(dist.group.WORLD)


@on_ranks(4)
def test_ranks_of_a_group_are_not_ranks_of_the_world(rank):
    groups = {ranks: dist.new_group(ranks) for ranks in ((1, 3), (0, 2))}
    for algorithm, (ranks, group) in product(ALGORITHMS, groups.items()):
        if rank in ranks:
            case = random_case("dense", 2, seed=rank % 2)
            scan_and_check(case, rank, group, f"{ranks} {algorithm}", place=ranks.index(rank), algorithm=algorithm)


@on_ranks(3)
def test_one_result_in_the_loss(rank):
    """The other's gradient is absent, not zero-filled by luck."""
    for used, form in product((0, 1), ("head", "dense")):
        case = random_case(form, 3)
        for weights in case.weights:
            weights[1 - used].zero_()
        transition, update, initial = leaves = own_leaves(case, rank)
        states = all_scan(transition, update, group=dist.group.WORLD, initial_state=initial, algorithm="pipeline")
        (case.weights[rank][used] * states[used]).sum().backward()
        check(case, rank, states, gradients_of(*leaves), 1e-12, f"result {used} {form}")


@on_ranks(3)
def test_several_scans_in_flight(rank):
    """Of different sizes, waited for in another order."""
    cases = [random_case(form, 3, seed=i) for i, form in enumerate(("dense", "head", "diagonal", "none", "channel"))]
    for algorithm in ("pipeline", "tree", "all_gather"):
        leaves = [own_leaves(case, rank) for case in cases]
        options = {"group": dist.group.WORLD, "algorithm": algorithm}
        scans = [start_all_scan(a, update, initial_state=initial, **options) for a, update, initial in leaves]
        states = [scan.wait() for scan in reversed(scans)][::-1]
        sum(loss(case.weights[rank], *pair) for case, pair in zip(cases, states, strict=True)).backward()
        for case, own, pair in zip(cases, leaves, states, strict=True):
            check(case, rank, pair, gradients_of(*own), 1e-12, f"in flight {algorithm}")


@on_ranks(2, limit=20)
def test_forward_and_backward_scans_cross(rank):
    # 4 MiB each way between two ranks, far more than a socket holds: a blocking send would wait for ever.
    update = torch.full((1, 1, 1024, 1024), 1.0 + rank, requires_grad=True)
    first, _ = all_scan(None, update, group=dist.group.WORLD, algorithm="pipeline", blocks=2)
    second = start_all_scan(None, 2 * update.detach(), group=dist.group.WORLD, algorithm="pipeline", blocks=2)
    first.sum().backward()
    state_in, _ = second.wait()
    assert state_in.unique().tolist() == [0.0 if rank == 0 else 2.0]
    assert update.grad.unique().tolist() == [1.0 if rank == 0 else 0.0]


@on_ranks(3)
def test_opened_before_the_map_is_known(rank):
    case = random_case("dense", 3)
    transition, update, initial = leaves = own_leaves(case, rank)
    options = {"dtype": update.dtype, "device": update.device, "group": dist.group.WORLD, "algorithm": "tree"}
    early = open_all_scan(transition.shape, update.shape, **options)
    with pytest.raises(ValueError, match="opened for"):
        early.start(None, update)
    states = early.start(transition, update, initial_state=initial).wait()
    loss(case.weights[rank], *states).backward()
    check(case, rank, states, gradients_of(*leaves), 1e-12, "opened early")


@on_ranks(3)
def test_results_may_be_overwritten(rank):
    """They belong to the caller: writing to them changes neither what is still being sent nor an input."""
    case = random_case("none", 3)
    expected = truth(random_case("none", 3))[0][rank]
    for algorithm, _ in product(ALGORITHMS, range(5)):
        options = {"group": dist.group.WORLD, "initial_state": case.initial, "algorithm": algorithm}
        states = all_scan(None, case.updates[rank], **options)
        torch.testing.assert_close(states[0].clone(), expected[0])
        torch.testing.assert_close(states[1], expected[1])
        for state in states:
            state.fill_(float("nan"))


@on_ranks(1, quick=True)
def test_bad_arguments_are_named(rank):
    group = dist.group.WORLD
    update, transition = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 4)
    for options, complaint in (
        ({"update": update.bfloat16()}, "states travel in float32"),
        ({"update": update, "transition": transition.double()}, "transition is torch.float64"),
        ({"update": update, "transition": torch.ones(2, 3, 5, 5)}, r"transition has shape \(2, 3, 5, 5\)"),
        ({"update": update, "transition": torch.ones(3, 3)}, r"or dense \(2, 3, 4, 4\)"),
        ({"update": update, "initial_state": torch.ones(2, 3, 4, 4)}, "initial_state has shape"),
        ({"update": update, "algorithm": "pipelin"}, "did you mean 'pipeline'"),
        ({"update": update, "algorithm": "tree", "blocks": 2}, "blocks=2"),
        ({"update": update, "algorithm": "pipeline", "blocks": 0}, "blocks=0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            all_scan(options.pop("transition", None), options.pop("update"), group=group, **options)
