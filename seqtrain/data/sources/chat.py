"""Conversations: every line of JSON, or row of a table, is one, and becomes one document."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqtrain.data.chat import BadConversation, conversation, load_chat_template, tools_of
from seqtrain.data.config import DataConfig
from seqtrain.data.sources._base import Document, Part, Place, RowDocument, within
from seqtrain.data.sources._columns import outer
from seqtrain.data.sources.jsonl import JsonLines
from seqtrain.data.sources.parquet import Parquet, batches, open_table, row_groups
from seqtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow

# Fields that hold the turns, where `data.text_field` names none.
FIELDS = ("messages", "conversations")
# That of the functions a conversation may call.
TOOLS = "tools"
REWRITTEN = "with turns not learned, for the template writes them otherwise once others follow"


class Chat(JsonLines):
    """`data.path`: a file, a folder (its `*.jsonl` and `*.parquet`) or a pattern; the turns are in `data.text_field`,
    or else in `messages` or `conversations`.

    Conversations are held out by a hash of their text. Those that can't be learned from are empty documents.
    """

    suffix = (*JsonLines.suffix, Parquet.suffix)

    def __init__(self, config: DataConfig, part: Part):
        super().__init__(config, part)
        self.template = load_chat_template(config)

    @property
    def settings(self) -> list[object]:
        template = self.template
        return [template.text, template.with_tools, dict(template.marks), self.config.train_roles]

    def documents_of(self, file: Path, start: Place) -> Iterator[Document]:
        if not _is_table(file):
            yield from super().documents_of(file, start)
            return
        table = open_table(file)
        columns = table.schema_arrow.names
        turns = outer(self._field(columns), columns, str(file))
        wanted = [turns, *(name for name in (TOOLS,) if name in columns and name != turns)]
        # A row's share of the file, as that of a line.
        units = file.stat().st_size / max(table.metadata.num_rows, 1)
        for first, batch in batches(file, table, wanted, start.at):
            for row, entry in enumerate(_rows(batch, f"{file}: row {first} and on"), first):
                if row >= start.at:
                    here, after = start._replace(at=row), start._replace(at=row + 1)
                    yield self.document(f"{file}: row {row}", entry, units, here, after)

    def stretches_of(self, file: Path, start: Place, size: int) -> Iterator[tuple[Place, int]]:
        if not _is_table(file):
            yield from super().stretches_of(file, start, size)
        else:
            yield from row_groups(open_table(file), start, file.stat().st_size)

    def loads(self, line: bytes) -> object:
        return json.loads(line)

    def document(self, name: str, entry: object, units: float, place: Place, next_place: Place) -> Document:
        names = list(entry) if isinstance(entry, dict) else []
        turns = within(entry, self._field(names), f"{name}: the line")
        tools = entry.get(TOOLS) if isinstance(entry, dict) else None
        try:
            found = self.template.learn(conversation(turns), tools_of(tools), self.config.train_roles)
        except BadConversation as error:
            problems = {error.reason: error.came}
            return RowDocument(name, False, 0, units, place, next_place, b"", problems=problems)
        document = self.row(name, found.text, units, place, next_place)
        problems = {REWRITTEN: f"{found.rewritten} turns"} if found.rewritten else {}
        return replace(document, learned=found.learned, problems=problems)

    def _field(self, names: list[str]) -> str:
        if self.config.text_field != DataConfig.text_field:
            return self.config.text_field
        return next((name for name in FIELDS if name in names), FIELDS[0])


def _is_table(file: Path) -> bool:
    return file.name.lower().endswith(Parquet.suffix)


def _rows(batch: "pyarrow.RecordBatch", where: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    return rows
