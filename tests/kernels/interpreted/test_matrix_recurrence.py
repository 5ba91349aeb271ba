"""The kernels of linear attention and the delta rule against the float64 definition, and what they move."""

import math

import pytest
import torch

from seqtrain.kernels import delta_rule, linear_attention
from seqtrain.kernels.inspect.examples import count_example
from seqtrain.kernels.inspect.interpreter import assert_no_races, between_nans, nan_filled_empty, recording
from seqtrain.testing import boundaries, compare_with_oracle, recurrence_inputs, relative_error, run_with_gradients
from tests.kernels import isolation

from .tolerances import assert_within

OPERATORS = {"linear_attention": linear_attention, "delta_rule": delta_rule}
DECAYS = [
    ("none", "mild"),
    *((shape, kind) for shape in ("BTH", "BTHK") for kind in ("wide", "strong", "spikes")),
]
LENGTHS = (70, 0, 1, 17)


def case(name, lengths=LENGTHS, *, key_width=16, value_width=20, beta=2.0, **options):
    """Inputs for documents of these lengths, and their boundaries."""
    tensors = recurrence_inputs(
        sum(lengths),
        heads=1,
        states=len(lengths),
        key_width=key_width,
        value_width=value_width,
        beta=beta if name == "delta_rule" else None,
        **options,
    )
    return tensors, boundaries(lengths)


def check(name, tensors, dtype=torch.float64, **options):
    with nan_filled_empty():
        errors = compare_with_oracle(OPERATORS[name], tensors, backend="triton", dtype=dtype, **options)
    assert_within(errors, dtype)


@pytest.mark.parametrize(("decay_shape", "decay"), DECAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_algebra(name, decay_shape, decay):
    tensors, cu_seqlens = case(name, decay_shape=decay_shape, decay=decay)
    check(name, tensors, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("tokens", [2, 63, 64, 129])
@pytest.mark.parametrize(("name", "decay_shape"), [("delta_rule", "BTH"), ("linear_attention", "BTHK")])
def test_rows_and_heads(name, decay_shape, tokens):
    beta = 2.0 if name == "delta_rule" else None
    check(name, recurrence_inputs(tokens, batch=2, heads=2 if tokens < 10 else 1, decay_shape=decay_shape, beta=beta))


def test_decays_of_a_head():
    check("linear_attention", recurrence_inputs(70, batch=1, decay_shape="H"))


# More than one block of K and of V in every kernel, the last ones cut.
@pytest.mark.parametrize("widths", [(72, 40), (20, 136)])
@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_blocks_of_wide_heads(name, decay_shape, widths):
    tensors, _ = case(name, (66,), key_width=widths[0], value_width=widths[1], decay_shape=decay_shape, decay="wide")
    check(name, tensors, torch.float32)


# The last part of the keys cut, or without any.
@pytest.mark.parametrize("key_width", [200, 130])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_states_in_parts(name, decay_shape, key_width):
    tensors, cu_seqlens = case(name, (34, 0, 1), key_width=key_width, decay_shape=decay_shape)
    check(name, tensors, torch.float32, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(("decay_shape", "decay"), [case for case in DECAYS if case[1] != "wide"])
@pytest.mark.parametrize("name", OPERATORS)
def test_float32(name, decay_shape, decay):
    tensors, cu_seqlens = case(name, decay_shape=decay_shape, decay=decay)
    check(name, tensors, torch.float32, cu_seqlens=cu_seqlens)


# Blocks of K that are no whole number of them, but of narrower ones.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_16_bits(name, decay_shape, dtype):
    tensors, cu_seqlens = case(name, key_width=80, value_width=40, decay_shape=decay_shape, decay="wide", beta=1.0)
    check(name, tensors, dtype, cu_seqlens=cu_seqlens)


# Keys all but equal make float32's rounding grow at beta = 2 (2.3e-6): the algebra is held to them, float32 to a cosine
# of 0.94 between keys.
@pytest.mark.parametrize(("dtype", "correlation"), [(torch.float64, 100.0), (torch.float32, 3.0)])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
def test_constant_beta_and_keys_that_are_alike(beta, decay_shape, dtype, correlation):
    tensors, cu_seqlens = case("delta_rule", (70,), decay_shape=decay_shape, correlation=correlation)
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    check("delta_rule", tensors, dtype, cu_seqlens=cu_seqlens)


# Log2 decays of a chunk's halves, about where its middle ceases to stand for boundaries: what grows from there must not
# overflow, and what does not grow must not be lost.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("halves", [(99, 0), (0, 99), (99, 99), (150, 0), (0, 150), (120, 120)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_decays_about_what_the_middle_of_a_chunk_bears(name, halves, dtype):
    tensors, cu_seqlens = case(name, (128,), key_width=20, decay_shape="BTHK", beta=1.0)
    sums = torch.tensor(halves, dtype=torch.float64).repeat(2).repeat_interleave(32) * math.log(2) / 32
    # Half of the channels decay so; the others hardly, so that there is something to see.
    tensors["log_decay"][..., ::2] = -sums.view(1, 128, 1, 1)
    check(name, tensors, dtype, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize(
    ("name", "decay_shape", "kernels"),
    [
        ("linear_attention", "BTH", ["forward", "forward", "reverse", "gradients"]),
        ("delta_rule", "BTHK", ["prepare", "forward", "prepare", "forward", "reverse", "gradients"]),
    ],
)
def test_programs_in_any_order_without_races(name, decay_shape, kernels, order):
    tensors, cu_seqlens = case(name, (70, 3), key_width=20, value_width=40, decay_shape=decay_shape)
    with recording(order=order) as launches:
        check(name, tensors, cu_seqlens=cu_seqlens)
    assert_no_races(launches)
    assert [launch.kernel for launch in launches] == kernels


@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_documents_do_not_see_each_other(name, decay_shape):
    tensors, _ = case(name, isolation.LENGTHS, decay_shape=decay_shape)
    isolation.assert_documents_apart(OPERATORS[name], tensors, "triton", copied=between_nans)


def test_strided_inputs_and_values_of_another_dtype():
    tensors, _ = case("delta_rule", (20,), decay_shape="BTHK")
    tensors = {key: x.to(torch.bfloat16) if key in "qk" else x.float() for key, x in tensors.items()}
    strided = {key: x.transpose(0, -1).contiguous().transpose(0, -1) for key, x in tensors.items()}
    expected = run_with_gradients(delta_rule, tensors, backend="triton")
    came = run_with_gradients(delta_rule, strided, backend="triton")
    assert all(torch.equal(came[key], expected[key]) for key in expected)
    assert came["out"].dtype == came["grad v"].dtype == torch.float32
    assert came["grad q"].dtype == torch.bfloat16


@pytest.mark.parametrize("decay_shape", ["BTH", "BTHK"])
def test_a_segment_s_map_and_its_outputs_come_of_one_pass(decay_shape):
    tensors, _ = case("delta_rule", (70,), decay_shape=decay_shape)
    state = tensors.pop("initial_state")
    with recording() as launches:
        segment = delta_rule.segment(list(tensors.values()), {}, "triton")
        transition, update = segment.transition()
        segment.local_output()
        out = segment.add_incoming(state)
    expected, final = delta_rule(**tensors, initial_state=state, backend="reference")
    assert relative_error(out, expected) < 1e-12
    assert relative_error(transition @ state + update, final) < 1e-12
    assert [launch.kernel for launch in launches] == ["prepare", "forward"]


def test_nothing_to_do():
    tensors, cu_seqlens = case("delta_rule", (0, 0))
    came = run_with_gradients(delta_rule, tensors, cu_seqlens=cu_seqlens, backend="triton")
    assert came["out"].shape == (1, 0, 1, 20)
    assert torch.equal(came["final_state"], tensors["initial_state"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay_shape", ["none", "BTH", "BTHK"])
@pytest.mark.parametrize("name", OPERATORS)
def test_one_token_is_one_launch(name, decay_shape, dtype):
    tensors = recurrence_inputs(
        1,
        batch=2,
        heads=3,
        key_width=20,
        value_width=24,
        decay_shape=decay_shape,
        beta=2.0 if name == "delta_rule" else None,
    )
    check(name, tensors, dtype)
    plain = {key: x if x is None else x.to(dtype) for key, x in tensors.items()}
    with recording(order="shuffled") as launches:
        OPERATORS[name](**plain, backend="triton")
    assert [launch.kernel for launch in launches] == ["step"]
    assert_no_races(launches)


# Bytes per token and head, forward and backward, and launches of both.
LIMITS = {
    "linear_attention no decay": (1100, 5200, 4),
    "linear_attention decay [B,T,H]": (1100, 5200, 4),
    "linear_attention decay [B,T,H,K]": (3000, 8500, 6),
    "delta_rule no decay": (1600, 6300, 5),
    "delta_rule decay [B,T,H]": (1600, 6300, 5),
    "delta_rule decay [B,T,H,K]": (3800, 10500, 6),
}


# The example's keys are longer than the delta rule bears: its numbers overflow, which no count depends on.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", LIMITS)
def test_bytes_and_launches(name):
    counts = count_example(f"{name} K=V=128 bfloat16")
    assert all(count.floor <= count.bytes <= limit for count, limit in zip(counts, LIMITS[name], strict=False))
    assert sum(count.launches for count in counts) <= LIMITS[name][2]
