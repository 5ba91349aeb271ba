"""The two small files of a corpus folder: `manifest.json` once it is whole, `progress.json` until then."""

from dataclasses import dataclass, field
from pathlib import Path

from seqtrain.errors import DataError
from seqtrain.files import Manifest

VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
REBUILD = "delete the folder to rebuild the corpus"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file's name inside the folder, how many tokens and document starts it holds, its checksum."""

    file: str
    tokens: int
    starts: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """One side of the corpus.

    `bytes`: of its text. `token_bytes`: the same counted from its tokens, which differs where a tokenizer normalises.
    `first_bytes`: those of the first token of every document, which nothing predicts.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    token_bytes: int = 0
    first_bytes: int = 0
    shards: list[ShardEntry] = field(default_factory=list)


@dataclass(frozen=True)
class SourceEntry:
    """Which source the text came from, and from how many files."""

    name: str
    files: int


@dataclass(frozen=True)
class TokenizerEntry:
    """Which tokenizer made the ids."""

    name: str
    identity: str
    vocab_size: int
    end: int


@dataclass(frozen=True)
class CorpusManifest(Manifest):
    """What a whole corpus says of itself. `bigrams_sha256`: checksum of the byte-bigram counts next to it."""

    remedy = REBUILD

    version: int
    key: str
    source: SourceEntry
    tokenizer: TokenizerEntry
    empty_documents: int
    train: SplitEntry
    held_out: SplitEntry
    bigrams_sha256: str


@dataclass(frozen=True)
class Cursor:
    """Where ingesting resumes: `offset` bytes into `document` of `part` (0 `data.path`, 1 `data.held_out_path`).

    `previous`: the byte before, or -1 at a document's start.
    """

    part: int = 0
    document: int = 0
    offset: int = 0
    previous: int = -1


@dataclass(frozen=True)
class IngestProgress(Manifest):
    """What is finished of a corpus that is not whole yet: `groups` of shards, and everything counted so far."""

    remedy = REBUILD

    key: str
    groups: int = 0
    cursor: Cursor = Cursor()
    empty_documents: int = 0
    # Units of the sources that are done, for the progress bar.
    units: float = 0.0
    train: SplitEntry = SplitEntry()
    held_out: SplitEntry = SplitEntry()


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `DataError` for a name that leads anywhere else, also by way of a link."""
    file = folder / name
    plain = Path(name).name == name and name not in ("", ".", "..")
    if not plain or file.is_symlink():
        raise DataError(
            f"{folder / MANIFEST}: names the file {name!r}; shards must be plain files of that folder itself"
        )
    return file
