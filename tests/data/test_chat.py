"""Chat templates of three formats, written after their documentation, against masks made by hand."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from seqtrain.data import DataConfig, load_tokenizer, prepare
from seqtrain.data.chat import CHATML, BadConversation, conversation, load_chat_template, tools_of
from seqtrain.errors import ConfigError, DataError
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.parallel.sequence import SequenceContext

# https://llama.meta.com/docs/model-cards-and-prompt-formats/meta-llama-3
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# https://ai.google.dev/gemma/docs/core/prompt-structure
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA}
TALK = [("user", "the state"), ("assistant", "alpha\nbeta"), ("user", " of 東京 "), ("assistant", "naïve")]
# The parts of the text, in turn without loss and with it.
BY_HAND = {
    "chatml": [
        "<|im_start|>user\nthe state<|im_end|>\n<|im_start|>assistant\n", "alpha\nbeta<|im_end|>\n",
        "<|im_start|>user\n of 東京 <|im_end|>\n<|im_start|>assistant\n", "naïve<|im_end|>\n",
    ],
    "llama3": [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe state<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "alpha\nbeta<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nof 東京<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "naïve<|eot_id|>",
    ],
    "gemma": [
        "<bos><start_of_turn>user\nthe state<end_of_turn>\n<start_of_turn>model\n", "alpha\nbeta<end_of_turn>\n",
        "<start_of_turn>user\nof 東京<end_of_turn>\n<start_of_turn>model\n", "naïve<end_of_turn>\n",
    ],
}  # fmt: skip


def turns(*talk):
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(params=list(TEMPLATES))
def named(request, bpe_folder, tmp_path):
    """A format's name, and a folder with a tokenizer that has its marks and its template, as transformers saves one."""
    from transformers import PreTrainedTokenizerFast

    marks = MARKS[request.param]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_folder / "tokenizer.json"), bos_token=marks[0], eos_token=marks[-1]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:-1]})
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    return request.param, tmp_path


@pytest.mark.all
def test_masks_of_three_formats_are_those_made_by_hand(named):
    name, folder = named
    config = DataConfig(tokenizer=str(folder))
    talk = turns(*TALK)
    rendered = load_chat_template(config).learn(talk, [], config.train_roles)
    parts = BY_HAND[name]
    assert rendered.text == "".join(parts)
    assert [rendered.text[start:stop] for start, stop in rendered.learned] == parts[1::2]
    assert rendered.rewritten == 0
    tokenizer = load_tokenizer(config)
    [(ids, begins)] = tokenizer.encode_marked([rendered.text])
    assert ids.tolist() == tokenizer.described.apply_chat_template(talk, return_dict=False)
    whole, ends = [], []
    for part in parts:
        whole += tokenizer.encode_marked([part])[0][0].tolist()
        ends.append(len(whole))
    assert ids.tolist() == whole
    learned = [any(start <= place < stop for start, stop in rendered.learned) for place in begins]
    assert np.flatnonzero(np.diff([False, *learned, False])).tolist() == ends


@pytest.mark.all
def test_bytes_have_chatml_where_it_is_asked_for():
    config = DataConfig(chat_template="chatml")
    rendered = load_chat_template(config).learn(turns(*TALK), [], ["user"])
    [(ids, begins)] = load_tokenizer(config).encode_marked([rendered.text])
    assert bytes(ids.tolist()).decode() == rendered.text == "".join(BY_HAND["chatml"])
    assert [rendered.text[place] for place in begins if rendered.text[place] == "東"] == ["東"] * 3
    # The first turn follows on nothing; a later question begins where the answer ends.
    assert [rendered.text[slice(*span)] for span in rendered.learned] == ["<|im_start|>user\n of 東京 <|im_end|>\n"]


@pytest.mark.all
@pytest.mark.parametrize(
    ("template", "learned", "rewritten"),
    [
        # Thoughts are only kept in the last answer: the others are not what a model will have written.
        ("{% if m.role == 'assistant' and loop.last %}(hm){% endif %}{{ m.content }}", ["(hm)naïve;"], 1),
        # What asks for an answer begins a thought, which answers don't have.
        ("{{ m.content }}", ["alpha\nbeta;", "naïve;"], 0),
    ],
)
def test_templates_that_write_turns_otherwise_in_other_places(template, learned, rewritten):
    text = f"{{% for m in messages %}}{{{{ m.role }}}}:{template};{{% endfor %}}"
    prompt = "{% if add_generation_prompt %}assistant:" + ("<think>" if not rewritten else "") + "{% endif %}"
    chat = replace(load_chat_template(DataConfig(chat_template="chatml")), text=text + prompt)
    rendered = chat.learn(turns(*TALK), [], ["assistant"])
    assert [rendered.text[slice(*span)] for span in rendered.learned] == learned
    assert rendered.rewritten == rewritten


def test_usual_spellings_are_the_same_conversation():
    plain = turns(("system", "S"), ("user", "Q"), ("assistant", "A"))
    assert conversation(plain) == plain
    assert conversation(json.dumps(plain)) == plain
    shares = [("system", "S"), ("human", "Q"), ("gpt", "A")]
    assert conversation([{"from": role, "value": text, "role": None} for role, text in shares]) == plain
    assert conversation([{"role": "user", "content": [{"type": "text", "text": "Q"}]}]) == plain[1:2]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    [turn] = conversation([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert turn["content"] == ""
    assert turn["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert tools_of('[{"name": "f"}]') == tools_of([{"name": "f"}]) == [{"name": "f"}]
    assert tools_of(None) == []


@pytest.mark.all
@pytest.mark.parametrize(
    ("came", "reason"),
    [
        (None, "without turns"),
        ([], "without turns"),
        (["Q"], "with a turn that is no object (str)"),
        (turns(("narrator", "Q")), "with an unknown role (narrator)"),
        ([{"content": "Q"}], "with an unknown role (None)"),
        (turns(("user", "Q"), ("assistant", " \n")), "with an empty turn (assistant)"),
        ([{"role": "user", "content": 7}], "with a turn that is no text (int)"),
        (turns(("user", "Q")), "without a turn of assistant after the first"),
        (turns(("user", "Q"), ("user", "Q"), ("assistant", "A")), "that the template refuses (Roles must alternate)"),
    ],
)
def test_bad_conversations_are_named(came, reason):
    chat = replace(load_chat_template(DataConfig(chat_template="chatml")), text=GEMMA)
    with pytest.raises(BadConversation) as caught:
        chat.learn(conversation(came), [], ["assistant"])
    assert str(caught.value) == reason


@pytest.mark.all
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.source=chat: data.tokenizer=bytes has no chat template; set data.chat_template=chatml"),
        ({"chat_template": "chatmi"}, "data.chat_template=chatmi: neither chatml nor a template's file"),
        ({"chat_template": "bad.jinja"}, "data.chat_template: that of .*bad.jinja has a mistake in line 2"),
    ],
)
def test_a_template_that_is_missing_or_wrong_is_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jinja").write_text("{{ bos_token }}\n{% for m in messages %}{{ m.content ")
    with pytest.raises(ConfigError, match=message):
        load_chat_template(DataConfig(**options))


def write_conversations(folder, kind):
    """Ten conversations that can be learned from, with tools and parts, and four that can't."""
    good = [turns(("user", f"the {number}"), ("assistant", f"alpha {number}\n" * (number + 1))) for number in range(10)]
    bad = [[], turns(("narrator", "Q")), turns(("user", "Q")), turns(("user", ""), ("assistant", "A"))]
    rows = [{"id": place, "messages": talk} for place, talk in enumerate([*good[:5], *bad, *good[5:]])]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "talk.parquet", row_group_size=4)
    else:
        (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return good


@pytest.mark.all
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_loss_is_on_assistants_tokens_only(named, tmp_path_factory, caplog, kind):
    caplog.set_level("INFO", logger="seqtrain.data")
    folder, tokenizer = tmp_path_factory.mktemp("chat"), named[1]
    good = write_conversations(folder, kind)
    config = DataConfig(
        source="chat", path=str(folder), tokenizer=str(tokenizer), packing="best_fit", held_out=0.0,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    corpus = prepare(config, progress=False)
    reasons = {reason: count for reason, (count, _) in corpus.manifest.problems.items()}
    assert reasons == {
        "without turns": 1, "with an unknown role": 1, "with an empty turn": 1,
        "without a turn of assistant after the first": 1,
    }  # fmt: skip
    assert re.search(r"1 with an unknown role \(as .*talk\.(jsonl:7|parquet: row 6) \(narrator\)\)", caplog.text)
    described, expected = corpus.tokenizer.described, []
    for question, answer in good:
        prompt = described.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
        expected.append(described.apply_chat_template([question, answer], return_dict=False)[len(prompt) :])
    batches = corpus.training_batches(seed=0, sequence_length=128, batch_size=1)
    answers = []
    for row in range(batches.packing.rows(0)):
        batch = batches.at(row)
        for start, stop in pairwise(batch.cu_seqlens.tolist()):
            labels = batch.labels[0, start:stop].tolist()
            answers.append([label for label in labels if label != -100])
    assert sorted(filter(None, answers)) == sorted(expected)
    assert corpus.train.bytes == corpus.manifest.train.token_bytes


@pytest.mark.all
def test_an_answer_without_a_mark_of_its_own_ends_with_the_document(tmp_path):
    write_conversations(tmp_path, "jsonl")
    config = DataConfig(
        source="chat", path=str(tmp_path), chat_template="chatml", held_out=0.0, cache_dir=str(tmp_path / "cache")
    )
    stream = prepare(config, progress=False).train
    ids, counted = stream.read(0, stream.tokens), stream.counted(0, stream.tokens)
    starts = [*stream.starts(0, stream.tokens).tolist(), stream.tokens]
    for number, (start, stop) in enumerate(pairwise(starts)):
        said = bytes(ids[start:stop][counted[start:stop]][:-1].tolist()).decode()
        assert said == f"alpha {number}\n" * (number + 1) + "<|im_end|>\n"
        assert counted[stop - 1]
        assert ids[stop - 1] == 256
    # Anywhere, and across the shards' pieces, the same.
    assert (np.concatenate([stream.counted(at, at + 1) for at in range(200)]) == counted[:200]).all()


@pytest.mark.all
def test_a_corpus_without_a_conversation_says_why(tmp_path):
    (tmp_path / "talk.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "Q"}]}))
    config = DataConfig(source="chat", path=str(tmp_path), chat_template="chatml", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"no text to train on .* 1 without a turn of assistant after the first \(as "):
        prepare(config, progress=False)
    (tmp_path / "talk.jsonl").write_text(json.dumps({"text": "Q"}))
    with pytest.raises(DataError, match=r"no field 'messages', the line holds fields \['text'\]; set data.text_field"):
        prepare(config, progress=False)


@pytest.mark.all
@torch.no_grad()
def test_packing_changes_no_logit(tmp_path):
    """Conversations packed into rows with padding have the logits, and the loss, that each has alone."""
    write_conversations(tmp_path, "jsonl")
    cache = str(tmp_path / "cache")
    config = DataConfig(source="chat", path=str(tmp_path), chat_template="chatml", packing="best_fit", cache_dir=cache)
    corpus = prepare(replace(config, held_out=0.0), progress=False)
    batch = corpus.training_batches(seed=0, sequence_length=300, batch_size=2).at(0)
    torch.manual_seed(0)
    names = ("gated_delta_net", "attention")
    shape = ModelConfig(layers=names, depth=2, width=16, heads=2)
    model = LanguageModel(shape, {name: MIXERS.get(name).Config() for name in names}, corpus.vocab_size)
    logits, _ = model(batch.tokens, sequence=SequenceContext(batch.cu_seqlens), all_logits=True)
    total = 0.0
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        alone, _ = model(batch.tokens[:, start:stop], all_logits=True)
        torch.testing.assert_close(logits[:, start:stop], alone, rtol=1e-4, atol=1e-5)
        total += float(model(batch.tokens[:, start:stop], batch.labels[:, start:stop]))
    assert len(batch.cu_seqlens) > 4
    loss = model(batch.tokens, batch.labels, sequence=SequenceContext(batch.cu_seqlens))
    assert float(loss) == pytest.approx(total, rel=1e-5)
