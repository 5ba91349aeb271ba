"""The spatial descriptor: each point's neighbors by their coordinates, wherever they stand in the sequence."""

import pytest
import torch
import torch.nn.functional as F

from seqtrain.models.descriptor import AROUND, SpatialDescriptor
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error
from tests.models import tiny

WIDTH, SIDE = 6, 3


def build(*, causal=False):
    torch.manual_seed(0)
    return SpatialDescriptor(WIDTH, SIDE, causal=causal).double()


def cloud(count=14):
    """Points in any order, and tokens that are none; what they carry."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(SIDE**3 + 2, generator=generator)[:count] for _ in range(2)])
    return tokens, torch.randn(2, count, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_it_is_a_convolution_over_the_points_there_are(causal):
    made, (tokens, x) = build(causal=causal), cloud()
    came = made(x, tokens, SequenceContext())
    weights = made.steps.view(27, WIDTH)
    assert len({*AROUND}) == 27
    for row in range(2):
        places = {
            (token // 9, token // 3 % 3, token % 3): place
            for place, token in enumerate(tokens[row].tolist())
            if token < 27
        }
        assert len(places) < 14
        expected = torch.zeros(14, WIDTH, dtype=torch.float64)
        for point, place in places.items():
            for step, weight in zip(AROUND, weights, strict=True):
                near = places.get(tuple(a + b for a, b in zip(point, step, strict=True)))
                if near is not None and (near <= place or not causal):
                    expected[place] += weight * x[row, near]
        mixed = expected @ made.mix.weight.T
        normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert relative_error(came[row], x[row] + F.gelu(normed)) < 1e-12


@torch.no_grad()
def test_documents_have_points_of_their_own():
    made, (tokens, x) = build(), cloud()
    tokens, x = tokens.view(1, -1), x.view(1, -1, WIDTH)
    packed = made(x, tokens, SequenceContext(boundaries([14, 0, 14])))
    separate = [
        made(part, ids, SequenceContext()) for part, ids in zip(x.split(14, 1), tokens.split(14, 1), strict=True)
    ]
    assert relative_error(packed, torch.cat(separate, 1)) < 1e-12


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_model_has_it_before_its_layers(kind):
    model, (tokens, labels) = tiny.build(("gla",), descriptor=3, kind=kind), tiny.batch(12)
    model(tokens, labels).backward()
    assert [name for name, weight in model.named_parameters() if not weight.grad.any()] == []
    with torch.no_grad():
        before = model(tokens, all_logits=True)[0]
        changed = tokens.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 27
        after = model(changed, all_logits=True)[0]
    assert torch.equal(before[:, :6], after[:, :6]) == (kind == "decoder")


def test_what_can_t_be():
    model, (tokens, _) = tiny.build(("gla",), descriptor=3), tiny.batch(12)
    with torch.no_grad():
        _, state = model(tokens)
    with pytest.raises(
        ValueError, match=r"model\.descriptor: a point's neighbors are looked for among tokens of whole rows"
    ):
        model.step(tokens[:, 0], state)
