"""One sequence over several ranks, in a whole run: the numbers are those of one rank, whatever the mesh and stage."""

from pathlib import Path

import pytest

from seqtrain.mixers import MIXERS
from seqtrain.runtime.settings import PretrainConfig
from tests.runtime.runtime_cases import (
    BETAS,
    as_it_was_at,
    change,
    first_gradients,
    losses,
    on_ranks,
    outcome,
    records,
    session_for,
    short_documents,
    small_config,
    train_each,
)

# data, sequence, ZeRO stage
MESHES = (*((2, 2, stage) for stage in (0, 1, 2, 3)), (1, 2, 1), (1, 2, 3), (1, 3, 2), (1, 4, 0))


def grid(data: int, sequence: int, stage: int) -> dict[str, int]:
    return {"data": data, "sequence": sequence, "zero_stage": stage}


def on_mesh(config: PretrainConfig, data: int, sequence: int, stage: int) -> PretrainConfig:
    return change(
        config,
        parallel=grid(data, sequence, stage),
        output_dir=str(Path(config.output_dir).with_name(f"{data}-{sequence}-{stage}")),
    )


@pytest.fixture
def hybrid(tmp_path) -> PretrainConfig:
    """Layers that are cut in different ways, their blocks recomputed, rows of 37 tokens, micro-batches of two rows."""
    layers = ("gated_delta_net", "s5", "sliding_attention", "attention")
    return small_config(
        tmp_path,
        model={"layers": layers, "depth": len(layers), "activation_checkpointing": True},
        mixer={name: MIXERS.get(name).Config() for name in layers},
        data={"path": short_documents(tmp_path / "short")},
        optimizer={"betas": BETAS},
        train={"steps": 1, "sequence_length": 37},
    )


def train_all(configs: list[PretrainConfig]) -> None:
    """Each on the ranks its mesh has, and those that have equally many in one launch."""
    for count in {config.parallel.ranks for config in configs}:
        on_ranks(count, train_each, [session_for(config) for config in configs if config.parallel.ranks == count])


def test_trap_15_gradients_and_their_norm_on_every_mesh_and_stage_are_those_of_one_rank(hybrid):
    unclipped = change(hybrid, train={"gradient_clipping": 0.0})
    alone, *sharded = configs = [on_mesh(unclipped, *mesh) for mesh in ((1, 1, 1), *MESHES)]
    train_all(configs)
    expected, [record] = first_gradients(alone), records(alone)
    assert len(expected) > 20
    for config in sharded:
        came = first_gradients(config)
        assert came.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (came[name] - gradient).norm() < 1e-5 * gradient.norm(), (config.parallel, name)
        # Each weight counts once in the norm, and each token once, though every rank has a copy or a piece of them.
        for field in ("loss", "grad_norm", "tokens", "total_tokens"):
            assert records(config)[0][field] == pytest.approx(record[field], rel=1e-5), (config.parallel, field)
        score = outcome(alone)["held_out_bits_per_byte"]
        assert outcome(config)["held_out_bits_per_byte"] == pytest.approx(score, rel=1e-5), config.parallel


def test_trap_19_a_checkpoint_goes_on_with_any_other_mesh_and_stage(hybrid):
    longer = change(hybrid, train={"steps": 4}, checkpoint={"every": 2})
    alone, begun = on_mesh(longer, 1, 1, 0), on_mesh(longer, 1, 3, 3)
    train_all([alone, begun])
    others = [as_it_was_at(begun, 2, f"from-{mesh}", parallel=grid(*mesh)) for mesh in ((2, 2, 1), (1, 1, 2))]
    train_all(others)
    for config in others:
        assert losses(config)[:2] == losses(begun)[:2]
        assert losses(config) == pytest.approx(losses(alone), rel=1e-5), config.parallel


def test_a_rank_without_labels_adds_nothing(hybrid, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text("ab"[number % 2])
    # A letter and its document's end, again and again: of two tokens only one is to predict the other.
    lonely = change(hybrid, data={"path": str(folder)}, train={"steps": 4, "sequence_length": 2, "batch_size": 1})
    alone, sharded = on_mesh(lonely, 1, 1, 1), on_mesh(lonely, 1, 2, 1)
    train_all([alone, sharded])
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-5)
    assert outcome(sharded)["skipped_steps"] == 0
