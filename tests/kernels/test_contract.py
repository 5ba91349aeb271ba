"""What every operator promises: one suite, so that a new operator, or backend, is tested by being there."""

from itertools import pairwise

import pytest
import torch

from seqtrain.kernels import OPERATORS
from seqtrain.kernels.segments import AffineScan, by_segment
from seqtrain.testing import TOLERANCES, assert_within, boundaries, compare_with_oracle
from tests.kernels.contract_cases import CASES, assert_equal, call, cast, flat, run

LENGTHS = [0, 1, 63, 0, 64, 2, 0]
CPU = torch.device("cpu")

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
with_state = pytest.mark.parametrize(
    "case", [x for x in CASES.values() if x.has_state], ids=[name for name, x in CASES.items() if x.has_state]
)
# Every backend that is not the definition, those for accelerators aside: tests/gpu and the interpreter have them.
BACKENDS = [
    pytest.param(case, backend, id=f"{name}-{backend}")
    for name, case in CASES.items()
    for backend in case.operator.backends
    if backend == "chunked" or (backend == "native" and not case.has_read)
]
# `by_segment` has no options.
SCANS = {
    name: x
    for name, x in CASES.items()
    if isinstance(x.operator.time, AffineScan) and not ({"form"} & {*x.options} or x.sizes)
}
every_backend = pytest.mark.parametrize(("case", "backend"), BACKENDS)


def part_of(case, tensors, start, end):
    """The tensors at tokens `start` to `end`."""
    return dict(zip(tensors, case.operator.take(list(tensors.values()), slice(start, end)), strict=True))


def check(case, backend, tokens, dtype, *, lengths=None, past=False):
    """One call against the definition in float64 on the same numbers."""
    try:
        case.operator.choose(backend, CPU)
    except ValueError as reason:
        pytest.skip(str(reason))
    batch = 2 if lengths is None else 1
    tensors = {name: cast(x, dtype) for name, x in case.tensors(tokens, batch=batch).items()}
    if case.operator.name == "gated_norm":  # its weight is float32 at least
        tensors["weight"] = tensors["weight"].to(torch.promote_types(dtype, torch.float32))
    state = case.state(len(lengths or [0] * batch), dtype=dtype, packed=lengths is not None) if past else None
    options = {} if lengths is None else {"cu_seqlens": boundaries(lengths)}
    came = run(case, tensors, state, backend=backend, **options)
    exact = {name: cast(x, torch.float64) for name, x in tensors.items()}
    if isinstance(state, dict):
        state = {key: cast(x, torch.float64) for key, x in state.items()}
    else:
        state = cast(state, torch.float64)
    assert_equal(came, run(case, exact, state, backend="reference", **options), TOLERANCES[dtype])


@every_backend
@pytest.mark.parametrize("tokens", [1, 17, pytest.param(63, marks=pytest.mark.all), 130])
def test_rows_match_the_definition(case, backend, tokens):
    check(case, backend, tokens, torch.float32)
    if case.has_state:
        check(case, backend, tokens, torch.float32, past=True)


@every_backend
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, marks=pytest.mark.all), torch.float32, torch.bfloat16],
    ids=["float64", "float32", "bfloat16"],
)
def test_documents_match_the_definition(case, backend, dtype):
    if not case.has_state:
        check(case, backend, 130, dtype)
        return
    check(case, backend, sum(LENGTHS), dtype, lengths=LENGTHS, past=True)
    check(case, backend, sum(LENGTHS), dtype, lengths=LENGTHS)


@with_state
@torch.no_grad()
def test_any_split_in_time_with_the_state_carried_equals_the_whole(case):
    tensors = case.tensors(130)
    whole, end = call(case, tensors)
    for lengths in ([1, 16, 0, 46, 67], [128, 2]):
        outs, state, start = [], None, 0
        for length in lengths:
            out, state = call(case, part_of(case, tensors, start, start + length), state)
            outs.append(out)
            start += length
        assert_equal({"out": torch.cat(outs, 1), **flat(state)}, {"out": whole, **flat(end)}, 1e-11)


@with_state
@torch.no_grad()
def test_token_by_token_equals_the_whole(case):
    tensors, state, outs = case.tensors(12), None, []
    whole, end = call(case, tensors)
    for t in range(12):
        out, state = call(case, part_of(case, tensors, t, t + 1), state)
        outs.append(out)
    assert_equal({"out": torch.cat(outs, 1), **flat(state)}, {"out": whole, **flat(end)}, 1e-11)


@with_state
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_documents_bits_depend_on_no_other_documents_numbers(case, backend):
    """Outputs, states and gradients of documents that were not changed, in float32, where rounding would show it."""
    lengths, options = [20, 41, 0, 39], {"cu_seqlens": boundaries([20, 41, 0, 39]), "backend": backend}
    tensors = case.tensors(100, batch=1, dtype=torch.float32)
    before = run(case, tensors, **options)
    names = case.operator.along_time(list(tensors.values()))
    changed = {
        name: torch.cat([x[:, :20], x[:, 20:61] * 0.5, x[:, 61:]], 1) if timed else x
        for timed, (name, x) in zip(names, tensors.items(), strict=True)
    }
    after = run(case, changed, **options)
    timed = ["out", *(f"grad {name}" for has, name in zip(names, tensors, strict=True) if has)]
    for name in timed:
        assert torch.equal(before[name][:, :20], after[name][:, :20]), name
        assert torch.equal(before[name][:, 61:], after[name][:, 61:]), name
    assert not torch.equal(before["out"][:, 20:61], after["out"][:, 20:61])
    for name in (name for name in before if name.startswith("state") and len(before[name]) == len(lengths)):
        assert torch.equal(before[name][[0, 3]], after[name][[0, 3]]), name


@every_case
@torch.no_grad()
def test_bits_depend_on_no_layout_and_results_belong_to_the_caller(case):
    tensors = case.tensors(33, dtype=torch.float32)
    strided = {name: None if x is None else torch.stack([x, x], -1)[..., 0] for name, x in tensors.items()}
    out, state = call(case, tensors)
    again, after = call(case, strided)
    assert_equal({"out": again, **flat(after)}, {"out": out, **flat(state)}, 1e-6)
    given = [x.untyped_storage().data_ptr() for x in tensors.values() if x is not None]
    if case.options.get("by") != 0 and case.operator.name != "softmax_attention":  # whose state is the keys themselves
        assert not {x.untyped_storage().data_ptr() for x in (out, *flat(state).values())} & set(given)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("case", SCANS.values(), ids=SCANS)
def test_a_segment_is_an_affine_map_of_its_state(case, tokens):
    tensors = case.tensors(tokens) | {"initial_state": case.state(2)}
    errors = compare_with_oracle(by_segment(case.operator), tensors, dtype=torch.float64)
    assert_within(errors, torch.float64)
    given = list(case.tensors(tokens).values())
    segment = case.operator.segment(given, {}, "auto")
    transition, update = segment.transition()
    assert case.operator.state_shape(given, {}, 2) == (tuple(update.shape), update.dtype)
    assert segment.transition_shape(given, {}) == (None if transition is None else tuple(transition.shape))


@with_state
@torch.no_grad()
def test_documents_of_the_definition_equal_separate_calls(case):
    tensors, lengths = case.tensors(30, batch=1), [1, 20, 0, 9]
    out, after = call(case, tensors, cu_seqlens=boundaries(lengths), backend="reference")
    ends = boundaries(lengths).tolist()
    separate = [call(case, part_of(case, tensors, start, end), backend="reference") for start, end in pairwise(ends)]
    assert_equal({"out": out}, {"out": torch.cat([each for each, _ in separate], 1)}, 1e-11)
    if case.operator.name != "softmax_attention":  # whose documents' keys lie end to end
        states = [flat(state) for _, state in separate]
        assert_equal(flat(after), {key: torch.cat([state[key] for state in states]) for key in states[0]}, 1e-11)


@with_state
@torch.no_grad()
def test_no_tokens_leave_the_state(case):
    state = case.state(2)
    out, after = call(case, case.tensors(0), state)
    assert out.shape == case.operator.out_shape(list(case.tensors(0).values()), case.options)
    assert_equal(flat(after), flat(state), 0.0)


@every_case
@torch.no_grad()
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_shapes_and_dtypes_are_those_declared(case, dtype):
    for tokens in (1, 30):
        tensors = case.tensors(tokens, dtype=dtype)
        given = list(tensors.values())
        out, state = call(case, tensors)
        assert tuple(out.shape) == case.operator.out_shape(given, case.options)
        if case.has_state:
            declared = case.operator.state_shape(given, case.options, 2)
            found = (
                {key: (tuple(x.shape), x.dtype) for key, x in state.items()}
                if isinstance(state, dict)
                else (tuple(state.shape), state.dtype)
            )
            assert found == declared


@every_case
def test_under_autocast_recurrences_stay_in_float32(case):
    tensors = case.tensors(33, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        came = run(case, tensors)
    # bfloat16 products would show at 1e-3: attention's and logits' are meant to; of two operators the backward pass's.
    rounds = ("softmax_attention", "linear_cross_entropy", "sink_attention", "diagonal_system", "ttt_linear")
    tolerance = TOLERANCES[torch.bfloat16 if case.operator.name in rounds else torch.float32]
    assert_equal(came, run(case, {name: cast(x, torch.float64) for name, x in tensors.items()}), tolerance)


@every_case
def test_wrong_arguments_are_named(case):
    name, tensors = case.operator.name, case.tensors(6, dtype=torch.float32)
    for key, x in tensors.items():
        if x is None:
            continue
        wrong = []
        if "..." not in case.operator.arguments[key][-1]:
            wrong.append((x.new_zeros(*x.shape, 1, 1, 1), "has shape"))
        if case.operator.kinds.get(key) != "any dtype":
            wrong.append((torch.zeros_like(x, dtype=torch.int32), "has dtype"))
        for value, what in wrong:
            with pytest.raises(ValueError, match=f"^{name}: {key} {what} .*, expected"):
                call(case, tensors | {key: value})


@with_state
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 9]), "cu_seqlens must rise from 0 to T=6"),
        (torch.tensor([0, 4, 2, 6]), "cu_seqlens must rise from 0 to T=6"),
        (torch.tensor([0.0, 6.0]), r"cu_seqlens is torch.float32 \(2,\), expected int32 or int64"),
    ],
)
def test_wrong_documents_are_refused(case, cu_seqlens, message):
    with pytest.raises(ValueError, match=f"{case.operator.name}: {message}"):
        call(case, case.tensors(6, batch=1), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens needs B=1, but B=2; flatten the batch into one row"):
        call(case, case.tensors(6), cu_seqlens=torch.tensor([0, 6]))


@with_state
def test_wrong_states_are_refused(case):
    state = case.state(3)
    with pytest.raises(ValueError, match=r"initial_state"):
        call(case, case.tensors(6), state)


@pytest.mark.parametrize("name", [name for name, x in OPERATORS.items() if x.backends])
def test_backends_that_are_unknown_or_can_not_run_here_say_so(name):
    case = CASES[name]
    with pytest.raises(ValueError, match=f"{name}: .*did you mean 'chunked'"):
        call(case, case.tensors(6), backend="chunkd")
    for backend in {"flash", "native"} - set(case.operator.backends):
        with pytest.raises(ValueError, match=f"backend={backend} can't run here: {backend} has no {name}"):
            call(case, case.tensors(6), backend=backend)
