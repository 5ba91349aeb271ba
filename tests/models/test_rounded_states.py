"""States of generation in few bits: how far rounding goes, what is rounded when, and what it takes."""

import math

import pytest
import torch

from seqtrain.mixers import MIXERS
from seqtrain.models import generate, generation
from seqtrain.models.rounded_states import GenerationConfig, RoundedStates, rounded_bytes
from seqtrain.models.turboquant import TurboQuant, codebook, parts_of
from seqtrain.testing import relative_error
from tests.models import tiny


def rows(count=2000, width=64, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, width)


@pytest.mark.parametrize(("bits", "published"), [(2, 0.117), (3, 0.03), (4, 0.009)])
def test_rows_of_any_scale_are_rounded_at_the_papers_distortion(bits, published):
    x, quantizer = rows(), TurboQuant(64, bits)
    packed = quantizer.pack(x)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2000, 8 * bits + 4))
    found = quantizer.unpack(packed)
    error = ((found - x).square().sum(-1) / x.square().sum(-1)).mean()
    assert 4.0**-bits <= error < 1.2 * published
    # Rounded again, rows stay where they are.
    again = quantizer.unpack(quantizer.pack(found))
    assert relative_error(again, found) < 1e-3
    assert relative_error(found.norm(dim=-1), x.norm(dim=-1)) < 1e-6


@pytest.mark.parametrize(("bits", "published"), [(2, 0.56), (3, 0.18), (4, 0.047)])
def test_a_bit_of_the_rest_makes_inner_products_right_in_the_mean(bits, published):
    # The random projection is one and the same: the mean is over rows of all directions.
    x = torch.nn.functional.normalize(torch.randn(20000, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    quantizer = TurboQuant(64, bits, unbiased=True)
    assert quantizer.pack(x).shape[-1] == quantizer.row_bytes == 8 * bits + 8
    found = quantizer.unpack(quantizer.pack(x))
    other = torch.nn.functional.normalize(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), dim=-1)
    assert ((found - x) * other).sum(-1).square().mean() * 64 == pytest.approx(published, rel=0.25)
    plain = TurboQuant(64, bits - 1)
    slopes = [(each * x).sum(-1).mean().item() for each in (found, plain.unpack(plain.pack(x)))]
    assert abs(slopes[0] - 1) < 0.01 < abs(slopes[1] - 1)


def test_the_codebook_is_that_of_points_on_a_sphere():
    # Lloyd and Max's of normal numbers at two bits; coordinates of short rows are less far out.
    assert codebook(4096, 2).tolist() == pytest.approx([-1.51, -0.4528, 0.4528, 1.51], abs=2e-3)
    assert codebook(8, 2).abs().max() < 1.45
    for width in (8, 64, 128):
        x = torch.nn.functional.normalize(rows(4000, width).sign() * torch.randn(4000, width), dim=-1)
        code = codebook(width, 3).float()
        near = code[torch.bucketize(x * math.sqrt(width), (code[1:] + code[:-1]) / 2)]
        best = [(x * math.sqrt(width))[near == each].mean().item() for each in code]
        assert best == pytest.approx(code.tolist(), abs=0.03)


def test_rows_of_zeros_and_odd_widths_are_kept():
    assert [parts_of(width) for width in (96, 7, 65, 131, 576)] == [96, 0, 65, 0, 96]
    quantizer = TurboQuant(9, 3)
    x = torch.zeros(2, 9)
    x[1, 3] = 4
    found = quantizer.unpack(quantizer.pack(x))
    assert torch.equal(found[0], x[0])
    assert relative_error(found[1], x[1]) < 0.4


def build(*layers, **fields):
    return tiny.build(layers, depth=len(layers), width=32, initializer_range=0.3, dtype=torch.float32, **fields)


def prompt(count=3, tokens=6):
    return torch.randint(tiny.VOCAB, (count, tokens), generator=torch.Generator().manual_seed(8))


# A quantizer that loses nothing: what is left is which states are read, kept and left out.
class Exact:
    def __init__(self, width, bits):
        self.width, self.row_bytes = width, 8 * width

    def pack(self, x):
        return x.double().contiguous().view(torch.uint8)

    def unpack(self, packed):
        return packed.contiguous().view(torch.float64)


@pytest.mark.parametrize(
    ("every", "layers"),
    [
        (1, ("gated_delta_net", "attention", "based")),
        (4, ("s4d", "sliding_attention", "gsa")),
        *(pytest.param(4, (name,), marks=pytest.mark.all) for name in MIXERS.names),
    ],
    ids=str,
)
def test_what_rounding_does_not_lose_is_as_without(every, layers, monkeypatch):
    monkeypatch.setattr("seqtrain.models.rounded_states._quantizer", Exact)
    monkeypatch.setattr(generation, "PREFILL", 10)
    model = build(*layers).double()
    config = GenerationConfig(4, every)
    for given in (prompt(), prompt(2, 45), [row[:length] for row, length in zip(prompt(), (6, 1, 4), strict=True)]):
        plain = generate(model, given, max_new_tokens=14, temperature=0)
        assert torch.equal(generate(model, given, max_new_tokens=14, temperature=0, config=config), plain)
    stop = int(plain[0, 4])
    ended = generate(model, given, max_new_tokens=14, temperature=0, stop=stop)
    assert torch.equal(generate(model, given, max_new_tokens=14, temperature=0, stop=stop, config=config), ended)


@torch.no_grad()
def test_states_take_the_bytes_that_are_counted_and_errors_fall_with_bits():
    model = build("gated_delta_net", "attention", "sliding_attention", "s5", groups=(0, 0, 0, 0))
    tokens = prompt(2, 40)
    logits, plain = model(tokens)
    errors, sizes = [], []
    for bits in (2, 3, 4):
        config = GenerationConfig(bits, 4)
        state = RoundedStates(len(model.blocks), config)
        for part in tokens.split(4, 1):
            found, state = model(part, state=state)
        errors.append(relative_error(found, logits))
        assert state.nbytes == sum(rounded_bytes(layer, bits) for layer in plain)
        sizes.append(state.nbytes)
    assert 0 < errors[2] < errors[1] < errors[0] < 0.7
    assert sizes[0] < sizes[1] < sizes[2] < 0.4 * sum(x.nbytes for layer in plain for x in layer.values())


@torch.no_grad()
def test_keys_are_rounded_once():
    model = build("attention", "sliding_attention")
    config = GenerationConfig(3, 2)
    state = RoundedStates(2, config)
    _, first = model(prompt(2, 8), state=state)
    _, then = model(prompt(2, 2), state=first)
    for (early, _), (late, _) in zip(first._layers, then._layers, strict=True):
        for name in "kv":
            seen = early[name].shape[1] - (late[name].shape[1] == early[name].shape[1]) * 2
            assert torch.equal(late[name][:, :-2][:, -seen:], early[name][:, -seen:])
