"""How text is divided among the processes that tokenize it: by the text alone, whoever they are and however many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from seqtrain.data.sources import Source
from seqtrain.data.sources._base import Cursor, Ends

# Text in a section, at least.
SECTION_BYTES = 2**23
# Larger corpora have as many sections as this, until one fills a shard; then they have more.
SECTIONS = 128
# Text that a token stands for, about.
TOKEN_BYTES = 4


@dataclass(frozen=True)
class Section:
    """A stretch of the text that becomes shards of its own: from `begin` up to `end`."""

    number: int
    begin: Cursor
    end: Cursor


def section_bytes(total: int, shard_tokens: int) -> int:
    """Bytes of text in a section of a corpus of `total` bytes; 0 where it is in one piece."""
    count = min(total // SECTION_BYTES, max(SECTIONS, total // (TOKEN_BYTES * shard_tokens)))
    return -(-total // count) if count > 1 else 0


def divide(sources: Sequence[Source], size: int, ends: Ends) -> list[Section]:
    """The sections of a text, each of about `size` bytes; one where `size` is 0. `ends`: as in `Document.pieces`."""
    begins = [Cursor(), *(_begins(sources, size, ends) if size else ())]
    return [Section(number, *span) for number, span in enumerate(pairwise([*begins, Cursor(len(sources))]))]


def _begins(sources: Sequence[Source], size: int, ends: Ends) -> Iterator[Cursor]:
    """Where sections begin, but for the first."""
    room = size
    for part, source in enumerate(sources):
        for cursor, length in source.stretches(size, ends):
            # Where it comes nearer to `size` without the next stretch, which may be as long as a section.
            if room < min(size, length / 2):
                yield cursor._replace(part=part)
                room = size
            room -= length
