"""Generation: what it chooses, and that it takes no more memory for more tokens."""

import pytest
import torch

from seqtrain.mixers import MIXERS
from seqtrain.models import generate, generation
from seqtrain.models.generation import choose_token
from tests.models import tiny


def build(*layers):
    return tiny.build(layers, depth=len(layers), width=32, initializer_range=0.3, settings={}, dtype=torch.float64)


def prompt(rows=3, tokens=6):
    return torch.randint(tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass():
    model = build(*MIXERS.names)
    tokens = prompt()
    new = generate(model, tokens, max_new_tokens=12, temperature=0)
    assert new.shape == (3, 12)
    assert new.unique().numel() > 5
    logits, _ = model(torch.cat([tokens, new], 1), all_logits=True)
    assert torch.equal(new, logits[:, 5:-1].argmax(-1))


def test_the_generator_decides_what_is_drawn():
    model = build("gla")

    def drawn(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt(), max_new_tokens=20, generator=generator, **options)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    greedy = generate(model, prompt(), max_new_tokens=20, temperature=0)
    assert torch.equal(drawn(1, top_k=1), greedy)
    assert torch.equal(drawn(1, top_p=1e-6), greedy)


def test_a_stop_token_ends_its_row_and_then_the_work():
    model = build("gla", "hgrn2")
    free = generate(model, prompt(), max_new_tokens=30, temperature=0)
    stop = int(free[0, 4])
    ended = generate(model, prompt(), max_new_tokens=30, temperature=0, stop=stop)
    for row, before in zip(ended, free, strict=True):
        length = (before == stop).nonzero()[0, 0] + 1 if (before == stop).any() else 30
        assert torch.equal(row[:length], before[:length])
        assert (row[length:] == stop).all()
    only = generate(model, prompt()[:1], max_new_tokens=30, temperature=0, stop=stop)
    assert only.shape[1] == (free[0] == stop).nonzero()[0, 0] + 1


def test_rows_of_any_lengths_are_continued_as_alone():
    model = build("gla", "attention", "sliding_attention", "gated_delta_net", "streaming_attention")
    rows = [row[:length] for row, length in zip(prompt(4, 9), (9, 1, 4, 7), strict=True)]
    alone = [generate(model, row[None], max_new_tokens=16, temperature=0)[0] for row in rows]
    assert torch.equal(generate(model, rows, max_new_tokens=16, temperature=0), torch.stack(alone))
    # Rows end at different tokens, and those that go on are as they were.
    stop = int(alone[1][3])
    ended = generate(model, rows, max_new_tokens=16, temperature=0, stop=stop)
    for row, free in zip(ended, alone, strict=True):
        length = int((free == stop).nonzero()[0, 0]) + 1 if (free == stop).any() else len(row)
        assert torch.equal(row[:length], free[: len(row)][:length])
        assert (row[length:] == stop).all()


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    model = build("mamba2", "attention", "sliding_attention")
    whole = generate(model, prompt(2, 23), max_new_tokens=8, temperature=0)
    read = []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[-1]))
    monkeypatch.setattr(generation, "PREFILL", 10)
    assert torch.equal(generate(model, prompt(2, 23), max_new_tokens=8, temperature=0), whole)
    assert read[:3] == [10, 10, 3]


def test_choosing_follows_temperature_top_k_and_top_p():
    probability = torch.tensor([0.1, 0.4, 0.2, 0.3]).repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        token = choose_token(probability.log(), temperature, top_k, top_p, generator)
        return token.bincount(minlength=4) / len(token)

    def close(came, expected):
        return torch.allclose(came, torch.tensor(expected), atol=0.02)

    assert close(shares(), [0.1, 0.4, 0.2, 0.3])
    assert close(shares(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30])
    assert close(shares(top_k=2), [0, 4 / 7, 0, 3 / 7])
    assert close(shares(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9])
    assert close(shares(top_p=0.65), [0, 4 / 7, 0, 3 / 7])


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (prompt()[0], {}, r"prompt has shape \(6,\), expected \[B, T\]"),
        (prompt()[:, :0], {}, r"prompt has shape \(3, 0\)"),
        (prompt() + 3, {}, "prompt holds ids from 4 to 40, expected 0 to 39"),
        (prompt(), {"temperature": -1.0}, "temperature=-1.0"),
        (prompt(), {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_wrong_arguments_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build("gla"), tokens, max_new_tokens=1, **options)
