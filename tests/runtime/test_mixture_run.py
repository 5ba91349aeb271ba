"""A run on a mixture: what it says of each source, and what it goes on from."""

import shutil
from dataclasses import replace

import pytest

from seqtrain.runtime.loading import open_run
from seqtrain.runtime.resume import check_resumable, refuse_foreign
from seqtrain.runtime.run import run
from tests.command_cases import refused
from tests.runtime.runtime_cases import change, folder_of, on_ranks, records, session_for, small_config, write_text


def entries_of(folder, *weights):
    book, files = weights or (0.6, 0.3)
    return (
        {"text": str(folder), "weight": files, "name": "files", "held_out": 0.2},
        {"text": str(folder / "0.txt"), "weight": book, "name": "book"},
        {"parity": {}, "weight": 0.1, "held_out_rows": 4},
    )


def losses_of(config):
    return [record["loss"] for record in records(config)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    data = {"path": "", "sources": entries_of(write_text(root / "text"))}
    config = small_config(root, evaluation={"every": 3}, data=data, metrics={"every": 3})
    return config, on_ranks(1, lambda ranks: run(config))[0]


@pytest.mark.all
def test_a_run_tells_of_each_source(finished):
    config, summary = finished
    last = records(config)[-1]
    scores = [f"held_out_bits_per_byte{name}" for name in ("", "/files", "/book")]
    scores += [f"held_out_{figure}{name}" for figure in ("accuracy", "loss") for name in ("", "/parity")]
    assert all(summary[key] == last[key] for key in [*scores, "epochs/files", "epochs/book"])
    assert min(last[key] for key in scores[1:3]) <= last[scores[0]] <= max(last[key] for key in scores[1:3])
    losses = [last[f"loss_of/{name}"] for name in ("files", "book", "parity")]
    assert min(losses) < last["loss"] < max(losses)
    # 48 rows of 32 tokens: 28 or 29 of the book, of a few thousand letters.
    assert last["epochs/book"] > 2 * last["epochs/files"] > 0
    assert summary["bigram_bits_per_byte"] < summary["held_out_bits_per_byte"]
    _, model, tokenizer = open_run(folder_of(config).path)
    assert model.vocab_size == tokenizer.vocab_size == 257


@pytest.mark.all
def test_a_run_goes_on_with_the_shares_it_began_with(finished, tmp_path):
    config, _ = finished

    def check(**fields):
        other = change(config, data=fields)
        refuse_foreign(folder_of(other), other)
        check_resumable(folder_of(other), other, session_for(other).fingerprint)

    check(sources=entries_of(write_text(tmp_path / "moved")))
    with refused("holds a run with data.sources.0.weight=0.3, now 0.4; resume it with these values"):
        check(sources=entries_of(tmp_path / "moved", 0.6, 0.4))
    with refused("data.lengths=[], now [[0, 16]]; resume it with these values"):
        check(lengths=((0, 16),))


@pytest.mark.full
def test_a_run_stopped_at_its_middle_goes_on_by_other_ranks(finished):
    config, _ = finished
    resumed = change(config, "resumed")
    shutil.copytree(config.output_dir, resumed.output_dir)
    shutil.rmtree(folder_of(resumed).checkpoints / "step-00000006")
    folder_of(resumed).summary.unlink()
    on_ranks(2, lambda ranks: run(replace(resumed, parallel=replace(resumed.parallel, data=2))))
    assert losses_of(resumed) == pytest.approx(losses_of(config), rel=1e-5)
