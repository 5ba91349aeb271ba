"""Numbers in closed form: what was scaled away from the teacher is scaled back; memories last as it looks back."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqtrain.convert.calibrate import calibrate, mean_distance
from seqtrain.convert.weights import student_on
from seqtrain.testing import relative_error
from tests.convert.convert_cases import some_tokens
from tests.convert.test_student import make_student, settings

TOKENS = some_tokens(2, 40)


def make(folder, target, kept=()):
    """Teacher and student with mixers of its own."""
    config = settings(folder, f"target={target}")
    teacher, _, architecture, _ = make_student(folder, config, kept)
    student = student_on(teacher, architecture, seed=0)
    student.load_state_dict({name: value.clone() for name, value in student.state_dict().items()}, assign=True)
    return teacher, student


@torch.no_grad()
def logits(model):
    return model(TOKENS, all_logits=True)[0]


@pytest.mark.parametrize(("name", "part"), [("temperature", "qkv.weight"), ("output", "out.weight")])
def test_a_scale_is_found_again(transformers_on_disk, name, part):
    """Of queries, whose heads have each its own, or of what leaves; the window holds all tokens."""
    _, folder = transformers_on_disk("qwen2")
    teacher, student = make(folder, "gla")
    factors = torch.tensor([0.5, 2.0, 1.0, 1.25])
    with torch.no_grad():
        for block in student.blocks:
            block.mixer.get_parameter(part)[:32].mul_(
                factors.repeat_interleave(8)[:, None] if name == "temperature" else 3
            )
            if name == "temperature":
                block.mixer.qkv.bias[:32].mul_(factors.repeat_interleave(8))
    assert relative_error(logits(student), logits(teacher)) > 0.01
    found = calibrate(teacher, student, TOKENS, (name,), range(3))
    expected = 1 / factors if name == "temperature" else torch.tensor([1 / 3])
    for layer in "012":
        assert found[layer] == {name: pytest.approx(expected.tolist(), rel=1e-4)}
    assert relative_error(logits(student), logits(teacher)) < 1e-4


def test_norms_take_the_temperature(transformers_on_disk):
    """Where a family normalises queries, their norm's weight has it; scores are nearer the teacher's."""
    _, folder = transformers_on_disk("llama")
    teacher, student = make(folder, "qwen3_5_text", (0,))
    theirs, mine = teacher.blocks[0], student.blocks[0]
    x = theirs.mixer_norm(teacher.embedding(TOKENS))
    expected = theirs.mixer(x)[0]
    with torch.no_grad():
        # Too sharp by far.
        mine.mixer.q_norm.weight.copy_((1 + mine.mixer.q_norm.weight) * 8 - 1)
        before = relative_error(mine.mixer(x)[0], expected)
    [factor] = calibrate(teacher, student, TOKENS, ("temperature",), (0,))["0"]["temperature"]
    assert factor < 0.5
    assert relative_error(mine.mixer(x)[0], expected) < 0.7 * before


@pytest.mark.parametrize("target", ["gated_delta_net", "qwen3_5_text", "granitemoehybrid"])
def test_memories_last_as_long_as_attention_looks_back(transformers_on_disk, target):
    _, folder = transformers_on_disk("llama")
    teacher, student = make(folder, target, (1,))
    block = teacher.blocks[0]
    x = block.mixer_norm(teacher.embedding(TOKENS))
    # Its definition, row by row of the attention's own matrix.
    q, k, _ = block.mixer.project(x)
    place = torch.arange(40)[None]
    q, k = (block.mixer.rotated(each, place) for each in (q, k.repeat_interleave(2, 2)))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
    weights = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    expected = (weights * (place.T - place)).sum(-1).mean((0, 2))
    assert mean_distance(block.mixer, x).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    calibrate(teacher, student, TOKENS, ("timescale",), (0, 2))
    mixer = student.blocks[0].mixer
    step = mixer.memory.step if hasattr(mixer, "memory") else mixer
    bias = step.bias if hasattr(step, "bias") else step.step_bias
    half_lives = math.log(2) / (step.rate_log.exp() * F.softplus(bias).unflatten(0, (len(step.rate_log), -1)).mean(1))
    count = len(half_lives)
    heads = expected.repeat_interleave(count // 4) if count >= 4 else expected.unflatten(0, (count, -1)).mean(1)
    assert half_lives.tolist() == pytest.approx(heads.tolist(), rel=1e-3)


def test_heads_are_scaled_to_their_teachers(transformers_on_disk):
    """Two heads of Mamba-2 stand for each: the layer's error falls, and no other factor would do better."""
    _, folder = transformers_on_disk("llama")
    teacher, student = make(folder, "granitemoehybrid", (1,))
    theirs, mine = teacher.blocks[0], student.blocks[0]
    x = theirs.mixer_norm(teacher.embedding(TOKENS))
    entered = []
    handle = mine.mixer.out.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    expected = theirs.mixer(x)[0]
    before = relative_error(mine.mixer(x)[0], expected)
    handle.remove()
    found = calibrate(teacher, student, TOKENS, ("heads",), (0, 2))
    assert relative_error(mine.mixer(x)[0], expected) < before
    q, k, v = theirs.mixer.project(x)
    place = torch.arange(40)[None]
    q, k = (theirs.mixer.rotated(each, place).transpose(1, 2) for each in (q, k.repeat_interleave(2, 2)))
    context = F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, 2).transpose(1, 2), is_causal=True)
    for head, factor in enumerate(found["0"]["heads"]):
        wanted, came = context[:, head // 2].flatten().double(), entered[0].unflatten(2, (8, 8))[:, :, head].flatten()
        solution = torch.linalg.lstsq(came.double()[:, None], wanted[:, None]).solution.item()
        assert factor == pytest.approx(max(solution, 0.0), rel=1e-3, abs=1e-5)
