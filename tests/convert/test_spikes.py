"""The table of perplexity and spikes of a pretrained model."""

import json

import pytest

from seqtrain.convert.spikes import main
from seqtrain.errors import ConfigError


def test_spikes_of_a_source(transformers_on_disk, tmp_path, capsys):
    _, folder = transformers_on_disk("qwen2")
    words = [f"source={folder}", "rates=[1,4]", "tokens=20", "sequences=2", f"output_dir={tmp_path}"]
    assert main(words) == 0
    shown = [line[:12].strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown if line in ("as it is", "INT8 weights", "k = 1", "k = 4")] == shown[-5:-1]
    plain, rounded, few, many = json.loads((tmp_path / "results.json").read_text())["rows"]
    of = [next(iter(row["perplexity"].values())) for row in (plain, rounded, few, many)]
    assert abs(of[1] / of[0] - 1) < abs(of[3] / of[0] - 1) < abs(of[2] / of[0] - 1)
    assert plain["spikes"] is None
    assert few["spikes"]["silent"] > many["spikes"]["silent"] > 0
    assert few["spikes"]["spikes"] < many["spikes"]["spikes"]
    # Six projections, in four matrices, and the MLP's: two fused, of 2 rows of 20 tokens in 3 layers.
    assert few["spikes"]["values"] == many["spikes"]["values"] == 3 * 40 * (32 + 32 + 32 + 40)


def test_a_missing_source_is_named():
    with pytest.raises(ConfigError, match="source=nowhere: no such folder"):
        main(["source=nowhere"])
