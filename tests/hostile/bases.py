"""What commands read: text in each form, tokenizers, shards, model folders, GGUF files, runs; each small and whole."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import gguf  # noqa: F401 (what is imported here is not in each child)
import pyarrow.parquet
import torch
from transformers import GPT2TokenizerFast, LlamaConfig, PreTrainedModel, modeling_gguf_pytorch_utils  # noqa: F401

from seqtrain.config import compose_config
from seqtrain.convert.run import _Conversion
from seqtrain.convert.settings import read_convert_config
from seqtrain.data import DataConfig
from seqtrain.models import huggingface  # noqa: F401
from seqtrain.runtime import generate
from seqtrain.runtime.loading import load
from tests.convert.convert_cases import make_transformer, save_tokenizer, write_gguf
from tests.hostile.hostile_cases import Base
from tests.runtime.runtime_cases import small_config, train_on

TEXTS = [f"{number} state scan delta gate key value\n" * (3 + number) for number in range(12)]


running = importlib.import_module("seqtrain.runtime.run")


def starting(config) -> None:
    """Everything until the ranks begin to train, of which the runtime's own tests are."""
    running._follow = lambda *arguments: {}
    running.run(config)


def pretrain(folder: Path, source: str = "text", path: str = "", **others) -> None:
    data = DataConfig(source=source, path=str(folder / (path or "data")), held_out=0.3, cache_dir=str(folder / "cache"))
    config = small_config(folder.parent / "beside")
    config = replace(config, data=replace(data, **others), output_dir=str(folder / "out"))
    starting(replace(config, train=replace(config.train, sequence_length=8)))


def write_texts(folder: Path) -> None:
    (folder / "data").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "data" / f"{number}.txt").write_text(text)


def write_jsonl(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "data").mkdir(exist_ok=True)
        lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(TEXTS)]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))


def write_parquet(folder: Path) -> None:
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": TEXTS, "id": range(12)}), folder / "data/a.parquet", row_group_size=5
    )


def write_dataset(folder: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "data")


def write_tokenizer(folder: Path, old: bool = False) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    write_texts(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    (folder / "tokenizer").mkdir()
    if old:
        tokenizer.model.save(str(folder / "tokenizer"))
    else:
        tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer" if old else "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))


def with_tokenizer(folder: Path) -> None:
    pretrain(folder, tokenizer=str(folder / "tokenizer"))


def write_shards(folder: Path) -> None:
    write_texts(folder)
    pretrain(folder)
    shutil.rmtree(folder / "out")


def write_model(folder: Path, kind: str = "smollm2", **options) -> None:
    make_transformer(kind).save_pretrained(folder / "model", **options)
    save_tokenizer(folder / "model", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")


def convert(folder: Path, source: str = "model") -> None:
    """Everything until training begins."""
    plain = compose_config("convert", ["target=gla", "recipe=none", "verify.tokens=16", "verify.sequences=1"])
    plain = plain.copy()
    plain.update({"source": str(folder / source), "output_dir": str(folder / "out")})
    config = read_convert_config(plain)
    conversion = _Conversion(config, lambda stage, what: None)
    conversion._load(conversion.student, torch.float32)


def write_gguf_file(folder: Path) -> None:
    write_gguf(make_transformer("llama"), folder / "model.gguf")


def write_run(folder: Path) -> None:
    config = small_config(folder)
    train_on(config)


def write_exported(folder: Path) -> None:
    from seqtrain.models import LanguageModel
    from seqtrain.models.export import as_huggingface

    config = small_config(folder.parent / "exported-from")
    model = LanguageModel(config.model, config.mixer, 61)
    as_huggingface(model, config.mixer, eos_token_id=2, pad_token_id=0, max_position_embeddings=32).save_pretrained(
        folder / "model"
    )
    save_tokenizer(folder / "model")


def resume(folder: Path) -> None:
    config = small_config(folder)
    starting(replace(config, train=replace(config.train, steps=6)))


BASES = {
    "text": Base(write_texts, pretrain, culprit=("data.path",)),
    "jsonl": Base(write_jsonl, lambda folder: pretrain(folder, "jsonl"), culprit=("data.path",)),
    "parquet": Base(write_parquet, lambda folder: pretrain(folder, "parquet"), culprit=("data.path",)),
    "dataset": Base(write_dataset, lambda folder: pretrain(folder, "huggingface"), culprit=("/data:", "data.path")),
    "tokenizer": Base(write_tokenizer, with_tokenizer, "tokenizer/*", ("data.tokenizer", "data.end_token")),
    "old tokenizer": Base(
        lambda folder: write_tokenizer(folder, True),
        with_tokenizer,
        "tokenizer/*",
        ("data.tokenizer", "data.end_token"),
    ),
    "shards": Base(write_shards, pretrain, "cache/*/*", ("manifest.json",)),
    "model": Base(write_model, convert, "model/*", ("source=", "verify.texts")),
    "sharded model": Base(
        lambda folder: write_model(folder, "qwen2", max_shard_size="20KB"),
        convert,
        "model/*",
        ("source=", "verify.texts"),
    ),
    "gguf": Base(write_gguf_file, lambda folder: convert(folder, "model.gguf"), "*.gguf", ("source=",)),
    "exported": Base(write_exported, lambda folder: load(folder), "model/*", ("/model",)),
    "run resumed": Base(write_run, resume, "out/**/*", ("output_dir=", "checkpoints")),
    "run read": Base(
        write_run,
        lambda folder: generate.write(generate.GenerateConfig(run=str(folder / "out"), tokens=2)),
        "out/**/*",
        ("run=", "checkpoints"),
    ),
}
