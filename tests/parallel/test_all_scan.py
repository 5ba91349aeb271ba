"""All-Scan against one process, on every rank: states and gradients, for every schedule, form and rank count."""

import pytest
import torch
import torch.distributed as dist

from seqtrain.parallel import ALGORITHMS, all_scan, open_all_scan, scans_opened, start_all_scan
from seqtrain.parallel.schedules import SCHEDULES, candidates
from seqtrain.parallel.schedules.tree import Tree
from seqtrain.parallel.testing import run_ranks
from tests.parallel.scan_cases import FORMS, check, gradients_of, loss, own_leaves, random_case, truth

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
    for algorithm in ALGORITHMS:
        for form in FORMS:
            for initial in (True, False):
                case = random_case(form, ranks, initial=initial)
                what = f"{algorithm} {form} initial={initial}"
                scan_and_check(case, rank, dist.group.WORLD, what, algorithm=algorithm)


# Initial state on rank 0 and the final state's gradient at once, and gradients on every rank.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", RANKS)
def test_states_and_gradients_on_every_rank(ranks):
    run_ranks(ranks, every_form, ranks)


def test_states_and_gradients_by_hand():
    def on_rank(rank):
        factor, update = torch.full((1, 1), 2.0 + rank).requires_grad_(), torch.ones(1, 1, 1, 1)
        initial = torch.ones(1, 1, 1, 1, requires_grad=True)
        _, final = all_scan(factor, update, group=dist.group.WORLD, initial_state=initial, algorithm="pipeline")
        (final * (10.0 if rank == 2 else 0.0)).sum().backward()
        return final.item(), factor.grad.item(), initial.grad.item()

    # S goes 1, 2*1+1 = 3, 3*3+1 = 10, 4*10+1 = 41; each factor's gradient is its S_in times the factors after it.
    assert run_ranks(3, on_rank) == [(3, 10 * 1 * 3 * 4, 10 * 2 * 3 * 4), (10, 10 * 3 * 4, 0), (41, 10 * 10, 0)]


@pytest.mark.all
def test_a_new_schedule_is_one_class(monkeypatch):
    class Later(Tree):
        name = "later"

    monkeypatch.setitem(SCHEDULES, "later", Later)
    assert Later() in candidates.__wrapped__("auto")  # what is cached stays as it is

    def on_rank(rank):
        scan_and_check(random_case("dense", 3), rank, dist.group.WORLD, "later", algorithm="later")

    run_ranks(3, on_rank)


def every_cut(rank, ranks):
    for form in FORMS:
        for blocks in (1, 2, 3, 5, 7, 16, 1000):
            case = random_case(form, ranks, seed=blocks)
            scan_and_check(case, rank, dist.group.WORLD, f"{form} {blocks}", algorithm="pipeline", blocks=blocks)


@pytest.mark.all
def test_pipeline_with_any_number_of_blocks():
    run_ranks(3, every_cut, 3)


def other_dtypes(rank, ranks):
    for algorithm in ("pipeline", "tree", "all_gather"):
        for form in FORMS:
            case = random_case(form, ranks, dtype=torch.complex128)
            scan_and_check(case, rank, dist.group.WORLD, f"complex {form}", algorithm=algorithm)
            case = random_case(form, ranks)
            scan_and_check(
                case,
                rank,
                dist.group.WORLD,
                f"float32 {form}",
                algorithm=algorithm,
                dtype=torch.float32,
                tolerance=2e-6,
            )


@pytest.mark.all
def test_complex_states_and_float32():
    run_ranks(4, other_dtypes, 4)


# A rank without tokens is the identity, whichever ranks they are.
def empty_ranks(rank, ranks):
    for identity in ((0,), (ranks - 1,), (1, 2), (0, 1, 3), tuple(range(ranks))):
        for form in ("head", "dense", "diagonal"):
            for algorithm in ALGORITHMS:
                case = random_case(form, ranks, identity=identity)
                scan_and_check(case, rank, dist.group.WORLD, f"{identity} {form} {algorithm}", algorithm=algorithm)


@pytest.mark.all
def test_empty_ranks_forward_what_they_get():
    run_ranks(4, empty_ranks, 4)


# A document's start makes a transition zero; nothing divides by it.
def zero_transitions(rank, ranks):
    for form in ("head", "channel", "dense", "diagonal"):
        for algorithm in ALGORITHMS:
            case = random_case(form, ranks)
            case.transitions[1] = torch.zeros_like(case.transitions[1])
            case.transitions[2].view(-1)[::2] = 0
            scan_and_check(case, rank, dist.group.WORLD, f"zero {form} {algorithm}", algorithm=algorithm)


@pytest.mark.all
def test_zero_transitions_have_exact_gradients():
    run_ranks(4, zero_transitions, 4)


# Ranks of a group are not ranks of the world.
def sub_group(rank):
    groups = {ranks: dist.new_group(ranks) for ranks in ((1, 3), (0, 2))}
    for algorithm in ALGORITHMS:
        for ranks, group in groups.items():
            if rank in ranks:
                case = random_case("dense", 2, seed=rank % 2)
                scan_and_check(case, rank, group, f"{ranks} {algorithm}", place=ranks.index(rank), algorithm=algorithm)


@pytest.mark.all
def test_groups_that_are_not_the_world():
    run_ranks(4, sub_group)


# gloo rejects non-contiguous tensors on the rank that has them, and the others die by time-out.
def strided(rank, ranks):
    for form in ("head", "channel", "dense"):
        for algorithm in ALGORITHMS:
            case = random_case(form, ranks)
            if rank == 1:
                case.updates[1] = case.updates[1].transpose(0, 3).contiguous().transpose(0, 3)
                swapped = case.transitions[1].transpose(0, 1).contiguous().transpose(0, 1)
                assert not case.updates[1].is_contiguous()
                assert not swapped.is_contiguous()
                case.transitions[1] = swapped
            scan_and_check(case, rank, dist.group.WORLD, f"strided {form} {algorithm}", algorithm=algorithm)


@pytest.mark.all
def test_strided_inputs_on_one_rank():
    run_ranks(3, strided, 3)


# Only one of the two results in the loss: the other's gradient is absent, not zero-filled by luck.
def one_result(rank, ranks):
    for used in (0, 1):
        for form in ("head", "dense"):
            case = random_case(form, ranks)
            for weights in case.weights:
                weights[1 - used].zero_()
            transition, update, initial = leaves = own_leaves(case, rank)
            states = all_scan(transition, update, group=dist.group.WORLD, initial_state=initial, algorithm="pipeline")
            (case.weights[rank][used] * states[used]).sum().backward()
            check(case, rank, states, gradients_of(*leaves), 1e-12, f"result {used} {form}")


@pytest.mark.all
def test_one_result_in_the_loss():
    run_ranks(3, one_result, 3)


# Of different sizes, waited for in another order.
def in_flight(rank, ranks):
    group = dist.group.WORLD
    cases = [
        random_case(form, ranks, seed=i) for i, form in enumerate(("dense", "head", "diagonal", "none", "channel"))
    ]
    for algorithm in ("pipeline", "tree", "all_gather"):
        leaves = [own_leaves(case, rank) for case in cases]
        scans = [
            start_all_scan(transition, update, group=group, initial_state=initial, algorithm=algorithm)
            for transition, update, initial in leaves
        ]
        states = [scan.wait() for scan in reversed(scans)][::-1]
        sum(loss(case.weights[rank], *pair) for case, pair in zip(cases, states, strict=True)).backward()
        for case, own, pair in zip(cases, leaves, states, strict=True):
            check(case, rank, pair, gradients_of(*own), 1e-12, f"in flight {algorithm}")


@pytest.mark.all
def test_several_scans_in_flight():
    run_ranks(3, in_flight, 3)


def both_directions(rank):
    # 4 MiB each way between two ranks, far more than a socket holds: a blocking send would wait for ever.
    update = torch.full((1, 1, 1024, 1024), 1.0 + rank, requires_grad=True)
    first, _ = all_scan(None, update, group=dist.group.WORLD, algorithm="pipeline", blocks=2)
    second = start_all_scan(None, 2 * update.detach(), group=dist.group.WORLD, algorithm="pipeline", blocks=2)
    first.sum().backward()
    state_in, _ = second.wait()
    assert state_in.unique().tolist() == [0.0 if rank == 0 else 2.0]
    assert update.grad.unique().tolist() == [1.0 if rank == 0 else 0.0]


@pytest.mark.all
def test_forward_and_backward_scans_cross():
    run_ranks(2, both_directions, limit=20)


def opened_early(rank, ranks):
    case = random_case("dense", ranks)
    transition, update, initial = leaves = own_leaves(case, rank)
    early = open_all_scan(
        transition.shape,
        update.shape,
        dtype=update.dtype,
        device=update.device,
        group=dist.group.WORLD,
        algorithm="tree",
    )
    with pytest.raises(ValueError, match="opened for"):
        early.start(None, update)
    states = early.start(transition, update, initial_state=initial).wait()
    loss(case.weights[rank], *states).backward()
    check(case, rank, states, gradients_of(*leaves), 1e-12, "opened early")


@pytest.mark.all
def test_opened_before_the_map_is_known():
    run_ranks(3, opened_early, 3)


# The states of a scan belong to the caller: writing to them changes neither what is still being sent nor an input.
def overwritten(rank, ranks):
    case = random_case("none", ranks)
    true_in, true_final = truth(random_case("none", ranks))[0][rank]
    for algorithm in ALGORITHMS:
        for _ in range(5):
            state_in, final = all_scan(
                None, case.updates[rank], group=dist.group.WORLD, initial_state=case.initial, algorithm=algorithm
            )
            torch.testing.assert_close(state_in.clone(), true_in)
            torch.testing.assert_close(final, true_final)
            state_in.fill_(float("nan"))
            final.fill_(float("nan"))


@pytest.mark.all
def test_results_may_be_overwritten():
    run_ranks(3, overwritten, 3)


def counted(rank):
    update = torch.ones(1, 2, 3, 4, requires_grad=True)
    for expected, backward in ((1, False), (3, True)):
        state_in, _ = all_scan(None, update, group=dist.group.WORLD, algorithm="tree")
        if backward:
            state_in.sum().backward()
        assert scans_opened(dist.group.WORLD) == expected
    with torch.no_grad():
        all_scan(None, update, group=dist.group.WORLD, algorithm="tree")
    assert scans_opened(dist.group.WORLD) == 4


@pytest.mark.all
def test_scans_are_counted():
    run_ranks(2, counted)


def refusals(rank):
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


def test_bad_arguments_are_named():
    run_ranks(1, refusals)
