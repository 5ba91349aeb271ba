import json
import re

import numpy as np
import pytest

from seqtrain.data import DataConfig, prepare
from seqtrain.planning.inspect_data import Counts, Piece, main, odd_characters, pieces


@pytest.fixture
def text(tmp_path):
    # The same text twice, one with what seldom belongs there, and one that is longer than a row.
    texts = {"a": "to be or not", "b": "to be or not", "c": "zero\u200bwidth \x07\x07 \ufffd", "d": "long " * 20}
    for name, content in texts.items():
        (tmp_path / f"{name}.txt").write_text(content)
    return [f"data.path={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", "data=text", "data.held_out=0"]


def test_pieces_are_the_documents_of_a_row_and_what_is_predicted_of_them(text, tmp_path):
    config = DataConfig(source="text", path=str(tmp_path), cache_dir=str(tmp_path / "cache"), held_out=0)
    corpus = prepare(config, progress=False)
    batches = corpus.training_batches(seed=0, sequence_length=64, batch_size=2)
    rows = list(pieces(batches.at(0), 64))
    assert [sum(len(piece.ids) for piece in row) for row in rows] == [64, 64]
    for row in rows:
        for piece in row:
            assert not piece.predicted[0]
            assert piece.predicted[1:].all()
            assert (np.flatnonzero(piece.ids == corpus.tokenizer.end) >= len(piece.ids) - 1).all()


def test_a_page_shows_the_rows_and_what_is_odd_is_counted(text, tmp_path, capsys):
    out = tmp_path / "out"
    run = ["train.sequence_length=147", "train.batch_size=1", "train.steps=1", "model=hybrid_tiny", "seed=1"]
    assert main([*text, *run, f"inspect.output_dir={out}", "inspect.steps=0"]) == 0
    totals = json.loads((out / "inspect_data.json").read_text())["totals"]
    # All four are one row.
    assert totals["rows"] == 1
    assert totals["fill"] == 1
    assert totals["repeated_pieces"] == 1
    assert totals["odd_characters"] == {"U+0007": 2, "ZERO WIDTH SPACE": 1, "REPLACEMENT CHARACTER": 1}
    page = (out / "inspect_data.html").read_text()
    shown = re.search(r'<div class="row">(.*?)</div>', page, re.DOTALL)[1]
    assert re.sub("<.*?>", "", shown).count("to be or not<|end|>".replace("<", "&lt;").replace(">", "&gt;")) == 2
    # Of four documents, the first token each.
    assert shown.count("unpredicted") == 4
    assert "1 equal another" in capsys.readouterr().out
    assert (out / "inspect_data.png").read_bytes().startswith(b"\x89PNG")


def test_padding_is_counted_apart():
    class Tokens:
        end = 9

        def decode(self, ids):
            return ""

    counts = Counts()
    filled = Piece(np.array([1, 2, 9]), np.array([False, True, True]))
    counts.add([filled, Piece(np.array([9]), np.array([False]))], Tokens())
    assert counts.totals()["fill"] == 0.75
    assert counts.totals()["pieces"] == 1
    assert counts.totals()["predicted"] == 0.5


def test_odd_characters_are_named():
    assert list(odd_characters("fine, ünïcode\n\t")) == []
    assert sorted(odd_characters("\x00\ue000")) == ["U+0000", "U+E000"]
