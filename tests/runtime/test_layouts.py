"""The numbers of a run don't tell how it was divided: over ranks, ZeRO stages, in time over ranks or in segments."""

import pytest
import torch

from seqtrain.data import open_corpus
from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.models import LanguageModel
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.checks import check
from seqtrain.runtime.lease import newest
from seqtrain.runtime.metrics import read_within
from seqtrain.runtime.resume import differences, fingerprint
from seqtrain.runtime.settings import PretrainConfig, segments
from tests.runtime.runtime_cases import (
    as_it_was_at,
    assert_same_step,
    change,
    first_gradients,
    folder_of,
    grid,
    in_tiers,
    losses,
    outcome,
    records,
    score,
    session_for,
    short_documents,
    small_config,
    train_on,
)

STAGES = (0, 1, 2, 3)
CLIPPED = {"steps": 3, "gradient_clipping": 0.05, "micro_batch_size": 1}


@pytest.fixture
def hybrid(tmp_path) -> PretrainConfig:
    """Layers with every kind of state, micro-batches of two rows of 37 tokens, short documents, one step."""
    layers = ("gated_delta_net", "s5", "sliding_attention", "attention")
    return small_config(
        tmp_path,
        *layers,
        data={"path": short_documents(tmp_path / "short")},
        train={"steps": 1, "sequence_length": 37, "gradient_clipping": 0.0},
        evaluation={"max_tokens": 148},
    )


@pytest.mark.parametrize(
    "grids",
    in_tiers(
        [*((2, 1, stage) for stage in STAGES), (4, 1, 1)],
        [*((1, 1, stage) for stage in (1, 2, 3)), *((4, 1, stage) for stage in (0, 2, 3))],
    ),
)
def test_losses_are_the_same_for_every_rank_count_and_zero_stage(tmp_path, grids):
    base = small_config(tmp_path, train={"steps": 20}, checkpoint={"every": 0})
    expected, *others = configs = [change(base, f"{case}", parallel=grid(*case)) for case in [(1, 1, 0), *grids]]
    train_on(*configs)
    assert len(losses(expected)) == 20
    assert losses(expected)[-1] < losses(expected)[0] - 0.5, "the model must learn, or equal losses say little"
    for config in others:
        assert losses(config) == pytest.approx(losses(expected), abs=1e-5), config.parallel
        assert score(config) == pytest.approx(score(expected), abs=1e-5), config.parallel


@pytest.mark.parametrize(
    "cases",
    in_tiers([(3, ("block",)), (3, ("norm", "mlp", "projection"))], [(stage, ("norm",)) for stage in STAGES]),
)
def test_recomputed_parts_have_the_same_losses_in_every_stage(tmp_path, cases):
    layers = ("gated_delta_net", "gla", "hgrn2", "s5", "tensor_attention", "sliding_attention")
    base = small_config(tmp_path, *layers, train={"steps": 3}, checkpoint={"every": 0}, parallel=grid(2, 1, 0))
    again = [
        change(base, f"{number}", model={"recompute": recompute}, parallel=grid(2, 1, stage))
        for number, (stage, recompute) in enumerate(cases)
    ]
    train_on(base, *again)
    for config in again:
        assert losses(config) == pytest.approx(losses(base), abs=1e-5), config


@pytest.mark.all
@pytest.mark.parametrize("micro", [1, 8])
def test_loss_and_gradient_are_those_of_the_mean_over_all_predicted_tokens(tmp_path, micro):
    config = small_config(tmp_path, train={"steps": 1, "micro_batch_size": micro}, parallel={"zero_stage": 2})
    session = session_for(config)
    corpus = open_corpus(session.corpus, config.data)
    model = LanguageModel(config.model, config.mixer, corpus.tokenizer.vocab_size, seed=config.seed)
    batch = corpus.training_batches(seed=config.seed, sequence_length=32, batch_size=8).at(0)
    loss = model(batch.tokens, batch.labels, sequence=SequenceContext(cu_seqlens=batch.cu_seqlens)) / batch.label_count
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    train_on(session)
    [record] = records(config)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert record["tokens"] == 8 * 32


@pytest.mark.parametrize(
    "meshes",
    in_tiers([(2, 2, 1), (2, 2, 3), (1, 2, 2), (1, 3, 0)], [(2, 2, 0), (2, 2, 2), (1, 2, 1), (1, 3, 2), (1, 4, 0)]),
)
def test_a_sharded_sequence_has_the_gradients_of_one_rank_on_every_mesh_and_stage(hybrid, meshes):
    hybrid = change(hybrid, model={"activation_checkpointing": True})
    alone, *sharded = [change(hybrid, f"{mesh}", parallel=grid(*mesh)) for mesh in ((1, 1, 1), *meshes)]
    train_on(alone, *sharded)
    for config in sharded:
        assert_same_step(config, alone)


@pytest.mark.all
def test_a_checkpoint_resumes_on_any_other_mesh_and_stage(hybrid):
    longer = change(hybrid, train={"steps": 4}, checkpoint={"every": 2})
    alone, begun = (change(longer, f"{mesh}", parallel=grid(*mesh)) for mesh in ((1, 1, 0), (1, 3, 3)))
    train_on(alone, begun)
    meshes = ((2, 2, 1), (1, 1, 2), (2, 1, 0))
    others = [as_it_was_at(begun, 2, f"from-{mesh}", parallel=grid(*mesh)) for mesh in meshes]
    train_on(*others)
    for config in others:
        assert losses(config)[:2] == losses(begun)[:2]
        assert losses(config) == pytest.approx(losses(alone), rel=1e-5), config.parallel


@pytest.mark.all
@pytest.mark.parametrize("packing", ["stream", pytest.param("best_fit", marks=pytest.mark.full)])
def test_rows_that_carry_states_on_are_the_same_on_any_mesh_and_after_a_resume(hybrid, packing):
    hybrid = change(hybrid, data={"packing": packing})
    sizes = {"sequence_length": 12, "batch_size": 8, "micro_batch_size": 4, "steps": 3}
    alone = change(hybrid, data={"carry_rows": 2}, train=sizes, checkpoint={"every": 2})
    sharded = change(alone, "sharded", parallel=grid(2, 2, 1))
    cut = change(alone, "cut", data={"carry_rows": 1})
    longer = change(cut, "longer", train={"sequence_length": 24, "batch_size": 4, "micro_batch_size": 2})
    train_on(alone, longer, cut, sharded)
    resumed = as_it_was_at(alone, 2, "resumed", parallel=grid(1, 2, 1), train={"micro_batch_size": 2})
    train_on(resumed)
    assert losses(alone) == losses(longer)
    for config in (sharded, resumed):
        assert losses(config) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(cut)[1] != pytest.approx(losses(alone)[1], rel=1e-3)


@pytest.mark.all
def test_a_rank_without_labels_adds_nothing(hybrid, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text("ab"[number % 2])
    # A letter and its document's end, again and again: of two tokens only one is to predict the other.
    sizes = {"steps": 4, "sequence_length": 2, "batch_size": 1}
    alone = change(hybrid, data={"path": str(folder)}, train=sizes, evaluation={"max_tokens": 0})
    sharded = change(alone, "sharded", parallel=grid(1, 2, 1))
    train_on(alone, sharded)
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-5)
    assert outcome(sharded)["skipped_steps"] == 0


@pytest.mark.parametrize(
    "meshes",
    in_tiers([(2, 1, 1), (2, 1, 3), (1, 2, 3)], [(2, 1, 2), (1, 1, 0), (1, 1, 3), (1, 2, 0), (2, 2, 3), (1, 3, 2)]),
)
def test_a_step_in_segments_has_the_gradients_of_one_in_one_piece(hybrid, meshes):
    whole = change(hybrid, metrics={"every": 1}, parallel=grid(1, 1, 1))
    pieces = [change(whole, f"{mesh}", train={"segment_tokens": 15}, parallel=grid(*mesh)) for mesh in meshes]
    assert [segments(config) for config in (whole, *pieces)] == [1, *[5] * len(meshes)]
    train_on(whole, *pieces)
    for config in pieces:
        assert_same_step(config, whole)


@pytest.mark.all
def test_segments_in_bfloat16(hybrid):
    whole = change(hybrid, train={"dtype": "bfloat16"})
    pieces = change(whole, "pieces", train={"segment_tokens": 15})
    train_on(whole, pieces)
    # The roundings to eight bits are others where products are cut elsewhere.
    assert_same_step(pieces, whole, 4e-3)


@pytest.mark.all
def test_a_checkpoint_resumes_in_other_segments_and_truncated_ones_are_another_run(tmp_path):
    whole = small_config(tmp_path, train={"steps": 4, "sequence_length": 40}, checkpoint={"every": 2})
    cut = change(whole, "cut", train={"segment_tokens": 7})
    truncated = change(cut, "truncated", train={"segment_gradients": "truncated"})
    train_on(whole, cut, truncated)
    other = as_it_was_at(cut, 2, "other", train={"segment_tokens": 33})
    train_on(other)
    assert losses(other)[:2] == losses(cut)[:2]
    for config in (cut, other):
        assert losses(config) == pytest.approx(losses(whole), rel=1e-5)
    assert fingerprint(cut) == fingerprint(other) == fingerprint(whole)
    assert fingerprint(truncated)["train"]["segment_tokens"] == 7
    with pytest.raises(CheckpointError, match=r"was made with train.*, now"):
        train_on(as_it_was_at(cut, 2, "refused", train={"segment_gradients": "truncated"}))
    assert losses(truncated)[0] == pytest.approx(losses(whole)[0], rel=1e-5)
    assert losses(truncated)[1:] != pytest.approx(losses(whole)[1:], rel=1e-5)


def test_what_zero_3_can_not_compute_again_in_segments_is_refused(tmp_path):
    config = small_config(tmp_path, parallel=grid(1, 2, 3), runtime={"name": "ray"}, train={"segment_tokens": 16})
    check(config)
    with pytest.raises(ConfigError, match=r"train.segment_tokens=16: .* model.recompute=\[block\] can't be"):
        check(change(config, model={"activation_checkpointing": True}))


def test_a_run_goes_on_with_other_memory_and_not_with_other_numbers(tmp_path):
    config = small_config(tmp_path)
    before = fingerprint(config)
    # As checkpoints have it that were made before there was a choice.
    stored = before | {"model": before["model"] | {"activation_checkpointing": True}}
    other = change(config, model={"recompute": ("norm",)}, train={"memory_budget": 0.5, "offload_activations": True})
    assert differences(stored, fingerprint(other)) == []
    narrow = fingerprint(change(config, train={"weights": "bfloat16", "compile": True}))
    assert len(differences(stored, narrow)) == 2


@pytest.mark.all
def test_a_step_says_how_far_it_is(tmp_path):
    config = small_config(tmp_path, train={"steps": 2, "segment_tokens": 32}, evaluation={"max_tokens": 64})
    folder, seen = folder_of(config), tmp_path / "seen"

    def look() -> None:
        if within := read_within(newest(folder.epochs)):
            with seen.open("a") as file:
                file.write(f"{within.step} {within.done}/{within.of}\n")

    train_on(config, poll=look)
    # Four micro-batches of two segments: one pass forward, two with gradients; then an evaluation, as a thread writes
    # them.
    parts = [*(f"{step} {done}/12" for step in (0, 1) for done in range(1, 13)), "2 1/1"]
    places = [parts.index(line) for line in seen.read_text().splitlines()]
    assert places == sorted(places)
    assert len(set(places)) > 6


@pytest.mark.parametrize(
    "cases",
    in_tiers([(4, 1, 3, 2), (2, 2, 2, 2), (4, 1, 1, 2)], [(4, 1, 2, 2), (2, 2, 3, 1), (2, 2, 1, 2), (1, 4, 3, 2)]),
)
def test_shards_with_replicas_have_the_gradients_of_one_rank(hybrid, cases):
    alone, *sharded = [
        change(hybrid, f"{case}", parallel={**grid(*case[:3]), "shard": case[3]}) for case in ((1, 1, 1, 1), *cases)
    ]
    longer = [change(each, f"clipped-{each.parallel.data}", train=CLIPPED) for each in (alone, sharded[0])]
    train_on(alone, *sharded, *longer)
    for config in sharded:
        assert_same_step(config, alone)
    # Over steps, with clipping and more micro-batches.
    assert losses(longer[1]) == pytest.approx(losses(longer[0]), rel=1e-5)


@pytest.mark.parametrize("stages", in_tiers((3,), (1, 2)))
def test_matrices_travel_in_bfloat16(hybrid, stages):
    wide = change(hybrid, train={"dtype": "bfloat16"})
    for stage in stages:
        plain, narrow = (
            change(wide, f"{stage}-{wire}", parallel={**grid(2, 1, stage), "wire": wire})
            for wire in ("float32", "bfloat16")
        )
        train_on(plain, narrow)
        # Each of two ranks' gradients is rounded to eight bits, and their sum, which may be smaller than they are.
        assert_same_step(narrow, plain, 2 * 3 * 2**-9)
        came, exact = first_gradients(narrow), first_gradients(plain)
        changed = {name for name in came if not came[name].equal(exact[name])}
        assert changed, "nothing was rounded"
        assert not [name for name in changed if "norm" in name or "embedding" in name or "decay" in name]
        assert records(narrow)[0]["loss"] == records(plain)[0]["loss"]


@pytest.mark.full
def test_matrices_and_checkpoints_of_shards_with_replicas(hybrid):
    longer = change(hybrid, train={"steps": 4}, checkpoint={"every": 2}, optimizer={"name": "muon", "lr": 1e-3})
    alone, begun = (
        change(longer, f"{shard}", parallel={**grid(ranks, 1, 3), "shard": shard}) for ranks, shard in ((1, 1), (4, 2))
    )
    train_on(alone, begun)
    others = [as_it_was_at(begun, 2, f"from-{ranks}", parallel=grid(ranks, 1, 1)) for ranks in (2, 1)]
    others += [as_it_was_at(alone, 2, "to-shards", parallel={**grid(4, 1, 3), "shard": 2})]
    train_on(*others)
    for config in (begun, *others):
        assert losses(config) == pytest.approx(losses(alone), rel=1e-5), config.parallel


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"data": 4, "shard": 3}, "must divide .*=4; use 2"),
        ({"data": 4, "shard": 2, "zero_stage": 0}, "parallel.zero_stage=0 divides nothing; use"),
    ],
)
def test_shards_that_can_not_be(tmp_path, parallel, said):
    config = small_config(tmp_path, parallel=parallel, runtime={"name": "ray"})
    with pytest.raises(ConfigError, match=rf"parallel.shard=\d: {said}"):
        check(config)
    wide = change(config, parallel={"data": 1024, "shard": "auto", "zero_stage": 3}).parallel
    assert (wide.shard_ranks, change(config, parallel={"data": 4, "shard": "auto"}).parallel.shard_ranks) == (64, 4)
