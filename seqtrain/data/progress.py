"""What is finished of a corpus that is not whole yet: a log that is only ever added to, a line a group of shards."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from seqtrain.data.manifest import REBUILD, SplitEntry
from seqtrain.data.shards import ShardEntry
from seqtrain.data.sources._base import Cursor
from seqtrain.errors import DataError
from seqtrain.files import replace_file

PROGRESS = "progress.log"
# Bytes of a line, at most.
LONGEST = 2**16
NOTHING = SplitEntry()


@dataclass(frozen=True)
class SectionState:
    """Where a section of the text stands after `groups` groups: where it goes on, and everything counted in it so far.

    `problems`: of documents, by reason, how many have it, and the first. `units`: of the sources that are done, for the
    progress bar. `whole`: there is no more of it.
    """

    section: int
    cursor: Cursor
    groups: int = 0
    whole: bool = False
    empty_documents: int = 0
    problems: dict[str, tuple[int, str]] = field(default_factory=dict)
    units: float = 0.0
    train: SplitEntry = NOTHING
    held_out: SplitEntry = NOTHING


@dataclass(frozen=True)
class Group:
    """One group that is durable: the state after it, and its shard of each split that got text.

    `changed`: when each of them was written, in ns: until it changes, who wrote and read it back vouches for it.
    """

    state: SectionState
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


GROUP: TypeAdapter[Group] = TypeAdapter(Group)


class ProgressLog:
    """The log of the corpus of content `key` in `folder`; begun where there is none.

    Raises `DataError` where the log is damaged, or another corpus's.
    """

    def __init__(self, folder: Path, key: str):
        self.file = folder / PROGRESS
        self.key = key
        # Of sections that have been begun and aren't whole; of those that are, how many groups they have.
        self.states: dict[int, SectionState] = {}
        self.whole: dict[int, int] = {}
        # Of all sections together.
        self.units = 0.0
        if not self.file.exists():
            replace_file(self.file, json.dumps(key).encode() + b"\n")
        _drop_torn_line(self.file)
        for group in self.groups():
            self._take(group.state)

    def append(self, group: Group) -> None:
        """Makes it known, durably, that a group is finished: until then nothing has happened."""
        line = json.dumps(asdict(group), separators=(",", ":"))
        with self.file.open("ab") as opened:
            opened.write(line.encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        self._take(group.state)

    def _take(self, state: SectionState) -> None:
        before = self.states.pop(state.section, None)
        self.units += state.units - (before.units if before else 0)
        if state.whole:
            self.whole[state.section] = state.groups
        else:
            self.states[state.section] = state

    def groups(self) -> Iterator[Group]:
        """All groups that are finished, in the order in which they were."""
        with self.file.open("rb") as opened:
            if opened.readline(LONGEST) != json.dumps(self.key).encode() + b"\n":
                raise DataError(f"{self.file}: belongs to another corpus; delete the folder and run again")
            for number in itertools.count(2):
                if not (line := opened.readline(LONGEST)):
                    return
                try:
                    yield GROUP.validate_json(line)
                except ValidationError as error:
                    raise DataError(f"{self.file}:{number}: damaged: {error.errors()[0]['msg']}; {REBUILD}") from None


def _drop_torn_line(file: Path) -> None:
    """Cuts off a line that was being added when the machine stopped."""
    with file.open("r+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        start = opened.seek(max(0, size - LONGEST))
        end = opened.read().rfind(b"\n") + 1
        if start + end < size:
            opened.truncate(start + end)
