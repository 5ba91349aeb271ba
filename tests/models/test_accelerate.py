"""Our operators under transformers' own modules: the same numbers, documents kept apart, and nothing left behind."""

import copy

import pytest
import torch

import seqtrain
from seqtrain.testing import boundaries
from tests.models.transformers_families import FAMILIES, VOCABULARY, small

REPLACED = sorted(set(FAMILIES) - {"xlstm"})
QUICK = ("mamba2", "qwen3_5_text")
# One of each function and method that is replaced.
CI = ("mamba", "kimi_linear", "recurrent_gemma", "minimax", "granitemoehybrid", "lfm2")
TIERS = {name: () if name in QUICK else pytest.mark.all if name in CI else pytest.mark.full for name in REPLACED}
every_family = pytest.mark.parametrize("family", [pytest.param(name, marks=tier) for name, tier in TIERS.items()])
LENGTHS = (9, 1, 27)


def rows(*shape):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model, tokens, **packing):
    model.zero_grad()
    logits = model(tokens, use_cache=False, **packing).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    return logits.detach(), {
        name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
    }


def assert_equal(came, expected):
    """Logits within 1e-5 of the largest; gradients of their size, or where they nearly vanish, of the whole one's."""
    torch.testing.assert_close(came[0], expected[0], rtol=0, atol=1e-5 * max(1, float(expected[0].abs().max())))
    largest = max(float(each.norm()) for each in expected[1].values())
    assert came[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (came[1][name] - gradient).norm() <= 1e-5 * max(gradient.norm(), largest / 30), name


@every_family
def test_numbers_are_those_of_transformers(family):
    model, tokens = small(family), rows(2, 37)
    for training in (False, True):
        model.train(training)
        expected = outputs_and_gradients(model, tokens)
        with seqtrain.accelerate_hf(model) as done:
            came = outputs_and_gradients(model, tokens)
        assert done.replaced
        assert not done.kept
        assert_equal(came, expected)


@every_family
def test_packed_documents_are_as_separate_ones(family):
    model, tokens, packed = small(family), rows(1, sum(LENGTHS)), boundaries(LENGTHS)
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()
    forms = {"position_ids": places}, {"seq_idx": numbers}, {"cu_seq_lens_q": packed.int()}
    expected = torch.cat([model(part, use_cache=False).logits for part in tokens.split(LENGTHS, 1)], 1)
    with seqtrain.accelerate_hf(model):
        for form in forms:
            torch.testing.assert_close(model(tokens, **form).logits, expected, rtol=0, atol=1e-5)
        other = tokens.clone()
        other[:, : LENGTHS[0]] = 3
        model(tokens)  # leaves nothing of its packing behind
        twice = torch.cat([tokens, other]), places.expand(2, -1)
        first, second = model(twice[0], position_ids=twice[1]).logits[:, LENGTHS[0] :]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@every_family
def test_generation_and_caches_are_those_of_transformers(family):
    model, tokens = small(family), rows(2, 11)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def written():
        return [model.generate(tokens, **options, **more) for more in ({}, {"attention_mask": mask})]

    expected = written()
    with seqtrain.accelerate_hf(model):
        came = written()
    for one, other in zip(came, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", QUICK)
def test_nothing_is_left_behind(family):
    model, tokens = small(family), rows(1, 37)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    expected = outputs_and_gradients(model, tokens)
    other = small(family)
    with seqtrain.accelerate_hf(model) as done:
        assert all("forward" not in module.__dict__ for module in other.modules())
        assert "seqtrain's" in str(done)
        with pytest.raises(ValueError, match="accelerated already"):
            seqtrain.accelerate_hf(model)
        copied = copy.deepcopy(model)
        mixer = next(module for module in copied.modules() if "forward" in module.__dict__)
        assert mixer.forward.__self__ is mixer
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    came = outputs_and_gradients(model, tokens)
    assert torch.equal(came[0], expected[0])


def test_packed_rows_are_refused_where_layers_are_computed_again():
    model, tokens = small("mamba2").train(), rows(1, 10)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with seqtrain.accelerate_hf(model), pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens, position_ids=(torch.arange(10) % 5)[None])


def test_a_packed_row_continues_no_cache():
    model, tokens = small("mamba2"), rows(1, 10)
    with seqtrain.accelerate_hf(model):
        cache = model(tokens, use_cache=True).cache_params
        with pytest.raises(ValueError, match="packed rows can't continue a cache"):
            model(tokens, cache_params=cache, seq_idx=(torch.arange(10) // 5)[None].int())


def test_what_stays_is_said():
    done = seqtrain.accelerate_hf(small("xlstm"))
    assert not done.replaced
    assert "running maximum" in str(done)
    assert "no layer" in str(seqtrain.accelerate_hf(torch.nn.Linear(2, 2)))
    model = small("lfm2")
    layer = next(module for module in model.modules() if type(module).__name__ == "Lfm2ShortConv")
    layer.forward = layer.forward
    assert "another program" in str(seqtrain.accelerate_hf(model))
