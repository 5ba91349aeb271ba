"""Linear attention on its part of a sharded sequence, by kernels, against the float64 definition."""

import pytest
import torch

from seqtrain.kernels import gpu, linear_attention
from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, nan_filled_empty, recording
from seqtrain.kernels.linear_attention.segment import LinearAttentionSegment
from seqtrain.kernels.segments import by_segment
from seqtrain.kernels.triton import segment
from seqtrain.testing import compare_with_oracle, recurrence_inputs, run_with_gradients

from .tolerances import assert_within

DECAYS = [
    ("none", "mild"),
    *((shape, kind) for shape in ("BTH", "BTHK") for kind in ("wide", "strong", "spikes")),
]
in_parts = by_segment(linear_attention)


@pytest.fixture(autouse=True)
def chunked_work(monkeypatch):
    """What needs no incoming state is done by kernels with tests of their own, and would take most of the time."""

    def local_output(self):
        self.out, _ = linear_attention(*self.tensors, backend="chunked", **self.options)

    monkeypatch.setattr(LinearAttentionSegment, "local_output", local_output)


def check(tensors, dtype=torch.float64):
    with nan_filled_empty():
        errors = compare_with_oracle(in_parts, tensors, backend="triton", dtype=dtype)
    assert_within(errors, dtype)


@pytest.mark.parametrize(("decay_shape", "decay"), [*DECAYS, ("H", "mild")])
def test_the_algebra(decay_shape, decay):
    check(recurrence_inputs(70, heads=1, batch=2, key_width=20, value_width=24, decay_shape=decay_shape, decay=decay))


@pytest.mark.parametrize("decay", ["strong", "spikes"])
@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
def test_float32(decay_shape, decay):
    check(recurrence_inputs(70, heads=1, decay_shape=decay_shape, decay=decay), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_16_bits(decay_shape, dtype):
    check(recurrence_inputs(70, heads=1, key_width=32, value_width=32, decay_shape=decay_shape, decay="wide"), dtype)


@pytest.mark.parametrize(("decay_shape", "tokens"), [("none", 1), ("BTH", 0), ("BTH", 32), ("BTHK", 0), ("BTHK", 33)])
def test_any_length(decay_shape, tokens):
    check(recurrence_inputs(tokens, batch=2, heads=1, decay_shape=decay_shape))


# More than one block of K and of V in every kernel, the last ones cut.
@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
def test_blocks_of_wide_heads(decay_shape):
    check(recurrence_inputs(20, heads=1, key_width=40, value_width=72, decay_shape=decay_shape, decay="wide"))


@pytest.mark.parametrize(("decay_shape", "order"), [("none", "shuffled"), ("BTH", "reversed"), ("BTHK", "shuffled")])
def test_programs_in_any_order_without_races(decay_shape, order):
    with recording(order=order) as launches:
        check(recurrence_inputs(40, batch=2, decay_shape=decay_shape))
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == ["gather", "spread", "gather", "weigh", "spread", "weigh"]


@pytest.mark.parametrize("decay_shape", ["none", "BTHK"])
def test_slabs_change_nothing(decay_shape, monkeypatch):
    tensors = recurrence_inputs(100, heads=1, decay_shape=decay_shape)
    found = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(gpu, "PROGRAMS", programs)
        found.append(run_with_gradients(in_parts, tensors, backend="triton"))
    for key, x in found[0].items():
        torch.testing.assert_close(found[1][key], x)
        torch.testing.assert_close(found[2][key], x)


def test_nothing_is_read_beyond_the_tensors():
    tensors = {key: x.float() for key, x in recurrence_inputs(33, heads=1, decay_shape="BTHK").items()}
    clean = run_with_gradients(in_parts, tensors, backend="triton")
    state = tensors.pop("initial_state").requires_grad_()
    leaves = {key: between_nans(x).requires_grad_() for key, x in tensors.items()}
    out, final = in_parts(**leaves, initial_state=state, backend="triton")
    assert torch.equal(out, clean["out"])
    assert torch.equal(final, clean["final_state"])


@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
def test_the_operators_pass_pytorch_s_own_check(decay_shape):
    tensors = recurrence_inputs(40, heads=1, decay_shape=decay_shape)
    q, k, v, log_decay, state = (None if x is None else x.requires_grad_() for x in tensors.values())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(segment._find_map.op, (k, v, log_decay), test_utils=checks)
    torch.library.opcheck(segment._read.op, (q, v, log_decay, state, 0.5), test_utils=checks)
