import json

import numpy as np
import pytest
import torch

from seqtrain.data import DataConfig, load_tokenizer
from seqtrain.errors import ConfigError

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
