"""Text to shards: stopped at any instant, it resumes at the last finished group and ends in the very same bytes.

The text is divided into sections, each of which becomes groups of shards of its own, one after the other; who makes
them, and how many at once, changes nothing. A group is one training and one held-out shard written together. When both
together are full, they are made durable, and the log names them with the place in the text at which the next group
starts. Anything else in the folder is a leftover.
"""

import hashlib
import io
import json
import logging
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from seqtrain.data.bigram import SHAPE
from seqtrain.data.config import DataConfig
from seqtrain.data.groups import (
    BATCH_BYTES,
    BATCH_PIECES,
    SPLITS,
    Job,
    Report,
    counts_name,
    make_group,
    make_group_alone,
    read_counts,
)
from seqtrain.data.manifest import (
    BIGRAMS,
    INDEX,
    MANIFEST,
    VERSION,
    CorpusManifest,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    told_problems,
    write_index,
)
from seqtrain.data.pool import Pool, Pools
from seqtrain.data.progress import PROGRESS, Group, ProgressLog, SectionState
from seqtrain.data.sections import Section, divide, section_bytes
from seqtrain.data.sources import SOURCES, Source
from seqtrain.data.sources._base import AROUND, PIECE_BYTES, Part
from seqtrain.data.tokenizer import ByteTokenizer, Tokenizer
from seqtrain.data.verification import write_stamps
from seqtrain.errors import DataError
from seqtrain.files import replace_file, sha256_of

log = logging.getLogger("seqtrain.data")

# What content keys say in place of a version, as long as the same text gives the same shards.
LAYOUT = 1
# Documents looked at before any is tokenized.
FIRST_DOCUMENTS = 1000


def open_sources(config: DataConfig) -> list[Source]:
    """The text of `data.path` and, where given, that of `data.held_out_path`."""
    kind = SOURCES.get(config.source)
    if not config.held_out_path:
        return [kind(config, Part("data.path", config.path, config.held_out))]
    train, held_out = Part("data.path", config.path, 0.0), Part("data.held_out_path", config.held_out_path, 1.0)
    return [kind(config, train), kind(config, held_out)]


def left_out(sources: list[Source]) -> str:
    """What is not read of the text, and why, to be added to a sentence; empty where all of it is."""
    return "".join(source.passed_over for source in sources)


def check_first_documents(config: DataConfig, sources: list[Source]) -> None:
    """Raises `DataError` where the first documents can't be read, or are all there are and none is held out."""
    count = 0
    for document in islice(sources[0].documents(), FIRST_DOCUMENTS):
        count += document.size > 0
        if document.held_out:
            return
    if 0 < count < FIRST_DOCUMENTS and config.held_out and not config.held_out_path:
        raise _nothing_held_out(config, count)


def _nothing_held_out(config: DataConfig, documents: int) -> DataError:
    return DataError(
        f"data.held_out={config.held_out}: no document of the {documents} in {config.path or config.source} was held "
        "out; raise it, name a file as data.held_out_path, or set data.held_out=0"
    )


@dataclass(frozen=True)
class Text:
    """What becomes a corpus. `fingerprints`: of the sources, as they were when it was looked at."""

    config: DataConfig
    sources: list[Source]
    tokenizer: Tokenizer
    fingerprints: list[list[tuple[str, int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprints", [source.fingerprint() for source in self.sources])

    @property
    def section_bytes(self) -> int:
        """As `sections.section_bytes`."""
        total = sum(size for each in self.fingerprints for _, size, _ in each)
        return section_bytes(total, self.config.shard_tokens)

    @property
    def key(self) -> str:
        """A hash of all that decides the shards: the text's files (name, size, time), the tokenizer, the settings."""
        divided = {"sections": self.section_bytes} if self.section_bytes else {}
        return self._key(*([divided] if divided else []))

    @property
    def undivided_key(self) -> str:
        """The key of the same text in one piece, as all were once."""
        return self._key()

    def _key(self, *division: dict[str, int]) -> str:
        config = self.config
        settings = [config.source, config.held_out, config.text_field, config.invalid_utf8, config.shard_tokens]
        settings += self.sources[0].settings
        # Bytes are their own tokens wherever text is cut; other corpora were cut without looking around once.
        cut = [] if isinstance(self.tokenizer, ByteTokenizer) else [AROUND]
        batches = [PIECE_BYTES, BATCH_BYTES, BATCH_PIECES]
        parts = [LAYOUT, *batches, self.tokenizer.identity, settings, *cut, *division]
        return hashlib.sha256(json.dumps([parts, self.fingerprints]).encode()).hexdigest()

    def job(self, folder: Path, sections: list[Section], state: SectionState) -> Job:
        """What makes the next group of a section."""
        section = sections[state.section]
        number = f"{state.groups:05d}" if len(sections) == 1 else f"{section.number:05d}-{state.groups:05d}"
        names = {split: f"{split}-{number}.bin" for split in SPLITS}
        own = [_part(source, part, section) for part, source in enumerate(self.sources)]
        return Job(self.config, own, self.tokenizer.identity, folder, section, state, names)


def _part(source: Source, part: int, section: Section) -> Source:
    """Source number `part` with the files of a section only."""
    begin, end = section.begin, section.end
    first = begin.place.file if part == begin.part else 0
    last = end.place.file if part == end.part else len(source.files) - 1
    return source.between(first, last if begin.part <= part <= end.part else first - 1)


def ingest(text: Text, folder: Path, report: Report, pools: Pools) -> None:
    """Makes the corpus in `folder`, or resumes making it. `report` is told the units of text done so far.

    `pools`: the processes that make the groups. The caller holds the folder's lock. Raises `DataError` for text that
    can't be read, and where a split stays empty.
    """
    progress = _resume(folder, text.key)
    sections = divide(text.sources, text.section_bytes, text.tokenizer.ends_token)
    report(progress.units)
    todo = deque(number for number in range(len(sections)) if number not in progress.whole)
    running: dict[Future[Group], int] = {}
    with pools(len(todo)) as pool:
        while todo or running:
            while todo and len(running) < (pool.workers if pool else 1):
                number = todo.popleft()
                state = progress.states.get(number) or SectionState(number, sections[number].begin)
                running[_begun(text, text.job(folder, sections, state), progress, report, pool)] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, group = running.pop(future), future.result()
                progress.append(group)
                (folder / counts_name(number, group.state.groups - 1)).unlink(missing_ok=True)
                report(progress.units)
                if not group.state.whole:
                    todo.appendleft(number)
    _finish(text, folder, progress)


def _begun(text: Text, job: Job, progress: ProgressLog, report: Report, pool: Pool | None) -> "Future[Group]":
    """The group that `job` makes: by a process of the pool, or made here and now."""
    if pool:
        return pool.submit(make_group_alone, job)
    before = progress.units - job.state.units
    made: Future[Group] = Future()
    made.set_result(make_group(job, text.tokenizer, lambda units: report(before + units)))
    return made


def _resume(folder: Path, key: str) -> ProgressLog:
    """What is finished in `folder`, which is created; leftovers of a run that was stopped are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = ProgressLog(folder, key)
    newest: dict[int, int] = {}
    kept = {PROGRESS}
    for group in progress.groups():
        kept |= {shard.file for shard in group.shards.values()}
        newest[group.state.section] = group.state.groups
    kept |= {counts_name(*counted) for counted in newest.items()}
    found = {file.name for file in folder.iterdir()}
    for name in found - kept:
        (folder / name).unlink()
    if missing := sorted(kept - found):
        raise DataError(f"{folder / missing[0]}: missing, though {PROGRESS} names it; delete {folder} and run again")
    if newest:
        log.info("data: resuming %s after %d finished groups of shards", folder.name, sum(newest.values()))
    return progress


def _finish(text: Text, folder: Path, progress: ProgressLog) -> None:
    config, tokenizer = text.config, text.tokenizer
    where = config.path or config.source
    entries, empty = _totals(progress)
    problems = _problems(progress)
    told = left_out(text.sources) + told_problems(problems)
    if not entries["train"].documents:
        raise DataError(f"data.path: no text to train on in {where} ({empty} empty documents{told})")
    if not entries["held_out"].documents and (config.held_out or config.held_out_path):
        raise _nothing_held_out(config, entries["train"].documents)
    if [source.fingerprint() for source in text.sources] != text.fingerprints:
        raise DataError(f"data.path: {where} changed while it was read; run again")
    _sum_counts(folder, progress)
    for split in SPLITS:
        entries[split] = replace(entries[split], index_sha256=_write_index(folder, split, progress))
    manifest = CorpusManifest(
        version=VERSION,
        key=progress.key,
        source=SourceEntry(config.source, sum(map(len, text.fingerprints))),
        tokenizer=TokenizerEntry(Path(config.tokenizer).name, tokenizer.identity, tokenizer.vocab_size, tokenizer.end),
        empty_documents=empty,
        bigrams_sha256=sha256_of(folder / BIGRAMS),
        problems=problems,
        **entries,
    )
    manifest.write(folder / MANIFEST)
    documents = sum(entry.documents for entry in entries.values())
    log.log(
        logging.WARNING if told else logging.INFO,
        "data: read %d documents of %d files, and %d empty ones%s",
        documents,
        manifest.source.files,
        empty,
        told,
    )
    tidy(folder)


def tidy(folder: Path) -> None:
    """Removes the notes that a whole corpus needs no more."""
    for file in folder.glob(counts_name("*", "*")):
        file.unlink(missing_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)


def _totals(progress: ProgressLog) -> tuple[dict[str, SplitEntry], int]:
    """What all sections hold together, by split, and how many empty documents there were."""
    sums = {split: SplitEntry() for split in SPLITS}
    contents: dict[str, dict[int, str]] = {split: {} for split in SPLITS}
    empty = 0
    for group in progress.groups():
        state = group.state
        if not state.whole:
            continue
        empty += state.empty_documents
        for split, entry in zip(SPLITS, (state.train, state.held_out), strict=True):
            sums[split] = _added(sums[split], entry)
            contents[split][state.section] = entry.content
    return {split: replace(sums[split], content=_joined(contents[split])) for split in SPLITS}, empty


def _added(a: SplitEntry, b: SplitEntry) -> SplitEntry:
    return SplitEntry(
        documents=a.documents + b.documents,
        tokens=a.tokens + b.tokens,
        bytes=a.bytes + b.bytes,
        token_bytes=a.token_bytes + b.token_bytes,
        first_bytes=a.first_bytes + b.first_bytes,
    )


def _problems(progress: ProgressLog) -> dict[str, tuple[int, str]]:
    """Those of all documents together, by reason, with the first one's name."""
    found = {group.state.section: group.state.problems for group in progress.groups() if group.state.whole}
    problems: dict[str, tuple[int, str]] = {}
    for number in sorted(found):
        for reason, (count, example) in found[number].items():
            before, first = problems.get(reason, (0, example))
            problems[reason] = (before + count, first)
    return problems


def _joined(contents: dict[int, str]) -> str:
    """The hash of the text of all sections, from theirs."""
    if len(contents) == 1:
        return contents[0]
    digest = hashlib.sha256()
    for number in sorted(contents):
        digest.update(contents[number].encode() + b"\n")
    return digest.hexdigest()


def _write_index(folder: Path, split: str, progress: ProgressLog) -> str:
    """Writes the index of a split, its shards in the order of the text; gives its checksum."""
    count = sum(split in group.shards for group in progress.groups())
    rows, numbers = np.zeros(count, INDEX), np.zeros((count, 5), np.int64)
    for place, group in enumerate(group for group in progress.groups() if split in group.shards):
        state, shard = group.state, group.shards[split]
        rows[place] = (0, 0, shard.file.encode(), shard.sha256.encode())
        numbers[place] = (state.section, state.groups, shard.tokens, shard.starts, group.changed[split])
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    write_stamps(folder, split, numbers[order, 4])
    return write_index(folder, split, numbers[order, 2], numbers[order, 3], rows[order])


def _sum_counts(folder: Path, progress: ProgressLog) -> None:
    """Writes the counts of byte pairs of the whole corpus."""
    counts = np.zeros((2, *SHAPE), np.int64)
    for section, groups in progress.whole.items():
        counts += read_counts(folder / counts_name(section, groups))
    content = io.BytesIO()
    np.save(content, counts, allow_pickle=False)
    replace_file(folder / BIGRAMS, content.getvalue())
