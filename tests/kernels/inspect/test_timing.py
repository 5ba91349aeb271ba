"""The model of kernel times: what it counts the interpreter counted, and what it is fitted to it finds again."""

from dataclasses import replace

import numpy as np
import pytest

from seqtrain import cli
from seqtrain.kernels.inspect import timing

TOKEN, CHANNEL = timing.Form(True, 1), timing.Form(True, 2)


# docs/kernels.md, of the interpreter: test_triton.test_bytes_and_launches holds the kernels to them.
@pytest.mark.parametrize(
    ("form", "find", "bytes_moved", "launches"),
    [
        (TOKEN, timing.forward, 1560, 2),
        (TOKEN, timing.backward, 5924, 3),
        (CHANNEL, timing.forward, 3604, 2),
        (CHANNEL, timing.backward, 9504, 4),
    ],
)
def test_bytes_are_those_that_were_counted(form, find, bytes_moved, launches):
    found = find(form, 128, 16)
    assert sum(launch.bytes for launch in found) == bytes_moved
    assert len(found) == launches
    assert len(find(form, 128, 16, timing.Cut(32, 4))) == launches + 2


def test_a_model_is_found_from_its_own_times():
    model = timing.Model(bytes=1.3, flops=4.0, step=7e-7, product=2e-7, decays=3e-7)
    points = [
        replace(x, seconds=model.seconds(x.launches, x.tokens, x.heads, x.gpu))
        for x in timing.MEASURED
        if x.name != timing.PEER
    ]
    found = timing.fit(points)
    assert np.allclose(*(list(vars(x).values()) for x in (found, model)), rtol=1e-6)
    assert max(map(abs, timing.errors(found, points).values())) < 1e-6


def test_no_number_of_a_model_is_negative():
    features = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    # A line that falls: its slope would be -1.
    assert np.allclose(timing._nonnegative(features, np.array([3.0, 2.0, 1.0])), [2.0, 0.0])


def test_what_was_held_out_is_predicted_and_no_part_of_the_fit():
    held = [x for x in timing.MEASURED if timing.is_held_out(x)]
    fitted = [x for x in timing.MEASURED if not timing.is_held_out(x)]
    assert {x.tokens for x in held if x.name != timing.PEER} == {65536}
    errors = timing.errors(timing.fit(fitted), held).values()
    assert np.mean(np.abs(list(errors))) < 0.15
    assert max(map(abs, errors)) < 0.35


def test_a_row_of_few_heads_gains_by_a_cut_and_one_of_many_is_left_whole(tmp_path, capsys):
    pytest.importorskip("triton")
    settings = ["heads=[16,64]", "tokens=[32768]", f"output_dir={tmp_path}"]
    assert cli.run("predict-kernels", settings) == 0
    said = capsys.readouterr().out
    assert "predicted for an H100, never measured" in said
    model = timing.fit([x for x in timing.MEASURED if not timing.is_held_out(x)])
    few, many = (timing.predict(model, "delta rule, decay per token", 32768, heads) for heads in (16, 64))
    assert few.cut < few.cut_at_worst < few.whole
    assert many.chunks_per_piece == 0
    assert many.cut == many.cut_at_worst == many.whole > 3 * few.cut
    assert (tmp_path / "predict_kernels.json").exists()
