"""Models of other people's families: what transformers computes, exactly what was stored, and cut like any other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from seqtrain.errors import ConfigError
from seqtrain.models import from_pretrained, generate, save_pretrained
from seqtrain.testing import relative_error
from tests.command_cases import refused
from tests.models.family_cases import CASES, make, our_gradients, some_tokens, their_gradients

LIMIT = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a case, and transformers' model of it."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = make(name), tmp_path_factory.mktemp(name) / "model"
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(saved, tmp_path, name):
    theirs, folder = saved(name)
    tokens = some_tokens(2, 70)
    theirs.zero_grad(set_to_none=True)
    expected = theirs(tokens, labels=tokens)
    expected.loss.backward()
    ours = from_pretrained(folder)
    logits, _ = ours(tokens, all_logits=True)
    assert relative_error(logits, expected.logits) < LIMIT
    (ours(tokens[:, :-1], tokens[:, 1:]) / (2 * 69)).backward()
    truth, came = their_gradients(theirs, tmp_path / "gradients"), our_gradients(ours)
    assert came.keys() == truth.keys()
    whole = max(value.norm() for value in truth.values())
    for key, value in truth.items():
        # A gradient that vanishes in exact arithmetic is rounding on either side.
        assert (came[key] - value).norm() <= LIMIT * max(value.norm(), whole / 30), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_back_bit_for_bit(saved, tmp_path, name, dtype):
    theirs, folder = saved(name)
    if dtype != torch.float32:
        folder = tmp_path / "narrow"
        make(name).to(dtype).save_pretrained(folder)
    save_pretrained(from_pretrained(folder), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(after[key], value), key
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    _, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(saved, name):
    theirs, folder = saved(name)
    prompt = some_tokens(1, 20)
    expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False, use_cache=True)[:, 20:]
    assert torch.equal(generate(from_pretrained(folder), prompt, max_new_tokens=32, temperature=0), expected)


def test_a_model_that_came_from_nowhere_is_not_written(tmp_path):
    from tests.models.tiny import build

    with refused("save_pretrained: this model did not come from from_pretrained", ConfigError):
        save_pretrained(build(("gla",)), tmp_path / "model")
