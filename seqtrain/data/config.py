"""What text a run trains on and how it becomes tokens."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from seqtrain.validation import AUTO, FilePath, OrAuto

# Keys that decide nothing of what a run reads.
WITHOUT_EFFECT = ("cache_dir", "verify", "shard_tokens", "workers")


@dataclass(frozen=True)
class DataConfig:
    """Text or a task; each file in `conf/data/` is a choice."""

    # Where text comes from: stdlib, text, jsonl, parquet, huggingface or chat (a file in seqtrain/data/sources/); or
    # tokens, read in place: megatron or datatrove; or a synthetic task (a file in seqtrain/data/synthetic/), which is
    # drawn as it is needed and has no use for the keys of text and shards.
    source: str = "stdlib"
    # A mixture, in place of `source` and `path`: each {KIND: PATH, weight: 0.7, name: NAME}, or {TASK: {KEY: VALUE}},
    # with held_out, held_out_path, held_out_rows, text_field, invalid_utf8, train_roles, chat_template, packing and
    # documents_per_row of their own where they differ. Weights are shares of the rows, relative to each other;
    # [[0, 0.7], [1000, 0.3]] goes from one at a step to another at a step, straight between them.
    sources: tuple[dict[str, Any], ...] = ()
    # Lengths of sequences by step: [[0, 512], [2000, 1024]] cuts rows into sequences of 512 tokens, from step 2000 on
    # of 1024. They divide train.sequence_length, the length of rows. Empty: a sequence is a row.
    lengths: tuple[tuple[int, int], ...] = ()
    # Fields of the synthetic task's own `Config`; those left out have its defaults.
    task: dict[str, Any] = field(default_factory=dict)
    # Share of the tokens of text that are asked for, most behind a mask, in place of each next one: what encoders are
    # trained on (model.kind=encoder; BERT has 0.15). 0: the next token.
    masked: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    # Rows a synthetic task is scored on.
    held_out_rows: Annotated[int, Field(gt=0)] = 256
    # A file, a folder or a glob pattern (huggingface: a folder that `save_to_disk` wrote). stdlib needs none.
    path: FilePath = ""
    # Share of the text that is held out for evaluation, by whole documents. 0 holds out nothing.
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    # Text of its own for evaluation, in the same form as `path`; `held_out` then has no effect. Empty: a share of
    # `path`.
    held_out_path: FilePath = ""
    # Chat: roles whose turns are learned; on all else there is no loss.
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    # Chat: how turns become text. Empty: the tokenizer's own template; chatml, or a file with a template in Jinja.
    chat_template: FilePath = ""
    # Name of the field or column that holds the text (jsonl, parquet, huggingface), or the way to it: `a.b.0.c`.
    text_field: str = "text"
    # Bytes that are not UTF-8: stop with an error, or put U+FFFD in their place.
    invalid_utf8: Literal["error", "replace"] = "error"
    # "bytes", or a Hugging Face tokenizer on disk: a folder or a tokenizer.json.
    tokenizer: FilePath = "bytes"
    # The token that ends every document, from the tokenizer's vocabulary. Empty: the tokenizer's own eos_token.
    end_token: str = ""
    # Where token shards are kept between runs. Empty: the user's cache folder.
    cache_dir: FilePath = ""
    # Processes that turn text into tokens; the result is the same however many. auto: the machine's cores.
    workers: Annotated[int, Field(gt=0, le=4096), OrAuto] = AUTO
    # Tokens per shard; an interrupted ingestion resumes after the last finished shard.
    shard_tokens: Annotated[int, Field(gt=0)] = 2**25
    # When shards are read whole to compare checksums: where they changed since that was last done, always, or never. Of
    # more than 1 GiB the ranks do it while they train.
    verify: Literal["first", "always", "never"] = "first"
    # How documents become rows: stream, one after the other, cut where a row ends; best_fit, whole, each in the fullest
    # row that has room for it; document, one a row. A document longer than a row is cut, what is left of rows padded.
    packing: Literal["stream", "best_fit", "document"] = "stream"
    # Documents in a row of best_fit, at most; 0 for any number.
    documents_per_row: Annotated[int, Field(ge=0)] = 0
    # Rows that follow on each other as one: a document longer than a row goes on in the next with its state, one longer
    # than all of them is cut. 1: rows stand alone. train.micro_batch_size must be a multiple of it.
    carry_rows: Annotated[int, Field(gt=0)] = 1
    # True: a document's start clears the state of every layer. False: only the start of a row does.
    reset_at_documents: bool = True
