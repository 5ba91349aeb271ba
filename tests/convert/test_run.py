"""A conversion from beginning to end: what it writes, that it writes the same again, and what it refuses to touch."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from seqtrain.config import compose_config
from seqtrain.convert import convert, read_convert_config
from seqtrain.errors import ConfigError, SeqtrainError
from tests.command_cases import refused
from tests.convert.convert_cases import COMMON, save_tokenizer, write_gguf

conversion = importlib.import_module("seqtrain.convert.run")
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


# No goal is asked of a conversion without training.
CHOSEN = ("keep=budget:1", "target=gla", "verify.gap_closed=0.9")


@pytest.fixture(scope="module")
def source(transformers_on_disk, tmp_path_factory):
    """A tiny model with a tokenizer of letters, a chat template, and a generation config."""
    folder = tmp_path_factory.mktemp("source") / "qwen2"
    shutil.copytree(transformers_on_disk("qwen2")[1], folder)
    save_tokenizer(folder, chat_template={"default": TEMPLATE, "tools": "TOOLS"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.7}))
    return folder


def settings(folder, place, *overrides):
    small = ("layer.window=8", "verify.tokens=60", "verify.sequences=2", "verify.generate=20", "verify.recall=[8,64]")
    return read_convert_config(
        compose_config("convert", [f"source={folder}", f"output_dir={place}", *small, *overrides])
    )


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    place = tmp_path_factory.mktemp("converted")
    return place, convert(settings(source, place, *CHOSEN))


def test_a_death_beside_ray_is_one_line(source, tmp_path, monkeypatch):
    log = tmp_path / "out" / "training" / "1-kl" / "run.log"

    def work(config) -> int:
        log.parent.mkdir(parents=True)
        log.touch()
        os.write(2, b"of Ray's own\n")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(conversion, "_convert_and_tell", work)
    config = settings(source, tmp_path / "out", "recipe=transfer_then_kl", "runtime=ray")

    def run() -> None:
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os._exit(conversion.start(config))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 1
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"error: the process that runs Ray ended by SIGKILL (what it said: {log})")
    assert said.endswith(f"output_dir={tmp_path / 'out'} goes on from what is saved\n")
    assert log.read_text() == "of Ray's own\n"


def test_the_report_says_what_was_made(converted):
    place, report = converted
    assert report["passed"]
    assert report == json.loads((place / "report.json").read_text())
    assert sorted(report["layers"]) == ["attention", "linearized_attention", "linearized_attention"]
    assert report["layers"] == json.loads((place / "layers.json").read_text())["layers"]
    kept = report["layers"].index("attention")
    assert report["layer_importance"][kept] == max(report["layer_importance"])
    text = (place / "report.md").read_text()
    assert set(report["end"]["texts"]) == {"prose", "code"}
    for found in report["end"]["texts"].values():
        for number in (*found["perplexity"].values(), found["kl_to_teacher"]):
            assert f"{number:.2f}" in text
    for sentence in ("It was not trained", f"Layers {kept} are still softmax attention", "python-prose"):
        assert sentence in text
    answer = report["end"]["answer"]
    assert answer["prompt"] == "The capital of France is"
    assert repr(answer["student"]) in text
    assert [row["tokens_between"] for row in report["end"]["recall"]] == [8, 64]
    assert list(report["layer_scores"]) == ["kl", "recall", "trace"]
    assert list(report["rank_correlations"]) == ["kl, recall", "kl, trace", "recall, trace"]
    assert [row["tokens"] for row in report["cache_bytes_float32"]] == [1024, 8192, 65536]


def test_tokenizer_template_and_generation_config_come_along(converted, source):
    """And the tied head is in the file once."""
    from transformers import AutoModelForCausalLM

    place, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hi"
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="tools") == "TOOLS"
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    assert model.generation_config.eos_token_id == [2, 5]
    assert (model.config.eos_token_id, model.config.bos_token_id) == (2, 1)
    assert model.config.max_position_embeddings == COMMON["max_position_embeddings"]
    with safe_open(place / "model" / "model.safetensors", framework="pt") as file:
        assert "model.head.weight" not in set(file.keys())


def test_the_report_is_a_page_too(converted):
    """One file, with every table and the picture in it."""
    page, markdown = ((converted[0] / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("<h2>") == markdown.count("\n## ") + 1
    assert page.count("<table>") == markdown.count("\n| --- ")
    assert page.count("<img ") == 1
    assert 'src="data:image/png;base64,' in page
    for line in markdown.splitlines():
        if line.startswith("- ") and "`" not in line and "<" not in line:
            assert f"<p>{line[2:]}</p>".replace("'", "&#x27;") in page


def test_a_converted_model_is_chatted_with(converted, capsys):
    """In the tokenizer's template, unless the prompt is to be continued as it is."""
    from seqtrain.runtime import generate

    place, _ = converted
    given = []
    original = generate.continue_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generate,
            "continue_ids",
            lambda model, ids, *rest, **options: (given.append(ids), original(model, ids, *rest, **options))[1],
        )
        for chat in ("auto", "never"):
            words = [f"run={place}", "prompt=hi", "tokens=5", "temperature=0", f"chat={chat}"]
            assert generate.main(words) == 0
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    assert tokenizer.decode(given[0]).replace(" ", "").endswith("hi")
    assert len(given[0]) > len(given[1]) == 2
    answered, continued = capsys.readouterr().out.splitlines()[-2:]
    assert continued.startswith("hi")
    assert answered != continued


@pytest.mark.all
def test_the_same_again_is_the_same_byte_for_byte(converted, source, tmp_path):
    place, _ = converted
    again = convert(dataclasses.replace(settings(source, place, *CHOSEN), output_dir=str(tmp_path)))
    same = (
        "model/model.safetensors",
        "model/config.json",
        "report.json",
        "report.md",
        "report.html",
        "report.png",
        "layers.json",
    )
    for name in same:
        assert (tmp_path / name).read_bytes() == (place / name).read_bytes() != b"", name
    assert json.loads((tmp_path / "report.json").read_text()) == again
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["source"], run["output_dir"]) == (str(source), str(tmp_path))
    assert run["seconds"] > 0


def test_the_report_has_no_paths_and_nothing_is_overwritten(converted, source):
    place, _ = converted
    for name in ("report.json", "report.md", "report.html", "layers.json"):
        text = (place / name).read_text()
        assert str(place) not in text
        assert str(source) not in text
        assert str(source.parent) not in text
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    with pytest.raises(ConfigError, match="holds a model already"):
        convert(settings(source, place))
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


@pytest.mark.all
def test_a_gguf_file_is_converted(transformers_on_disk, tmp_path):
    write_gguf(transformers_on_disk("smollm2")[0], tmp_path / "tiny.gguf", quantization="Q8_0")
    report = convert(settings(tmp_path / "tiny.gguf", tmp_path / "out", "target=liger_gla", "dtype=bfloat16"))
    assert report["passed"]
    assert report["texts"] == {"random": "random tokens"}
    assert "dequantized GGUF Q8_0 file" in (tmp_path / "out" / "report.md").read_text()
    with safe_open(tmp_path / "out" / "model" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16


@pytest.mark.all
@pytest.mark.parametrize("stage", ["save", "check"])
def test_a_failure_leaves_no_half_model(source, tmp_path, monkeypatch, stage):
    """A model that cannot be written is not there; one that fails a check is, and the report says so."""
    if stage == "save":
        from seqtrain.models.huggingface import SeqtrainForCausalLM

        def half(self, folder, **options):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(SeqtrainForCausalLM, "save_pretrained", half)
        with pytest.raises(OSError, match="disk full"):
            convert(settings(source, tmp_path / "out"))
        assert list(tmp_path.iterdir()) == []
    else:
        monkeypatch.setattr("seqtrain.convert.verify._recurrence", lambda student, tokens: 0.5)
        report = convert(settings(source, tmp_path))
        assert not report["passed"]
        assert "FAILED: a prompt in pieces" in (tmp_path / "report.md").read_text()


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def rename_the_architecture(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"qwen2"', '"qwen7"'))


def add_tokens(folder):
    """As many as leave one without an embedding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(COMMON["vocab_size"] + 1 - len(tokenizer))])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (add_tokens, [], "its tokenizer has ids up to 61, its embedding 61 rows; enlarge that with"),
        (add_tokens, ["recipe=transfer_then_kl"], "its tokenizer has ids up to 61, its embedding 61 rows"),
        (drop_a_tensor, [], "lacks model.norm.weight"),
        (cut_the_weights, [], "incomplete or corrupt safetensors file"),
        (rename_the_architecture, [], "architecture 'qwen7' is unknown; did you mean"),
        (None, ["source_sha256=abc"], "but source_sha256=abc"),
        (None, ["keep=[0,1,2]"], "leaves no layer to convert"),
        (None, ["keep=budget:8"], "keep=budget:8: the model has 3 layers"),
        (None, ["keep=nowhere.json"], "nowhere.json: missing; keep takes"),
        (None, ["target=kda", "layer.combine=denominator"], "memory=kda has no normalizer"),
        (None, ["target=granitemoehybrid"], "keep=none: target=granitemoehybrid: leaves no softmax attention"),
        (None, ["gguf=f16"], "gguf=f16: only granitemoehybrid is written as GGUF, not gated_delta_net"),
        (None, ["target=granitemoehybrid", "keep=[0,1,2]", "recipe=transfer_then_kl"], "leaves no layer to train"),
        (None, ["verify.texts.code=nowhere.txt"], "verify.texts.code=nowhere.txt: no such file"),
        (None, ["verify.tokens=10000000"], "verify.tokens=10000000; use fewer, or a longer text"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(source, tmp_path, damage, overrides, message):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    if damage:
        damage(copy)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("of an earlier one")
    with refused(message, SeqtrainError):
        convert(settings(copy, tmp_path / "out", *overrides))
    assert [file.name for file in (tmp_path / "out").rglob("*")] == ["report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "of an earlier one"


@pytest.mark.all
def test_a_choice_of_layers_is_taken_over(converted, source, tmp_path):
    place, report = converted
    again = convert(settings(source, tmp_path, f"keep={place}/layers.json", "target=gla", "verify.generate=0"))
    assert (again["kept"], again["layer_importance"]) == (report["kept"], report["layer_importance"])
    assert again["generation"] == []
    assert again["config"]["keep"] == "layers.json"
