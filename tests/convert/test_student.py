"""Every family with every target: the student is its teacher near by, and one model whole, in pieces and exported."""

import dataclasses

import pytest
import torch

from seqtrain.config import compose_config
from seqtrain.convert.architecture import architecture_of, kept_layers, student_of
from seqtrain.convert.settings import is_liger, read_convert_config, targets
from seqtrain.convert.sources import open_source
from seqtrain.convert.verify import end_checks, start_checks
from seqtrain.convert.weights import export, load_teacher, student_on
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.testing import boundaries, relative_error
from tests.command_cases import refused
from tests.convert.convert_cases import FAMILIES, TINY, some_tokens


def settings(folder, *overrides):
    return read_convert_config(compose_config("convert", [f"source={folder}", "output_dir=unused", *overrides]))


DEFAULTS = settings("unused")


def make_student(folder, config, kept=()):
    """Teacher, student, and what an export wants to know of it."""
    source = open_source(str(folder))
    teacher = architecture_of(source)
    architecture = student_of(teacher, config, kept)
    loaded = load_teacher(source, dtype=getattr(torch, config.dtype))
    return loaded, student_on(loaded, architecture, seed=0), architecture, source


def make_pair(folder, target="gated_delta_net", *, kept=(), dtype="float32", **layer):
    """Teacher and student."""
    fields = dataclasses.replace(DEFAULTS.layer, slots=4, **layer)
    config = dataclasses.replace(DEFAULTS, target=target, layer=fields, dtype=dtype)
    return make_student(folder, config, kept)[:2]


def paired(rows, columns):
    """All pairs in the tier `full`; in `all` every other, and in the quick one each of `columns` with one of `rows`."""
    tiers = (pytest.mark.all, pytest.mark.full)
    return [
        pytest.param(row, column, marks=() if number % len(rows) == index else tiers[(number - index) % 2])
        for index, row in enumerate(rows)
        for number, column in enumerate(columns)
    ]


def failed(found):
    return [check for check in found if not check["passed"]]


@pytest.mark.parametrize(("kind", "target"), paired((*FAMILIES, "phi3"), targets()))
@torch.no_grad()
def test_every_family_becomes_every_target(transformers_on_disk, tmp_path, kind, target):
    """Whole, in steps, padded, packed, and written and read again, it is one model."""
    from transformers import AutoModelForCausalLM

    _, folder = transformers_on_disk(kind)
    kept = () if kind == "llama" else (1,)
    layer = dataclasses.replace(DEFAULTS.layer, window=16, slots=4)
    config = dataclasses.replace(DEFAULTS, target=target, layer=layer)
    teacher, student, architecture, source = make_student(folder, config, kept)
    tokens = some_tokens(1, 40)
    found = start_checks(teacher, student, tokens) + end_checks(student, tokens)
    assert failed(found) == []
    names = " ".join(each["name"] for each in found)
    assert ("the first 16 tokens are the teacher's" in names) == (not is_liger(target))
    assert ("bytes the state grows" in names) == (kept == ())
    assert student.parameter_count() == sum(parameter.numel() for parameter in student.parameters())
    expected = student(tokens, all_logits=True)[0]
    row, documents = torch.cat([some_tokens(1, 9, seed=5), tokens], 1), SequenceContext(boundaries([9, 40]))
    packed = student(row, sequence=documents, all_logits=True)[0]
    assert relative_error(packed[:, 9:], expected) < 1e-5
    export(student, architecture, source, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    # Shorter rows next to it, padded on the left, change nothing.
    rows, mask = torch.zeros(2, 47, dtype=torch.int64), torch.zeros(2, 47, dtype=torch.int64)
    rows[0, 7:], mask[0, 7:] = tokens[0], 1
    rows[1], mask[1] = some_tokens(47, seed=6), 1
    assert relative_error(again(rows, attention_mask=mask).logits[:1, 7:], expected) < 1e-5


LAYOUTS = {
    "pure": (("layer.window=0",), ["linearized_attention"] * 3),
    "alternate": (
        ("layer.arrangement=alternate", "layer.window=9"),
        ["linearized_attention", "streaming_attention", "linearized_attention"],
    ),
    "between layers": (("keep=[0,2]",), ["attention", "linearized_attention", "attention"]),
    "norms": (("layer.combine=norms", "layer.window=9"), ["linearized_attention"] * 3),
    "pure norms": (("layer.combine=norms", "layer.window=0"), ["linearized_attention"] * 3),
}


@pytest.mark.parametrize(("layout", "target"), paired(LAYOUTS, [name for name in targets() if not is_liger(name)]))
def test_every_target_can_be_laid_out_in_every_way(transformers_on_disk, target, layout):
    _, folder = transformers_on_disk("qwen3")
    overrides, layers = LAYOUTS[layout]
    config = settings(folder, f"target={target}", *overrides)
    kept, _ = kept_layers(config.keep, 3, list)
    teacher, student, architecture, _ = make_student(folder, config, kept)
    assert list(architecture.model.layers) == layers
    assert {block.mixer.config.memory for block in student.blocks if hasattr(block.mixer, "memory")} == {target}
    tokens = some_tokens(1, 40)
    assert failed(start_checks(teacher, student, tokens) + end_checks(student, tokens)) == []
    assert student.parameter_count() == sum(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_experts_are_together_the_mlp_they_were(transformers_on_disk, tmp_path, shared):
    """Whatever the router chooses. Written and read again it is the same."""
    from transformers import AutoModelForCausalLM

    _, folder = transformers_on_disk("smollm2")
    overrides = ("upcycle.experts=6", "upcycle.experts_per_token=3", f"upcycle.shared={str(shared).lower()}")
    teacher, student, architecture, source = make_student(folder, settings(folder, *overrides), (0, 1, 2))
    tokens = some_tokens(2, 50)
    assert student.blocks[0].mlp.up.shape[0] == 6
    assert (student.blocks[0].mlp.shared is not None) == shared
    assert student.parameter_count() > 3 * teacher.parameter_count()
    expected = teacher(tokens, all_logits=True)[0]
    for _ in range(2):
        assert relative_error(student(tokens, all_logits=True)[0], expected) < 1e-5
        for block in student.blocks:
            block.mlp.router.weight.normal_(std=3.0)
    export(student, architecture, source, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative_error(again(tokens).logits, expected) < 1e-5


def test_a_tied_gate_has_no_weights(transformers_on_disk):
    _, folder = transformers_on_disk("llama")
    free, tied = (make_pair(folder, "gla", tied_gate=each)[1] for each in (False, True))
    names = {name for name, _ in free.named_parameters()} - {name for name, _ in tied.named_parameters()}
    assert {name.split(".memory.")[1] for name in names} == {"forget.0.weight", "forget.1.weight", "forget.1.bias"}
    written = tied.blocks[0].mixer.memory.write(torch.randn(1, 5, 32), *torch.randn(2, 1, 5, 2, 8))
    torch.testing.assert_close(written["log_decay"].exp(), 1 - written["k"])


@pytest.mark.parametrize(("target", "dtype"), [("gla", "float16"), ("kda", "bfloat16"), ("liger_gsa", "bfloat16")])
def test_half_precision_computes_the_same_in_every_form(transformers_on_disk, target, dtype):
    _, folder = transformers_on_disk("smollm2")
    _, student = make_pair(folder, target, window=8, dtype=dtype)
    tokens = some_tokens(1, 40)
    assert {parameter.dtype for parameter in student.parameters()} == {getattr(torch, dtype)}
    assert failed(end_checks(student, tokens)) == []
    _, exact = make_pair(folder, target, window=8)
    with torch.no_grad():
        error = relative_error(student(tokens, all_logits=True)[0], exact(tokens, all_logits=True)[0])
    assert error < 0.05


def test_own_windows_stay_within_the_teachers(transformers_on_disk):
    """A layer that saw 7 tokens does not get a window of 64."""
    _, folder = transformers_on_disk("mistral-window")
    _, student = make_pair(folder)
    assert student.blocks[0].mixer.config.window == TINY["mistral-window"][1]["sliding_window"] == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target=s5"],
            "Known: delta_net, gated_delta_net, gla, granitemoehybrid, gsa, hgrn2, kda, liger_gla, liger_gsa, ",
        ),
        (["target=gated_deltanet"], "target 'gated_deltanet' is unknown; did you mean 'gated_delta_net'?"),
        (["layer.sinks=0"], "layer.sinks=0: a window that loses the first tokens breaks most models"),
        (["keep=evry:2"], "keep=evry:2: must be none, every:K, budget:N"),
        (["target=gla", "layer.arrangement=alternate", "layer.window=0"], "layer.arrangement=alternate needs a window"),
        (["target=liger_gsa", "layer.arrangement=alternate"], "target=liger_gsa has both parts in one layer"),
        (["target=kda", "layer.tied_gate=true"], "layer.tied_gate=true: only applies to target=gla, not target=kda"),
        (["target=liger_gla", "layer.window=0"], "layer.window=0: target=liger_gla averages a window"),
        (["layer.widow=3"], "did you mean 'layer.window'?"),
        (["dtype=int8"], "dtype=int8: must be"),
        (["upcycle.experts=4", "target=granitemoehybrid"], "target=granitemoehybrid is written with MLPs"),
        (["upcycle.experts=4", "upcycle.experts_per_token=5"], "there are upcycle.experts=4"),
        (["recipe=magic"], "recipe= 'magic' is unknown"),
    ],
)
def test_a_mistake_is_one_line(overrides, message):
    with refused(message):
        settings("somewhere", *overrides)


def test_sinks_may_be_given_up_on_purpose():
    assert settings("somewhere", "layer.sinks=0", "layer.without_sinks=true").layer.sinks == 0
