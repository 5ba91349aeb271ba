"""Rows of a run's batches as the model will see them: documents, what is predicted, how full they are, what is odd.

    python tools/inspect_data.py data=text data.path=~/books train.sequence_length=2048
    python tools/inspect_data.py data=jsonl data.path=corpus.jsonl data.tokenizer=path/to/tokenizer inspect.step=500
    python tools/inspect_data.py run=runs/mine inspect.steps=0 inspect.output_dir=outputs/mine

The keys are those of launch/pretrain.py, whose corpus is made if it isn't there. `inspect.output_dir` gets
inspect_data.html (one file: the rows of one step, token by token), inspect_data.json and inspect_data.png; what is
counted (fill, lengths of documents, repeated ones, odd characters) is counted over some steps of the whole run.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from seqtrain import report
from seqtrain.config import split_settings
from seqtrain.data import Batch, SyntheticCorpus, Tokenizer, prepare
from seqtrain.data.batches import IGNORED
from seqtrain.errors import ConfigError
from seqtrain.planning.run_config import read_run
from seqtrain.runtime.settings import PretrainConfig, unit, units

# Bytes of a character may lie in so many tokens.
LONGEST_CHARACTER = 4
STYLE = """<style>
.row { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; word-break: break-word; border: 1px solid #ddd;
  padding: 0.6rem; margin-bottom: 1rem }
.row span { border-right: 1px solid #0002 }
.a { background: #e3eefb } .b { background: #fdf0d9 } .padding { background: #eee; color: #999 }
.unpredicted { color: #999; text-decoration: underline dotted }
</style>
"""
LEGEND = (
    "Two colours take turns from document to document; grey is padding. Tokens that are not predicted (a document's "
    "first, and what the loss leaves out) are grey and dotted. A token's id is shown where the mouse rests."
)


@dataclass(frozen=True)
class Settings:
    # The step whose rows are shown; 0 is the first.
    step: Annotated[int, Field(ge=0)] = 0
    # Rows shown of it; 0: all.
    rows: Annotated[int, Field(ge=0)] = 4
    # Steps, evenly over the run, over which is counted; 0: all of them.
    steps: Annotated[int, Field(ge=0)] = 32
    # Folder for the results.
    output_dir: str = "outputs/inspect_data"


@dataclass(frozen=True)
class Piece:
    """A stretch of a row between two boundaries: a document, a part of one, or padding."""

    ids: np.ndarray
    # Whether each token is predicted by the one in front of it.
    predicted: np.ndarray

    def padding(self, end: int) -> bool:
        return not self.predicted.any() and bool((self.ids == end).all())


@dataclass
class Counts:
    """What is counted over many rows."""

    tokens: int = 0
    predicted: int = 0
    padding: int = 0
    lengths: list[int] = field(default_factory=list)
    pieces_a_row: list[int] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    odd: Counter[str] = field(default_factory=Counter)
    _seen: Counter[bytes] = field(default_factory=Counter)

    def add(self, row: list[Piece], tokenizer: Tokenizer, source: str = "") -> None:
        """Counts one row, of the source of that name."""
        filled = [piece for piece in row if not piece.padding(tokenizer.end)]
        held, whole = (sum(len(piece.ids) for piece in pieces) for pieces in (filled, row))
        self.tokens += whole
        self.padding += whole - held
        self.fills.append(held / whole)
        self.pieces_a_row.append(len(filled))
        self.predicted += sum(int(piece.predicted.sum()) for piece in filled)
        self.sources[source] += whole
        for piece in filled:
            self.lengths.append(len(piece.ids))
            self._seen[hashlib.sha256(piece.ids.tobytes()).digest()] += 1
            self.odd.update(odd_characters(tokenizer.decode(piece.ids)))

    @property
    def repeated(self) -> int:
        """Pieces that are equal to one before them."""
        return len(self.lengths) - len(self._seen)

    def totals(self) -> dict[str, Any]:
        return {
            "rows": len(self.fills),
            "tokens": self.tokens,
            "fill": 1 - self.padding / self.tokens,
            "predicted": self.predicted / self.tokens,
            "pieces": len(self.lengths),
            "repeated_pieces": self.repeated,
            "sources": {name: count / self.tokens for name, count in self.sources.items()},
            "odd_characters": dict(self.odd.most_common()),
        }


def pieces(batch: Batch, length: int) -> Iterator[list[Piece]]:
    """The rows of a whole batch, each as its pieces."""
    ids, counted = batch.tokens[0].numpy(), batch.labels[0].numpy() != IGNORED
    boundaries = batch.cu_seqlens.numpy()
    for first in range(0, len(ids), length):
        # A label says whether the next token is predicted; a row's last one stands for a token outside of it.
        predicted = np.concatenate([[False], counted[first : first + length - 1]])
        inside = boundaries[(boundaries > first) & (boundaries < first + length)] - first
        ends = [0, *inside, length]
        row = ids[first : first + length]
        yield [Piece(row[a:b], predicted[a:b]) for a, b in pairwise(ends)]


def odd_characters(text: str) -> Iterator[str]:
    """Names of characters that seldom belong in a text: broken, control, private, unassigned and invisible ones."""
    for character, count in Counter(text).items():
        kind = unicodedata.category(character)
        if character == "\ufffd" or (kind in ("Cc", "Cf", "Co", "Cn", "Cs") and character not in "\n\r\t"):
            name = unicodedata.name(character, f"U+{ord(character):04X}")
            yield from [name] * count


def spans(piece: Piece, tokenizer: Any, kind: str) -> str:
    """HTML of a piece, a span for each token, or for the tokens that share a character. `tokenizer`: transformers'."""
    found, at = [], 0
    while at < len(piece.ids):
        for count in range(1, LONGEST_CHARACTER + 1):
            text = tokenizer.decode(piece.ids[at : at + count], skip_special_tokens=False)
            if "\ufffd" not in text:
                break
        else:
            count = 1
        shown = escape(text).replace("\n", "↵\n")
        classes = kind if piece.predicted[at] or kind == "padding" else f"{kind} unpredicted"
        numbers = " ".join(map(str, piece.ids[at : at + count]))
        found.append(f'<span class="{classes}" title="{numbers}">{shown}</span>')
        at += count
    return "".join(found)


def show_rows(rows: list[tuple[list[Piece], str]], tokenizer: Tokenizer) -> str:
    """HTML of rows and their sources, token by token."""
    theirs = tokenizer.as_huggingface()
    found = [STYLE, report.text([LEGEND])]
    for number, (row, source) in enumerate(rows):
        kinds = ["padding" if piece.padding(tokenizer.end) else "ab"[index % 2] for index, piece in enumerate(row)]
        body = "".join(spans(piece, theirs, kind) for piece, kind in zip(row, kinds, strict=True))
        found.append(f'<p>row {number}{source and f" of {escape(source)}"}</p>\n<div class="row">{body}</div>\n')
    return "".join(found)


def sentences(found: dict[str, Any], lengths: list[int]) -> list[str]:
    """What was counted, in words."""
    shortest, middle, longest = np.quantile(lengths, [0, 0.5, 1]).astype(int) if lengths else (0, 0, 0)
    told = [
        f"{found['rows']:,} rows of {found['tokens']:,} tokens: filled {found['fill']:.1%}, predicted "
        f"{found['predicted']:.1%}",
        f"{found['pieces']:,} documents or parts of them, of {shortest:,} to {longest:,} tokens (half are shorter than "
        f"{middle:,}); {found['repeated_pieces']:,} equal another",
    ]
    if set(found["sources"]) != {""}:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in found["sources"].items())
        told.append(f"sources: {shares}")
    if odd := found["odd_characters"]:
        some = ", ".join(f"{name} {count:,}" for name, count in list(odd.items())[:6])
        told.append(f"odd characters: {some}{' ...' if len(odd) > 6 else ''}")
    return told


def draw(counts: Counts, title: str, path: Path) -> None:
    """Lengths of the pieces, how many a row holds, and how full rows are."""
    figure = report.new_figure(12, 3.6)
    lengths, number, fill = figure.subplots(1, 3)
    edges = np.unique(np.geomspace(1, max([2, *counts.lengths]), 40).astype(int))
    lengths.hist(counts.lengths, bins=edges, weights=counts.lengths)
    lengths.set(xscale="log", xlabel="tokens of a document, or of its part in a row", ylabel="tokens in all")
    lengths.set_title("Length of what has a state of its own", fontsize=10)
    most = max(counts.pieces_a_row)
    number.hist(counts.pieces_a_row, bins=np.arange(0, most + 2, 1 + most // 40) - 0.5)
    number.set(xlabel="documents or parts a row", ylabel="rows")
    number.set_title("Documents a row", fontsize=10)
    fill.plot(np.arange(len(counts.fills)) / max(len(counts.fills) - 1, 1), np.array(counts.fills) * 100, ".", ms=3)
    fill.set(xlabel="share of the run", ylabel="filled, %", ylim=(0, 104))
    fill.set_title("How full rows are", fontsize=10)
    for axes in (lengths, number, fill):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    report.save_figure(figure, path)


def count(config: PretrainConfig, batches: Any, tokenizer: Tokenizer, steps: int) -> Counts:
    """Counts over so many steps of the run, evenly spaced; 0: over all."""
    counts, whole = Counts(), config.train.steps
    for nth in range(taken := min(steps or whole, whole)):
        for row, source in rows_of_step(config, batches, nth * whole // taken):
            counts.add(row, tokenizer, source)
    return counts


def rows_of_step(config: PretrainConfig, batches: Any, step: int) -> Iterator[tuple[list[Piece], str]]:
    """The rows that a step reads, and the source of each; empty where there is one."""
    for index in units(config.train, step):
        batch = batches.at(index)
        for number, row in enumerate(pieces(batch, config.train.sequence_length)):
            yield row, batches.names[batch.sources[number]] if batch.sources else ""


def main(arguments: list[str]) -> int:
    settings, overrides = split_settings(Settings, "inspect", arguments)
    config = read_run(overrides)
    corpus = prepare(config.data)
    if isinstance(corpus, SyntheticCorpus):
        raise ConfigError(f"data.source={config.data.source}: a task has no text to look at; name data=text or another")
    length = config.train.sequence_length
    batches = corpus.training_batches(seed=config.seed, sequence_length=length, batch_size=unit(config.train))
    with report.announced("counting"):
        counts = count(config, batches, corpus.tokenizer, settings.steps)
    found = counts.totals()
    told = sentences(found, counts.lengths)
    report.say(*told)
    rows = list(rows_of_step(config, batches, settings.step))[: settings.rows or None]
    folder = Path(settings.output_dir)
    report.write_results(folder / "inspect_data.json", settings, totals=found)
    title = f"{config.presets.get('data', 'data')}: rows of {length:,} tokens"
    draw(counts, title, folder / "inspect_data.png")
    drawn = report.picture(folder / "inspect_data.png", title)
    sections = [
        ("All rows", report.text(told) + drawn),
        (f"Step {settings.step}", show_rows(rows, corpus.tokenizer)),
    ]
    report.write_page(folder / "inspect_data.html", title, sections)
    print(f"{folder / 'inspect_data.html'}, inspect_data.json, inspect_data.png")
    return 0
