"""Targets that others serve: plain transformers loads them, and what they keep of the teacher they keep exactly."""

import subprocess
import sys

import pytest
import torch

from seqtrain.convert.architecture import changes
from seqtrain.convert.verify import end_checks, start_checks
from seqtrain.convert.weights import export
from seqtrain.errors import ConfigError
from seqtrain.models.families import servable_targets
from seqtrain.testing import relative_error
from tests.command_cases import refused
from tests.convert.convert_cases import some_tokens
from tests.convert.test_student import make_student, settings

TARGETS = ("granitemoehybrid", "qwen3_next", "qwen3_5_text")


def make(folder, target, kept):
    return make_student(folder, settings(folder, f"target={target}"), kept)


def exported(made, target, folder):
    """What plain transformers reads."""
    from transformers import AutoModelForCausalLM

    _, student, architecture, source = made
    export(student, architecture, source, folder, target)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


def test_the_targets_are_these():
    assert sorted(servable_targets()) == sorted(TARGETS)


# Rotation of Llama 3.1, biases of queries, keys and values, a tied head.
@pytest.mark.parametrize("kind", ["llama-3.1", "qwen2", pytest.param("smollm2", marks=pytest.mark.all)])
@torch.no_grad()
def test_all_layers_kept_is_the_teacher(transformers_on_disk, tmp_path, kind):
    theirs, folder = transformers_on_disk(kind)
    made = make(folder, "granitemoehybrid", (0, 1, 2))
    tokens = some_tokens(2, 60)
    assert [check["passed"] for check in start_checks(*made[:2], tokens, identical=True)] == [True]
    model = exported(made, "granitemoehybrid", tmp_path / "model")
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["qwen3_next", "qwen3_5_text"])
@torch.no_grad()
def test_normed_attention_stays_what_it_is_under_a_gate(transformers_on_disk, target):
    """Qwen3's layers, norms of queries and keys among them; the gate is open by half, which the output makes up for."""
    _, folder = transformers_on_disk("qwen3")
    teacher, student, *_ = make(folder, target, (0, 2))
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    for index in (0, 2):
        mine, theirs = (model.blocks[index] for model in (student, teacher))
        assert relative_error(mine.mixer(mine.mixer_norm(x))[0], theirs.mixer(theirs.mixer_norm(x))[0]) < 1e-5


@pytest.mark.parametrize(
    ("target", "kind", "kept"),
    [
        ("granitemoehybrid", "smollm2", (1,)),
        ("qwen3_5_text", "qwen3", (1,)),
        pytest.param("granitemoehybrid", "qwen3-square", (1,), marks=pytest.mark.all),
        pytest.param("qwen3_5_text", "smollm2", (2,), marks=pytest.mark.all),
        pytest.param("qwen3_next", "llama-3.1", (1,), marks=pytest.mark.all),
    ],
)
@torch.no_grad()
def test_plain_transformers_computes_the_same(transformers_on_disk, tmp_path, target, kind, kept):
    _, folder = transformers_on_disk(kind)
    made = make(folder, target, kept)
    student, tokens = made[1], some_tokens(2, 50)
    assert [check for check in end_checks(student, tokens) if not check["passed"]] == []
    model = exported(made, target, tmp_path / "model")
    expected = student(tokens, all_logits=True)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_projections_are_the_teachers_head_by_head(transformers_on_disk):
    """Two heads of Mamba-2 in the place of each of attention, of which two share a key."""
    _, folder = transformers_on_disk("llama")
    teacher, student, *_ = make(folder, "granitemoehybrid", ())
    theirs, mine = teacher.blocks[0].mixer, student.blocks[0].mixer
    assert (mine.shape.heads, mine.config.groups, mine.value) == (8, 4, 8)
    q, k, v = theirs.qkv.weight.unflatten(0, (-1, 8)).split([4, 2, 2])
    rows = {name: mine.project.weight[place].unflatten(0, (-1, 8)) for name, (_, place) in mine.projections().items()}
    for head in range(4):
        assert torch.equal(rows["q"][head], q[head])
        assert torch.equal(rows["k"][head], k[head // 2])
        assert torch.equal(rows["v"][2 * head], v[head // 2])
        assert torch.equal(rows["v"][2 * head + 1], v[head // 2])


def test_what_is_lost_is_said(transformers_on_disk):
    from seqtrain.convert.architecture import architecture_of, student_of
    from seqtrain.convert.sources import open_source

    def said(kind, target):
        _, folder = transformers_on_disk(kind)
        teacher = architecture_of(open_source(str(folder)))
        return changes(teacher, student_of(teacher, settings(folder, f"target={target}"), (0, 2)))

    assert said("llama", "granitemoehybrid") == said("qwen3", "qwen3_5_text") == {}
    assert said("llama", "qwen3_5_text") == dict.fromkeys((0, 2), "has norms of queries and keys")
    assert said("qwen3-square", "granitemoehybrid") == dict.fromkeys((0, 2), "lacks norms of queries and keys")


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("mistral", ("target=granitemoehybrid",), "twice model.width=32 must be a multiple of 4 heads x 10"),
        (
            "mistral-window",
            ("target=qwen3_5_text",),
            "its softmax layers see all tokens, and the teacher's have windows",
        ),
        ("llama", ("target=granitemoehybrid", "layer.sinks=2"), "layer.sinks=2: target=granitemoehybrid has layers of"),
        ("llama", ("target=granitmoehybrid",), "did you mean 'granitemoehybrid'"),
        # The type that transformers gives text without pictures.
        ("llama", ("target=qwen3_5",), "did you mean 'qwen3_5_text'"),
    ],
)
def test_what_a_target_cannot_be_is_one_line(transformers_on_disk, kind, overrides, message):
    _, folder = transformers_on_disk(kind)
    with refused(message, ConfigError):
        make_student(folder, settings(folder, *overrides), (0,))


@pytest.mark.all
def test_a_process_without_this_package_generates_the_same(transformers_on_disk, tmp_path):
    _, folder = transformers_on_disk("smollm2")
    made = make(folder, "granitemoehybrid", (1,))
    exported(made, "granitemoehybrid", tmp_path / "model")
    script = """
import sys, torch
sys.path[:] = [place for place in sys.path if place not in ("", ".")]
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model").eval()
tokens = torch.tensor([eval(sys.argv[1])])
new = model.generate(tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
assert "seqtrain" not in sys.modules
print(new[0].tolist())
"""
    tokens = some_tokens(1, 20)
    said = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tokens[0].tolist())],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    from seqtrain.models import generate

    expected = generate(made[1], tokens, max_new_tokens=12, temperature=0.0)[0].tolist()
    assert eval(said.stdout.splitlines()[-1]) == [*tokens[0].tolist(), *expected]
