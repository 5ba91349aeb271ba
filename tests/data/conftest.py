"""Small texts, and a small real tokenizer, for the tests of the data floor."""

import json
import random

import pytest

WORDS = ["alpha", "beta", "gamma", "delta", "naïve", "東京", "state", "scan", "chunk", "kernel", "mixer", "the", "of"]
WORDS += ["and\n"]


def sentence(seed: int, words: int) -> str:
    """Text that follows from `seed`, with characters of one, two and three bytes and some line ends."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture
def text_folder(tmp_path):
    """20 files in two folders: texts of uneven length, one of them empty."""
    root = tmp_path / "text"
    for number in range(20):
        file = root / ("a" if number % 2 else "b") / f"{number:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(sentence(number, 0 if number == 7 else 40 + 35 * number), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """A byte-level BPE of 318 ids with `<|end|>` as its eos_token, trained here and saved as Hugging Face does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentence(seed, 200) for seed in range(20)], trainer)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small_steps(monkeypatch):
    """Tiny pieces and batches, so that a small text passes through many of them, and documents span shards."""
    from seqtrain.data import groups, ingest
    from seqtrain.data.sources import _base

    monkeypatch.setattr(_base, "PIECE_BYTES", 200)
    monkeypatch.setattr(ingest, "PIECE_BYTES", 200)
    monkeypatch.setattr(groups, "BATCH_BYTES", 700)


@pytest.fixture
def config(text_folder, tmp_path):
    """The small text in shards of about 3,000 tokens."""
    from seqtrain.data import DataConfig

    cache = str(tmp_path / "cache")
    return DataConfig(source="text", path=str(text_folder), held_out=0.15, shard_tokens=3000, cache_dir=cache)


@pytest.fixture
def corpus(config, small_steps):
    """That text, prepared."""
    from seqtrain.data import prepare

    return prepare(config, progress=False)
