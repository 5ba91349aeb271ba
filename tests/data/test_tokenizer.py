import functools
import json
import random

import numpy as np
import pytest
import torch

from seqtrain.data import DataConfig, load_tokenizer, prepare
from seqtrain.errors import ConfigError, DataError
from tests.command_cases import refused

TEXT = "naïve 東京 state\n\n  of the <|end|> unseen Ω word"


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_folder):
    return load_tokenizer(DataConfig(tokenizer="bytes" if request.param == "bytes" else str(bpe_folder)))


def test_text_survives_and_its_bytes_are_counted_exactly(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.end]) == TEXT
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.end not in tokenizer.encode("<|end|>"), "the end can't be written in a text"
    assert tokenizer.byte_count(ids) == len(TEXT.encode())
    assert tokenizer.byte_count(torch.tensor([*ids, tokenizer.end])) == len(TEXT.encode())
    assert tokenizer.byte_count([]) == 0


def test_a_folder_and_its_file_are_the_same_tokenizer_and_another_end_another(bpe_folder):
    of_folder, of_file, other = (
        load_tokenizer(DataConfig(tokenizer=str(path), end_token=end))
        for path, end in ((bpe_folder, ""), (bpe_folder / "tokenizer.json", ""), (bpe_folder, "the"))
    )
    assert of_folder.identity == of_file.identity
    assert (of_folder.vocab_size, of_folder.end) == (318, 0)
    assert other.end != of_folder.end
    assert other.identity != of_folder.identity


def test_chat_templates_come_along_and_no_token_types(bpe_folder, tmp_path):
    """What is written for transformers has all templates, and gives models what they take."""
    folder = tmp_path / "templates"
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(bpe_folder))).as_huggingface()
    assert tokenizer.chat_template is None
    assert set(tokenizer("alpha")) == {"input_ids", "attention_mask"}
    tokenizer.chat_template = {"default": "PLAIN", "tools": "TOOLS"}
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(DataConfig(tokenizer=str(folder))).as_huggingface()
    assert again.chat_template == tokenizer.chat_template


def test_cutting_and_padding_of_a_saved_tokenizer_are_switched_off(bpe_folder, tmp_path):
    state = json.loads((bpe_folder / "tokenizer.json").read_text())
    state["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    state["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path), end_token="<|end|>"))
    ids = tokenizer.encode_pieces([b"alpha beta gamma delta state scan", b"a"])
    assert tokenizer.decode(ids[0]) == "alpha beta gamma delta state scan"
    assert len(ids[1]) == 1


@pytest.mark.all
def test_a_transformers_folder_without_tokenizer_json_is_converted(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json and can't be converted"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "state", "scan", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path), end_token="[SEP]"))
    assert tokenizer.encode("state scans") == [5, 6, 7]
    assert tokenizer.end == 3
    # "##s" stands for one byte, and a mark for none.
    np.testing.assert_array_equal(tokenizer.token_bytes, [0, 0, 0, 0, 0, 5, 4, 1])


def test_sentencepiece_spelling_of_bytes_and_spaces(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, "<0xE6>": 2, "<0x9D>": 3, "<0xB1>": 4, "▁": 5, "a": 6, "▁a": 7}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path), end_token="</s>"))
    assert tokenizer.encode("a a東") == [6, 7, 2, 3, 4]
    assert tokenizer.byte_count([6, 7, 2, 3, 4]) == len("a a東".encode())


def test_errors_name_the_key_and_the_way_out(bpe_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*gpt2 does not exist.*nothing is downloaded"):
        load_tokenizer(DataConfig(tokenizer="gpt2"))
    with pytest.raises(ConfigError, match=r"data\.end_token: token '<\|ned\|>' is unknown; did you mean '<\|end\|>'"):
        load_tokenizer(DataConfig(tokenizer=str(bpe_folder), end_token="<|ned|>"))
    (tmp_path / "tokenizer.json").write_text((bpe_folder / "tokenizer.json").read_text())
    with pytest.raises(ConfigError, match=r"names no eos_token; set data\.end_token"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a Hugging Face tokenizer"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    state = (bpe_folder / "tokenizer.json").read_text().replace('"a": ', '"a": 2000000000', 1)
    (tmp_path / "tokenizer.json").write_text(state)
    with pytest.raises(ConfigError, match=r"has the id 2000000000\d*, as no vocabulary has"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("[1, 2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json and can't be converted"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(bytes(range(255)) * 2)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match=r"its vocabulary is damaged, or neither sentencepiece's nor a BPE's"):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path)))


@functools.cache
def made(kind):
    """A tokenizer of each kind that changes what it is given, trained on a little text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind.startswith("sentencepiece")))
    if kind == "sentencepiece, normalized":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "sentencepiece":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes, space in front")
    backend.decoder = decoders.ByteLevel() if kind.startswith("bytes") else decoders.Metaspace()
    marks = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.startswith("bytes") else []
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=marks, initial_alphabet=alphabet, max_token_length=12)
    backend.train_from_iterator([long_text(2000, seed=seed) for seed in range(20)], trainer)
    return backend


def long_text(length, *, seed=0, ends=("\n", "\n\n", "\n\n\n", "\r\n", " ", "  ")):
    draw = random.Random(seed)
    words = ["alpha", "naïve", "東京", "state", "x", "=", "(", ")", "    return", "aaaaaaaa"]
    return "".join(draw.choice(words) + draw.choice(ends) for _ in range(length // 5))[:length]


@pytest.mark.parametrize("kind", ["bytes", "bytes, space in front", "sentencepiece", "sentencepiece, normalized"])
@pytest.mark.parametrize(
    "text",
    [
        long_text(6000),
        long_text(6000, ends=(" ",)),
        long_text(3000, ends=("",)),
        "a" * 2500 + long_text(2000),
        "東" * 2000,
    ],
    ids=["lines", "one line", "no spaces", "a run", "wide"],
)
def test_a_documents_tokens_do_not_depend_on_where_it_is_cut(tmp_path, monkeypatch, kind, text):
    backend = made(kind)
    backend.save(str(tmp_path / "tokenizer.json"))
    for module in ("sources._base", "ingest"):
        monkeypatch.setattr(f"seqtrain.data.{module}.PIECE_BYTES", 500)
        monkeypatch.setattr(f"seqtrain.data.{module}.AROUND", 120)
    (tmp_path / "document.txt").write_text(text, encoding="utf-8", newline="")
    config = DataConfig(
        source="text",
        path=str(tmp_path / "document.txt"),
        held_out=0.0,
        tokenizer=str(tmp_path / "tokenizer.json"),
        end_token="</s>",
        shard_tokens=700,
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = prepare(config, progress=False)
    assert corpus.train.read(0, corpus.train.tokens - 1).tolist() == backend.encode(text, add_special_tokens=False).ids


def test_a_run_too_long_to_be_tokenized_in_one_go_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("seqtrain.data.sources._base.PIECE_BYTES", 500)
    made("bytes").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "document.txt").write_text("words " * 20 + "a" * 9000 + " words")
    same = {"source": "text", "path": str(tmp_path / "document.txt"), "held_out": 0.0, "cache_dir": str(tmp_path / "c")}
    assert prepare(DataConfig(**same), progress=False).train.tokens == 9127
    with refused("document.txt: in 8000 bytes from byte ", DataError):
        prepare(DataConfig(**same, tokenizer=str(tmp_path / "tokenizer.json"), end_token="</s>"), progress=False)
