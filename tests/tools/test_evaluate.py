"""lm-evaluation-harness on an exported model: the likelihoods it finds are the model's own."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqtrain
from seqtrain.mixers import MIXERS
from seqtrain.models import ModelConfig
from seqtrain.models.huggingface import SeqtrainForCausalLM
from seqtrain.models.huggingface_config import SeqtrainConfig
from tests.convert.convert_cases import COMMON, save_tokenizer
from tests.runtime.runtime_cases import small_config, train_on

pytestmark = pytest.mark.all
TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
DOCS = [
    {"text": "abcabcab", "choices": ["c", "a", "bc"], "answer": 0},
    {"text": "the window is short, the memory is long:", "choices": ["yes", "no"], "answer": 1},
    {"text": "x", "choices": ["y", "zz"], "answer": 0},
]


def export(folder):
    torch.manual_seed(0)
    mixer = MIXERS.get("linearized_attention").Config(memory="gla", window=4, sinks=2, memory_weight=0.5)
    model = ModelConfig(layers=("linearized_attention",), depth=2, width=32, heads=4, initializer_range=0.3)
    config = SeqtrainConfig.of(
        model, {"linearized_attention": mixer}, COMMON["vocab_size"], pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    exported = SeqtrainForCausalLM(config).eval()
    exported.save_pretrained(folder)
    save_tokenizer(folder)
    return exported


def evaluate(*arguments, **environment):
    options = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 280, "check": False}
    return subprocess.run([sys.executable, str(TOOL), *arguments], **options)


@torch.no_grad()
def test_the_harness_finds_the_models_own_likelihoods(tmp_path):
    pytest.importorskip("lm_eval")
    from transformers import AutoTokenizer

    model = export(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.jsonl").write_text("\n".join(json.dumps(doc) for doc in DOCS))
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK.format(data=tmp_path / "tasks" / "letters.jsonl"))
    result = evaluate(
        *("--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--device", "cpu"),
        *("--include_path", str(tmp_path / "tasks"), "--tasks", "letters", "--batch_size", "4"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
        HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    found = {row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    right = 0
    for number, doc in enumerate(DOCS):
        likelihoods = []
        for choice in doc["choices"]:
            tokens = torch.tensor([tokenizer(doc["text"] + choice, add_special_tokens=False)["input_ids"]])
            log_p = model(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[0, :, 0]
            likelihoods.append(float(log_p[-len(choice) :].sum()))
        came = [float(response[0]) for response in found[number]["filtered_resps"]]
        assert came == pytest.approx(likelihoods, abs=1e-4)
        right += likelihoods.index(max(likelihoods)) == doc["answer"]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["letters"]["acc,none"] == pytest.approx(right / len(DOCS))


def test_a_run_is_exported_in_place_of_its_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    prepare = runpy.run_path(str(TOOL))["prepare"]
    config = small_config(tmp_path, train={"steps": 1})
    train_on(config)
    ours, exported, tokens = seqtrain.load(config.output_dir).model, tmp_path / "exported", torch.arange(20)[None]
    words = ["evaluate.py", f"run={config.output_dir}", "--tasks", "letters"]
    assert prepare(words, exported) == 0
    assert words == ["evaluate.py", "--model", "hf", "--model_args", f"pretrained={exported}", "--tasks", "letters"]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported)(tokens).logits
        assert torch.allclose(theirs, ours(tokens, all_logits=True)[0], atol=1e-5)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "model").symlink_to(exported)
    for folder, becomes in (("exported", "exported"), ("converted", "converted/model"), ("out", "again")):
        words = ["--model_args", f"pretrained={tmp_path / folder},dtype=float32"]
        assert prepare(words, tmp_path / "again") == 0
        assert words == ["--model_args", f"pretrained={tmp_path / becomes},dtype=float32"]
    assert prepare([f"pretrained={config.output_dir}"], exported) == 2, "what is there is not written over"


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('no such thing')")
    result = evaluate("--tasks", "letters", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == "lm-eval can't be imported (no such thing): pip install 'seqtrain[eval]'\n"


def test_help_needs_no_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code == 0
    assert "pip install 'seqtrain[eval]'" in capsys.readouterr().out
