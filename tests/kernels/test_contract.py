"""What every operator promises: one suite, so that a new operator, or backend, is tested by being there."""

from itertools import pairwise

import pytest
import torch

from seqtrain.kernels import OPERATORS
from seqtrain.kernels.segments import AffineScan, by_segment
from seqtrain.testing import TOLERANCES, assert_within, boundaries, compare_with_oracle
from tests.conftest import INTERPRETED
from tests.kernels.contract_cases import CASES, GPU, assert_equal, call, cast, check, flat, run

LENGTHS = [0, 1, 63, 0, 64, 2, 0]
CPU = torch.device("cpu")

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
with_state = pytest.mark.parametrize(
    "case", [x for x in CASES.values() if x.has_state], ids=[name for name, x in CASES.items() if x.has_state]
)


def places(case):
    """Every backend that is not the definition, and the device it runs on."""
    yield "chunked", "cpu", ()
    if "native" in case.operator.backends and not case.has_read:
        yield "native", "cpu", ()
    if GPU:
        yield from (("auto", "cuda", ()), ("chunked", "cuda", ()))
    elif "triton" in case.operator.backends and not case.has_read:
        yield "triton", "cpu", pytest.mark.interpreter


BACKENDS = [
    pytest.param(case, backend, device, id=f"{name}-{backend}-{device}", marks=marks)
    for name, case in CASES.items()
    if case.operator.backends
    for backend, device, marks in places(case)
]
# `by_segment` has no options.
SCANS = {
    name: x
    for name, x in CASES.items()
    if isinstance(x.operator.time, AffineScan) and not ({"form"} & {*x.options} or x.sizes)
}
every_backend = pytest.mark.parametrize(("case", "backend", "device"), BACKENDS)


def part_of(case, tensors, start, end):
    """The tensors at tokens `start` to `end`."""
    return dict(zip(tensors, case.operator.take(list(tensors.values()), slice(start, end)), strict=True))


@every_backend
@pytest.mark.parametrize("tokens", [1, 17, pytest.param(63, marks=pytest.mark.all), 130])
def test_rows_match_the_definition(case, backend, device, tokens):
    if INTERPRETED and tokens > 17:
        pytest.skip("many chunks take long to interpret; test_triton has some")
    for past in {case.has_state and tokens > 1 and INTERPRETED, case.has_state}:
        check(case, backend, tokens, torch.float32, past=past, device=device)


@every_backend
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, marks=pytest.mark.all), torch.float32, torch.bfloat16],
    ids=["float64", "float32", "bfloat16"],
)
def test_documents_match_the_definition(case, backend, device, dtype):
    if GPU and device == "cuda" and dtype == torch.float64:
        pytest.skip("kernels for GPUs compute in float32")
    lengths = [0, 1, 20, 0, 2] if INTERPRETED else LENGTHS
    for past in {INTERPRETED and case.has_state, case.has_state}:
        options = {"lengths": lengths if case.has_state else None, "past": past, "device": device}
        check(case, backend, sum(lengths), dtype, **options)


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
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_a_documents_bits_depend_on_no_other_documents_numbers(case, backend):
    """Outputs, states and gradients of documents that were not changed, in float32, where rounding would show it.

    A document without numbers, as one whose state has overflowed, shows what multiplies by zero where it should select.
    """
    lengths, kept = [5, 38, 41, 0, 39, 70, 41], [1, 4]
    ends = boundaries(lengths)
    tensors = case.tensors(sum(lengths), batch=1, dtype=torch.float32)
    timed = dict(zip(tensors, case.operator.along_time(list(tensors.values())), strict=True))
    rows = torch.cat([torch.arange(ends[n], ends[n + 1]) for n in kept])
    others = torch.ones(sum(lengths), dtype=torch.bool).index_fill(0, rows, False)
    before = run(case, tensors, cu_seqlens=ends, backend=backend)
    for factor in (float("nan"),) if backend == "reference" else (0.5, 100.0, float("nan")):
        changed = {name: x.clone() if timed[name] else x for name, x in tensors.items()}
        for name in (name for name in tensors if timed[name]):
            changed[name][:, others] *= factor
        after = run(case, changed, cu_seqlens=ends, backend=backend)
        for name in ("out", *(f"grad {name}" for name in tensors if timed[name])):
            assert torch.equal(before[name][:, rows], after[name][:, rows]), (factor, name)
        assert not torch.equal(before["out"][:, others], after["out"][:, others])
        for name in (name for name in before if name.startswith("state") and len(before[name]) == len(lengths)):
            assert torch.equal(before[name][kept], after[name][kept]), (factor, name)


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
    # bfloat16 products would show at 1e-3: those of attention, logits and an MLP are meant to; of two operators the
    # backward pass does.
    rounds = ("softmax_attention", "linear_cross_entropy", "sink_attention", "diagonal_system", "ttt_linear")
    rounds += ("sparse_mlp", "linear_swiglu")
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


READ = {"read": torch.zeros(2, 6, 4, 8)}
MISTAKES = [
    ("delay", {"by": -1}, "by=-1, expected 0"),
    ("delta_rule", READ, "delta_rule: erase is None, expected both read and erase, or neither"),
    (
        "delta_rule",
        {**READ, "erase": READ["read"], "backend": "native"},
        "delta_rule: backend=native has no read and erase; use chunked or auto",
    ),
    ("diagonal_system", {"form": "convolution"}, "form='convolution', expected 'scan' or 'fft'"),
    ("gated_norm", {"activation": "gelu"}, "activation='gelu', expected 'silu' or 'sigmoid'"),
    ("linear_cross_entropy", {"chunk": 0}, "chunk=0, expected at least 1"),
    ("short_convolution", {"activation": "gelu"}, "activation='gelu', expected 'silu' or 'none'"),
    ("short_convolution", {"dilation": 0}, "dilation=0, expected at least 1"),
    ("sink_attention", {"window": 0}, "window=0"),
    ("sink_attention", {"extra_value": None}, "come together"),
    ("softmax_attention", {"q": torch.zeros(2, 6, 3, 8)}, "q has H=3 heads, expected a multiple of k's G=2"),
    ("softmax_attention", {"window": 0}, "window=0, expected at least 1"),
    ("softmax_attention", {"initial_state": {"k": torch.zeros(1)}}, r"has keys \['k'\], expected k, v and length"),
    ("softmax_attention", {"backend": "flash"}, "backend=flash can't run here: flash needs a CUDA device"),
    ("tensor_attention", {"degree": 3}, "degree=3, expected an even number"),
    ("tensor_attention", {"degree": -2}, "degree=-2, expected an even number"),
    ("tensor_attention", {"degree": None, "initial_state": torch.zeros(1)}, "initial_state given with degree=None"),
]


@pytest.mark.parametrize(("name", "change", "message"), MISTAKES)
def test_options_that_make_no_sense_are_named(name, change, message):
    case = CASES[name]
    with pytest.raises(ValueError, match=message):
        case.operator(**(case.tensors(6, dtype=torch.float32) | case.options | change))


@pytest.mark.parametrize("name", [name for name, x in OPERATORS.items() if x.backends])
def test_backends_that_are_unknown_or_can_not_run_here_say_so(name):
    case = CASES[name]
    with pytest.raises(ValueError, match=f"{name}: .*did you mean 'chunked'"):
        call(case, case.tensors(6), backend="chunkd")
    for backend in {"flash", "native"} - set(case.operator.backends):
        with pytest.raises(ValueError, match=f"backend={backend} can't run here: {backend} has no {name}"):
            call(case, case.tensors(6), backend=backend)
