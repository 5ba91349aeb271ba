"""The audit finds every fault rebuilt here, where it is, and alleges none of the same model without it."""

import pytest
import torch
from transformers import AutoConfig

import seqtrain
from seqtrain.audit import Subject, audit, of_huggingface
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel import SequenceContext
from seqtrain.testing import boundaries
from tests.audit.hybrid import subject
from tests.command_cases import run_command
from tests.models.family_cases import make
from tests.models.transformers_families import FAMILIES, small

# By fault: the check that finds it, and a part of what it names.
FAULTS = {
    "the state runs on": ("documents by position_ids", "layers.0.scan (Scan): the state"),
    "the last layer's state runs on": ("documents by position_ids", "layers.2.scan (Scan): the state"),
    "convolution runs on": ("documents by position_ids", "layers.0.convolution (Convolution): the convolution"),
    "convolution begins anew in a document": (
        "documents by position_ids",
        "layers.0.convolution (Convolution): logits",
    ),
    "attention sees other documents": ("documents by position_ids", "layers.1.outward (Linear): attention"),
    "position_ids are ignored": ("documents by position_ids", "layers.0.convolution (Convolution): the convolution"),
    "a boundary is lost": ("documents by position_ids", "layers.0.convolution (Convolution)"),
    "convolution looks ahead": ("future", "layers.0.convolution (Convolution)"),
    "statistics over the batch": ("batch", "layers.0.scan (Scan)"),
    "padding enters the state": ("left padding", "layers.0.scan (Scan)"),
    "padding enters the convolution": ("left padding", "layers.0.convolution (Convolution)"),
    "decoding forgets a limit": ("cached decoding", "layers.0.scan (Scan)"),
    "convolution keeps too little": ("cached decoding", "layers.0.convolution (Convolution)"),
    "a last chunk is dropped": ("cached decoding", "layers.0"),
    "the scan starts from zero": ("chunked prefill", "layers.0.scan (Scan)"),
    "pieces know of no state": ("gradients of pieces", "the loss is"),
    "states are detached": ("gradients of pieces", "its gradient is off"),
    "gates are rounded": ("gates kept", "layers.0.A_log: rounded to bfloat16 by the cast, and 3 more"),
    "decay in bfloat16": ("gates computed", "layers.0: exp of a gate in bfloat16"),
    "a mean of means": ("loss denominator", "the loss is"),
    "a micro-batch without labels is NaN": ("loss denominator", "the loss is nan"),
    "ignored labels count": ("loss denominator", "the loss is"),
    "moments are lost": ("resume", "from step 4 on"),
    "moments are rounded": ("resume", "after the last step"),
    "the schedule begins again": ("resume", "from step 4 on"),
    "the data begin again": ("resume", "from step 3 on"),
    "recurrent layers are not counted": ("FLOPs", "look at parts the formula leaves out"),
    "a window counts as whole": ("FLOPs", "look at windows"),
}
QUICK = ("the state runs on", "a mean of means")


@pytest.mark.parametrize("fault", [pytest.param(x, marks=() if x in QUICK else pytest.mark.all) for x in FAULTS])
def test_a_fault_is_found_and_where(fault):
    check, words = FAULTS[fault]
    group = "documents" if check.startswith("documents") else "gates" if check.startswith("gates") else check
    # Without an operator of its own, a scan leaves wide bounds.
    report = audit(subject(fault, operator=check == "FLOPs"), [group])
    assert any(str(each).startswith(check) and words in str(each) for each in report.findings), str(report)


@pytest.mark.all
def test_nothing_is_alleged_of_the_sound_twin():
    told = []
    report = audit(subject(), tell=told.append)
    assert not report.findings, str(report)
    assert not report.unchecked, str(report)
    assert not told
    assert "FLOPs" in audit(subject(operator=True), ["FLOPs"]).passed


@pytest.mark.all
def test_a_folder_is_audited(tmp_path):
    """A sound model with its weights; a config of one that leaks, made small."""
    make("qwen3").save_pretrained(tmp_path / "sound")
    done = run_command("audit", f"model={tmp_path / 'sound'}", "checks=[documents,cached decoding,resume]")
    assert done.status == 0, done.out + done.err
    assert "with the folder's weights" in done.out
    assert "0 findings; without any: documents by position_ids, " in done.out
    config = AutoConfig.for_model("mamba2", **FAMILIES["mamba2"] | {"vocab_size": 5000, "hidden_size": 24})
    config.num_hidden_layers = 8
    config.save_pretrained(tmp_path / "config")
    done = run_command("audit", f"model={tmp_path / 'config'}", "checks=[documents]")
    assert done.status == 1
    assert "no weights; num_hidden_layers 8 -> 4, vocab_size 5000 -> 1024" in " ".join(done.out.split())
    assert "3 findings" in done.out
    done = run_command("audit", f"model={tmp_path / 'config' / 'config.json'}", "checks=[documents]", "accelerate=true")
    assert done.status == 0, done.out + done.err


def test_what_a_function_lacks_is_not_checked():
    report = audit(Subject(forward=lambda tokens: torch.eye(9)[tokens], vocabulary=9))
    assert report.passed == ["future", "batch"]
    assert report.unchecked["left padding"] == "no such function (padded=)"
    assert not report.findings


@pytest.mark.all
def test_a_model_of_ours_keeps_all_of_it():
    """Also its FLOPs, as its mixers and operators declare them."""
    torch.manual_seed(0)
    layers = ("gated_delta_net", "sliding_attention", "mamba2")
    model = LanguageModel(ModelConfig(layers=layers, depth=3, width=32, heads=2), {}, 41)

    def forward(tokens, state=None, **options):
        return model(tokens, state=state, all_logits=True, **options)

    def packed(tokens, lengths):
        return forward(tokens, sequence=SequenceContext(cu_seqlens=boundaries(lengths)))[0]

    calls = {"forward": lambda tokens: forward(tokens)[0], "step": forward, "packed": {"cu_seqlens": packed}}
    report = audit(Subject(**calls, vocabulary=41, module=model, flops=model.flops))
    assert not report.findings, str(report)
    assert set(report.unchecked) == {"left padding", "gates", "loss denominator", "resume"}


POSITIONS, SEQ_IDX = "documents by position_ids", "documents by seq_idx"
FORMS = {POSITIONS, SEQ_IDX, "documents by cu_seq_lens"}
PREFILL, PADDING = {"chunked prefill"}, {"left padding"}
KEPT, GATES = {"gates kept"}, {"gates kept", "gates computed"}
# What is found of each family as transformers ships it; docs/howto/audit.md has it as a table.
SHIPPED = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), {POSITIONS} | KEPT),
    "kimi_linear": FORMS - {SEQ_IDX} | KEPT,
    "bailing_hybrid": FORMS - {SEQ_IDX},
    "mamba": FORMS | GATES | PREFILL | PADDING,
    "falcon_mamba": FORMS | GATES | PREFILL,
    "jamba": FORMS | GATES | PREFILL,
    "mamba2": FORMS | GATES,
    **dict.fromkeys(("bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2"), FORMS - {SEQ_IDX} | GATES),
    "lfm2": FORMS - {SEQ_IDX},
    "recurrent_gemma": FORMS | GATES | PREFILL | PADDING,
    "minimax": FORMS,
    "xlstm": FORMS | PADDING,
}


@pytest.mark.full
@pytest.mark.parametrize("family", SHIPPED)
def test_families_as_transformers_ships_them(family):
    """Under our operators none leaks documents; the rest stays as it is."""
    # xLSTM's cache has queries' width rounded up to 64.
    options = {"hidden_size": 128, "num_heads": 2} if family == "xlstm" else {}
    model = small(family, **options)
    report = audit(of_huggingface(model))
    assert {each.check for each in report.findings} == SHIPPED[family], str(report)
    with seqtrain.accelerate_hf(model) as done:
        report = audit(of_huggingface(model))
    expected = SHIPPED[family] - FORMS if done.replaced else SHIPPED[family]
    assert {each.check for each in report.findings} == expected, str(report)
