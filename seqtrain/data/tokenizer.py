"""Text to token ids and back: plain bytes, or a Hugging Face tokenizer from disk."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from seqtrain.data.config import DataConfig
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.files import read_json, read_record


class Tokenizer:
    """What the rest of the project knows of a tokenizer.

    `vocab_size`: ids are below it. `end`: the id that ends every document. `identity`: a hash that changes with the
    mapping from text to ids. `token_bytes`: int64 `[vocab_size]`, bytes of text each id stands for (0 for `end` and
    other marks).
    """

    vocab_size: int
    end: int
    identity: str
    token_bytes: np.ndarray
    # The files' own form in transformers, with its chat template and the names of its special tokens; None for none.
    described: Any = None

    def encode_pieces(self, pieces: Sequence[bytes], before: Sequence[bytes] = ()) -> list[np.ndarray]:
        """The ids of several pieces of UTF-8 text, without any mark added.

        `before`: for each piece, some of the text it continues, which ends where `ends_token` is true; nothing for one
        that starts a document. Pieces then have together the ids of the document as a whole.
        """
        raise NotImplementedError

    def ends_token(self, before: bytes, after: bytes) -> bool:
        """Whether a token ends between two stretches of text, whatever stands further away."""
        raise NotImplementedError

    def encode_marked(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of texts in which marks such as `<|im_end|>` are marks, and the character each begins at."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; marks are left out, and broken characters become U+FFFD."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without any mark added."""
        return self.encode_pieces([text.encode("utf-8")])[0].tolist()

    def as_huggingface(self) -> Any:
        """The same mapping as a fast tokenizer of transformers, whose `eos_token` is `end`."""
        raise NotImplementedError

    def byte_count(self, ids: Any) -> int:
        """How many bytes of text `ids` (array, tensor or list) stand for. Exact where encoding loses nothing."""
        return int(self.token_bytes[np.asarray(ids, dtype=np.int64)].sum())


class ByteTokenizer(Tokenizer):
    """256 bytes and, as id 256, the end of a document."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.end = 256
        self.identity = "bytes-257"
        self.token_bytes = np.ones(257, dtype=np.int64)
        self.token_bytes[self.end] = 0

    def encode_pieces(self, pieces: Sequence[bytes], before: Sequence[bytes] = ()) -> list[np.ndarray]:
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]

    def encode_marked(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        return [(ids, np.cumsum(ids & 0xC0 != 0x80) - 1) for ids in found]

    def ends_token(self, before: bytes, after: bytes) -> bool:
        return True

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")

    def as_huggingface(self) -> Any:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        # Byte-level tokenizers write each byte as one printable character: itself where it is one, else from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
        backend = Backend(models.BPE(vocab=letters | {"<|end|>": self.end}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return _fast(backend, "<|end|>")


class HuggingFaceTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer: a folder or a `tokenizer.json`, read offline, never running code it brings.

    `end_token` names the document end, else the folder's `eos_token` does. Raises `ConfigError` if there is neither.
    """

    def __init__(self, path: str, end_token: str = ""):
        self._path = Path(path).expanduser()
        backend, end = _read(self._path)
        # A tokenizer saved for fine-tuning may cut or pad; and "<|endoftext|>" inside a document is text, not a mark.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.end = _end_id(path, vocabulary, end_token or end, asked=bool(end_token))
        self.vocab_size = max(vocabulary.values()) + 1
        content = backend.to_str() + f"\nend={self.end}"
        self.identity = hashlib.sha256(content.encode("utf-8")).hexdigest()
        self.token_bytes = _token_bytes(backend, vocabulary)
        self.token_bytes[self.end] = 0

    def encode_pieces(self, pieces: Sequence[bytes], before: Sequence[bytes] = ()) -> list[np.ndarray]:
        texts = [piece.decode("utf-8") for piece in pieces]
        if not any(before):
            return self._ids(texts)
        # What a tokenizer does at the start of a text (a space in front, as often as not) it does to `before`.
        heads = [_text(head) for head in before]
        counts = [len(ids) for ids in self._ids(heads)]
        ids = self._ids([head + text for head, text in zip(heads, texts, strict=True)])
        return [each[count:] for each, count in zip(ids, counts, strict=True)]

    def ends_token(self, before: bytes, after: bytes) -> bool:
        head, tail = _text(before), _text(after)
        # In a run of equal letters, where the text begins decides where tokens end: it must not matter.
        heads = [head[skipped:] for skipped in (0, 1, 3)]
        alone, whole = self._ids(heads), self._ids([each + tail for each in heads])
        return all(np.array_equal(a, w[: len(a)]) for a, w in zip(alone, whole, strict=True))

    def encode_marked(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encodings = self._marking.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(each.ids), np.array([first for first, _ in each.offsets])) for each in encodings]

    @cached_property
    def _marking(self) -> Any:
        from tokenizers import Tokenizer as Backend

        # Whether marks are text is no part of what is written.
        return Backend.from_str(self._backend.to_str())

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def as_huggingface(self) -> Any:
        tokenizer = _fast(self._backend, self._backend.id_to_token(self.end))
        if self.described is not None:
            tokenizer.chat_template = self.described.chat_template
        return tokenizer

    @cached_property
    def described(self) -> Any:
        if self._path.suffix == ".gguf":
            return _of_gguf(self._path, self._path.stat().st_mtime_ns)
        from transformers import PreTrainedTokenizerFast

        # Chat templates are in one of several files, or in several.
        with suppress(OSError, ValueError):
            return PreTrainedTokenizerFast.from_pretrained(self._path if self._path.is_dir() else self._path.parent)
        return None


def _text(data: bytes) -> str:
    """A stretch of UTF-8 text that may begin or end within a character."""
    start = next((place for place, byte in enumerate(data) if byte & 0xC0 != 0x80), 0)
    return data[start:].decode("utf-8", errors="replace")


def _fast(backend: Any, end: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, model_input_names=names)


def check_ids(where: str, ids: int, rows: int) -> None:
    """Raises `ConfigError` where a tokenizer's `ids` (one more than the last) don't fit into an embedding's `rows`."""
    if ids > rows:
        raise ConfigError(
            f"{where}: its tokenizer has ids up to {ids - 1}, its embedding {rows} rows; enlarge that with "
            "resize_token_embeddings, or take out tokens that were added"
        )


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer `data.tokenizer` names. Raises `ConfigError` if there is none such on disk, and for a task."""
    from seqtrain.data.synthetic import TASKS

    if config.source in TASKS.names and not config.sources:
        raise ConfigError(f"data.source={config.source}: tokens of a synthetic task stand for no text")
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    return HuggingFaceTokenizer(config.tokenizer, config.end_token)


def _read(path: Path) -> tuple[Any, str]:
    """The `tokenizers.Tokenizer` at `path` and the name of its end-of-sequence token ("" if it has none)."""
    if not path.exists():
        raise ConfigError(
            f'data.tokenizer: {path} does not exist; give "bytes", a folder or a tokenizer.json (nothing is downloaded)'
        )
    if path.suffix == ".gguf":
        return _convert(path, lambda: _of_gguf(path, path.stat().st_mtime_ns))
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    if not file.is_file():
        return _convert(folder, lambda: _transformers(folder))
    from tokenizers import Tokenizer as Backend

    # The library makes room for every id up to the largest.
    try:
        if found := re.search(rb":\s*(\d{9,})\s*[,}]", read_record(file)):
            raise ValueError(f"it has the id {int(found[1][:30])}, as no vocabulary has")
        backend = Backend.from_file(str(file))
    # The library raises bare Exception for a file it can't read.
    except Exception as error:
        raise ConfigError(f"data.tokenizer: {file} is not a Hugging Face tokenizer.json: {error}") from None
    return backend, _eos_token(folder)


def _convert(folder: Path, read: Callable[[], Any]) -> tuple[Any, str]:
    """A tokenizer in an older form (vocabulary and merges, sentencepiece) or a GGUF file, through transformers."""
    try:
        tokenizer = read()
    # Files of any content end in any kind of error.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "tiktoken" in reason:
            # What transformers takes a file for that sentencepiece can't read.
            reason = "its vocabulary is damaged, or neither sentencepiece's nor a BPE's"
        raise ConfigError(
            f"data.tokenizer: {folder} holds no tokenizer.json and can't be converted: {reason}"
        ) from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"data.tokenizer: {folder} has no fast form; save it as tokenizer.json first")
    return backend, tokenizer.eos_token or ""


def _transformers(folder: Path, **options: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


@lru_cache(maxsize=1)
def _of_gguf(path: Path, changed: int) -> Any:
    """The tokenizer of a GGUF file that was `changed` at this time: to read one takes many seconds."""
    return _transformers(path.parent, gguf_file=path.name)


def _eos_token(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.tokenizer: {file} is not JSON: {error}") from None
        token = content.get("eos_token") if isinstance(content, dict) else None
        # Written as a plain string or as an AddedToken.
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return ""


def _end_id(path: str, vocabulary: dict[str, int], end: str, *, asked: bool) -> int:
    if not end:
        raise ConfigError(f"data.tokenizer: {path} names no eos_token; set data.end_token to a token of its vocabulary")
    if end in vocabulary:
        return vocabulary[end]
    if asked:
        marks = [token for token in vocabulary if token[:1] in "<[" and len(token) > 2] or list(vocabulary)[:20]
        raise ConfigError("data.end_token: " + unknown_name("token", end, marks[:20]))
    raise ConfigError(f"data.tokenizer: the eos_token {end!r} of {path} is not in its vocabulary; set data.end_token")


def _token_bytes(backend: Any, vocabulary: dict[str, int]) -> np.ndarray:
    """int64 `[vocab_size]`: bytes of text that each id stands for, read off the way the tokenizer writes its tokens."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    state = json.loads(backend.to_str())
    byte_level = "ByteLevel" in json.dumps([state["pre_tokenizer"], state["decoder"]])
    prefix = state["model"].get("continuing_subword_prefix") or ""
    counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        if token in special:
            continue
        counts[index] = len(token.encode("utf-8")) if token in added else _written_bytes(token, byte_level, prefix)
    return counts


def _written_bytes(token: str, byte_level: bool, prefix: str) -> int:
    # Byte-level vocabularies write one character a byte; sentencepiece writes a byte as <0x0A> and a space as U+2581.
    if byte_level:
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix(prefix).replace("\u2581", " ").encode("utf-8"))
