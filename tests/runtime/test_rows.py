"""Rows read and run in segments: the numbers of a run don't tell in how many."""

import pytest

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.mixers import MIXERS
from seqtrain.runtime.metrics import read_within
from seqtrain.runtime.run_folder import trajectory
from seqtrain.runtime.settings import PretrainConfig, check, segments
from tests.runtime.runtime_cases import (
    BETAS,
    as_it_was_at,
    change,
    first_gradients,
    folder_of,
    losses,
    on_ranks,
    outcome,
    records,
    session_for,
    short_documents,
    small_config,
    train_alone,
    train_each,
)


@pytest.fixture
def hybrid(tmp_path) -> PretrainConfig:
    """Layers with every kind of state, micro-batches of two rows of 37 tokens, short documents, one step."""
    layers = ("gated_delta_net", "s5", "sliding_attention", "attention")
    return small_config(
        tmp_path,
        model={"layers": layers, "depth": len(layers)},
        mixer={name: MIXERS.get(name).Config() for name in layers},
        data={"path": short_documents(tmp_path / "short")},
        optimizer={"betas": BETAS},
        train={"steps": 1, "sequence_length": 37, "gradient_clipping": 0.0},
        parallel={"data": 2},
        evaluation={"max_tokens": 148},
    )


def in_segments(config: PretrainConfig, name: str, tokens: int, **sections) -> PretrainConfig:
    train = {"segment_tokens": tokens} | sections.pop("train", {})
    return change(config, train=train, output_dir=f"{config.output_dir}-{name}", **sections)


def assert_same_step(config: PretrainConfig, whole: PretrainConfig, tolerance: float) -> None:
    expected, came = first_gradients(whole), first_gradients(config)
    assert came.keys() == expected.keys()
    assert len(expected) > 20
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (came[name] - gradient).norm() < tolerance * max(gradient.norm(), 1e-2 * largest), name
    for field in ("loss", "grad_norm"):
        assert records(config)[0][field] == pytest.approx(records(whole)[0][field], rel=tolerance), field
    score = outcome(whole)["held_out_bits_per_byte"]
    assert outcome(config)["held_out_bits_per_byte"] == pytest.approx(score, rel=tolerance)


@pytest.mark.parametrize(("ranks", "stages"), [(2, (0, 1, 2)), (1, (3,))], ids=str)
def test_a_step_in_segments_has_the_loss_gradients_and_score_of_one_in_one_piece(hybrid, ranks, stages):
    whole = in_segments(hybrid, "whole", 0, parallel={"data": ranks})
    pieces = [in_segments(whole, str(stage), 15, parallel={"zero_stage": stage}) for stage in stages]
    assert [segments(config) for config in (whole, *pieces)] == [1, *[5] * len(stages)]
    on_ranks(ranks, train_each, [session_for(config) for config in (whole, *pieces)])
    for config in pieces:
        assert_same_step(config, whole, 1e-5)


def test_bfloat16(hybrid):
    whole, pieces = (
        in_segments(hybrid, str(size), size, train={"dtype": "bfloat16"}, parallel={"data": 1}) for size in (0, 15)
    )
    on_ranks(1, train_each, [session_for(whole), session_for(pieces)])
    # The roundings to eight bits are others where products are cut elsewhere.
    assert_same_step(pieces, whole, 4e-3)


def test_a_checkpoint_goes_on_in_other_segments_and_truncated_ones_are_another_run(tmp_path):
    config = small_config(tmp_path, train={"steps": 4, "sequence_length": 40}, checkpoint={"every": 2})
    whole, cut = in_segments(config, "whole", 0), in_segments(config, "cut", 7)
    on_ranks(1, train_each, [session_for(whole), session_for(cut)])
    other = as_it_was_at(cut, 2, "other", train={"segment_tokens": 33})
    train_alone(other)
    assert losses(other)[:2] == losses(cut)[:2]
    for came in (losses(cut), losses(other)):
        assert came == pytest.approx(losses(whole), rel=1e-5)
    truncated = in_segments(config, "truncated", 7, train={"segment_gradients": "truncated"})
    assert trajectory(cut) == trajectory(other) == trajectory(whole)
    assert trajectory(truncated)["train"]["segment_tokens"] == 7
    with pytest.raises(CheckpointError, match=r"was made with train.*, now"):
        train_alone(as_it_was_at(cut, 2, "refused", train={"segment_gradients": "truncated"}))
    train_alone(truncated)
    assert losses(truncated)[0] == pytest.approx(losses(whole)[0], rel=1e-5)
    assert losses(truncated)[1:] != pytest.approx(losses(whole)[1:], rel=1e-5)


def test_a_step_says_how_far_it_is(tmp_path):
    config = small_config(tmp_path, train={"steps": 2, "segment_tokens": 32}, evaluation={"max_tokens": 64})
    folder, seen = folder_of(config), tmp_path / "seen"

    def look() -> None:
        within = read_within(folder)
        with seen.open("a") as file:
            file.write(f"{len(records(config))} {within.step} {within.done}/{within.of}\n")

    train_alone(config, after_step=look)
    # Four micro-batches of two segments: one run forward, two with gradients.
    parts = [f"0 0 {done}/12" for done in range(1, 13)] + ["1 0 12/12"]
    assert seen.read_text().splitlines()[:13] == parts
    assert seen.read_text().splitlines()[-2:] == ["1 1 12/12", "2 1 12/12"]


@pytest.mark.parametrize(
    ("grid", "way_out"),
    [({"sequence": 2}, "parallel.sequence=1"), ({"data": 2, "zero_stage": 3}, "parallel.zero_stage=2 or less")],
)
def test_what_can_not_be_streamed_is_refused(tmp_path, grid, way_out):
    config = small_config(tmp_path, parallel=grid, runtime={"name": "ray"}, train={"segment_tokens": 16})
    with pytest.raises(ConfigError, match=rf"train.segment_tokens=16: .* use {way_out}"):
        check(config)
    check(change(config, train={"segment_tokens": 64}))
