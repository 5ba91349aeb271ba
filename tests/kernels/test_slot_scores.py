"""Slot scores: the form made of linear attention's passes against the definition, and the definition against GSA's."""

import pytest
import torch

from seqtrain.kernels import linear_attention, slot_scores
from seqtrain.testing import assert_within, boundaries, compare_with_oracle, decay_like, relative_error


def inputs(tokens, *, batch=1, states=None, heads=2, key=6, slots=5, decay="mild"):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_decay = decay_like((batch, tokens, heads, slots), decay, generator)
    return {
        "q": normal(batch, tokens, heads, key),
        "k": normal(batch, tokens, heads, key),
        "written": -torch.expm1(log_decay) if decay != "zero" else normal(batch, tokens, heads, slots),
        "log_decay": log_decay,
        "initial_state": normal(batch if states is None else states, heads, slots, key),
    }


@pytest.mark.parametrize("decay", ["mild", "wide", "strong", "spikes", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_match_the_definition(decay, dtype):
    assert_within(compare_with_oracle(slot_scores, inputs(130, batch=2, decay=decay), dtype=dtype), dtype)


@pytest.mark.parametrize("lengths", [(130, 0, 1, 1, 3, 65), (0, 0), (2,) * 20, (1,), (1, 100)])
def test_documents_match_the_definition(lengths):
    tensors = inputs(sum(lengths), states=len(lengths), decay="wide")
    assert_within(compare_with_oracle(slot_scores, tensors, cu_seqlens=boundaries(lengths)), torch.float32)


@pytest.mark.parametrize("slots", [5, 40])  # chunks of 32 and of 64 tokens
def test_the_algebra_is_exact_in_float64(slots):
    tensors = inputs(150, slots=slots, decay="spikes")
    assert_within(compare_with_oracle(slot_scores, tensors, dtype=torch.float64, scale=0.3), torch.float64)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_each_slots_key_is_a_memory_of_its_own(backend):
    """A slot is linear attention with one value column, decayed as the slot is."""
    tensors = inputs(40)
    state = tensors.pop("initial_state")
    out, after = slot_scores(**tensors, initial_state=state, backend=backend)
    for slot in range(5):
        written, decay = tensors["written"][..., slot : slot + 1], tensors["log_decay"][..., slot]
        alone, kept = linear_attention(
            tensors["q"], tensors["k"], written, decay, initial_state=state[:, :, slot, :, None], backend="reference"
        )
        assert relative_error(out[..., slot], alone[..., 0]) < 1e-12
        assert relative_error(after[:, :, slot], kept[..., 0]) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"written": torch.zeros(1, 4, 2, 3)}, r"log_decay has shape \(1, 4, 2, 5\), expected .* with M=3"),
        ({"log_decay": torch.zeros(1, 4, 2)}, "log_decay has shape"),
        ({"initial_state": torch.zeros(1, 2, 6, 5)}, "initial_state has shape"),
        ({"backend": "magic"}, "backend 'magic' is unknown"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        slot_scores(**(inputs(4) | change))
