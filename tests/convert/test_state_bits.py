"""The table of perplexity of a model whose states are kept in few bits."""

import json

from seqtrain.convert.state_bits import main


def test_state_bits_of_a_source(transformers_on_disk, tmp_path, capsys):
    _, folder = transformers_on_disk("qwen2")
    words = [f"source={folder}", "bits=[4,2]", "round_every=[8]", "tokens=40", "sequences=2"]
    assert main([*words, f"output_dir={tmp_path}"]) == 0
    assert "4 bits, every 8" in capsys.readouterr().out
    plain, four, two = json.loads((tmp_path / "results.json").read_text())["rows"]
    of = [next(iter(row["perplexity"].values())) for row in (plain, four, two)]
    assert 0 < abs(of[1] / of[0] - 1) < abs(of[2] / of[0] - 1)
    assert two["state_bytes"] < four["state_bytes"] < plain["state_bytes"] / 3
