"""Rotations that depend on how long a text is: LongRoPE and dynamic NTK, those of rows of a stated length."""

import pytest
import torch

from seqtrain.models import from_pretrained
from seqtrain.testing import relative_error
from tests.models.family_cases import make, some_tokens

FIRST, MOST = 24, 96
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": FIRST,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 2.5, 5.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
KINDS = {
    "longrope": ("phi3", MOST, {"rope_parameters": LONG, "original_max_position_embeddings": FIRST}),
    "dynamic": ("qwen3", FIRST, {"rope_parameters": DYNAMIC}),
}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    """transformers' model with such a rotation, its folder, and the longest text of its first training."""
    name, most, options = KINDS[request.param]
    theirs = make(name, max_position_embeddings=most, **options)
    theirs.save_pretrained(tmp_path / "model")
    return theirs.eval(), tmp_path / "model", FIRST


@torch.no_grad()
@pytest.mark.parametrize("longer", [False, True])
def test_rows_of_a_stated_length_are_those_of_transformers(saved, longer):
    theirs, folder, first = saved
    tokens = some_tokens(1, 2 * first if longer else first)
    ours = from_pretrained(folder, tokens=tokens.shape[1])
    logits, _ = ours(tokens, all_logits=True)
    assert relative_error(logits, theirs(tokens).logits) < 1e-5
    # The length matters, or this would show nothing.
    other, _ = from_pretrained(folder, tokens=first if longer else 2 * first)(tokens, all_logits=True)
    assert relative_error(other, logits) > 1e-3


@torch.no_grad()
def test_a_model_has_one_rotation_whatever_it_reads(saved):
    _, folder, first = saved
    ours = from_pretrained(folder, tokens=2 * first)
    tokens = some_tokens(1, 2 * first)
    whole, _ = ours(tokens, all_logits=True)
    start, state = ours(tokens[:, :first], all_logits=True)
    rest, _ = ours(tokens[:, first:], state=state, all_logits=True)
    assert relative_error(torch.cat((start, rest), 1), whole) < 1e-5
