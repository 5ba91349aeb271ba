"""The step loop on real ranks: the same numbers however the work is divided, exact resume, bad steps left out."""

import os

import pytest
import torch

from seqtrain.data import Batches, open_corpus
from seqtrain.errors import CheckpointError, SeqtrainError
from seqtrain.mixers import MIXERS
from seqtrain.models import LanguageModel
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime import objective, worker
from seqtrain.runtime.checkpoint import find
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    folder_of,
    losses,
    on_ranks,
    outcome,
    records,
    session_for,
    small_config,
    train_alone,
    train_each,
)

STAGES = (0, 1, 2, 3)


def test_losses_are_the_same_for_every_rank_count_and_zero_stage(tmp_path):
    configs = {}
    for count in (1, 2, 4):
        for stage in STAGES:
            configs[count, stage] = small_config(
                tmp_path,
                train={"steps": 20},
                parallel={"data": count, "zero_stage": stage},
                checkpoint={"every": 0},
                output_dir=str(tmp_path / f"{count}-{stage}"),
            )
        on_ranks(count, train_each, [session_for(configs[count, stage]) for stage in STAGES])
    expected, score = losses(configs[1, 0]), outcome(configs[1, 0])["held_out_bits_per_byte"]
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.5, "the model must learn, or equal losses say little"
    for case, config in configs.items():
        assert losses(config) == pytest.approx(expected, abs=1e-5), case
        assert outcome(config)["held_out_bits_per_byte"] == pytest.approx(score, abs=1e-5), case


def test_a_hybrid_with_recomputed_blocks_has_the_same_losses_in_every_stage(tmp_path):
    layers = ("gated_delta_net", "gla", "hgrn2", "s5", "tensor_attention", "sliding_attention")
    configs = [
        small_config(
            tmp_path,
            model={"layers": layers, "depth": len(layers), "activation_checkpointing": recompute},
            mixer={name: MIXERS.get(name).Config() for name in layers},
            train={"steps": 3},
            parallel={"data": 2, "zero_stage": stage},
            checkpoint={"every": 0},
            output_dir=str(tmp_path / f"{stage}-{recompute}"),
        )
        for stage, recompute in [(0, False), *((stage, True) for stage in STAGES)]
    ]
    on_ranks(2, train_each, [session_for(config) for config in configs])
    expected = losses(configs[0])
    for config in configs[1:]:
        assert losses(config) == pytest.approx(expected, abs=1e-5), config.parallel


@pytest.mark.parametrize("micro", [1, 8])
def test_loss_and_gradient_are_those_of_the_mean_over_all_predicted_tokens(tmp_path, micro):
    config = small_config(tmp_path, train={"steps": 1, "micro_batch_size": micro}, parallel={"zero_stage": 2})
    session = session_for(config)
    corpus = open_corpus(session.corpus, config.data)
    torch.manual_seed(config.seed)
    model = LanguageModel(config.model, config.mixer, corpus.tokenizer.vocab_size)
    batch = Batches(corpus.train, seed=config.seed, sequence_length=32, batch_size=8).at(0)
    loss = model(batch.tokens, batch.labels, sequence=SequenceContext(cu_seqlens=batch.cu_seqlens)) / batch.label_count
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    train_alone(config)
    [record] = records(config)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert record["tokens"] == 8 * 32


def test_a_resumed_run_has_the_very_same_losses(tmp_path):
    whole = [
        small_config(
            tmp_path,
            train={"dtype": dtype},
            parallel={"data": 2, "zero_stage": stage},
            output_dir=str(tmp_path / f"{dtype}-{stage}"),
        )
        for dtype in ("float32", "bfloat16")
        for stage in STAGES
    ]
    on_ranks(2, train_each, [session_for(config) for config in whole])
    resumed = [as_it_was_at(config, 3, f"{config.train.dtype}-{config.parallel.zero_stage}-again") for config in whole]
    on_ranks(2, train_each, [session_for(config) for config in resumed])
    for before, after in zip(whole, resumed, strict=True):
        assert [record["step"] for record in records(after)] == [1, 2, 3, 4, 5, 6]
        assert losses(after) == losses(before), (before.train.dtype, before.parallel.zero_stage)
        assert outcome(after)["held_out_bits_per_byte"] == outcome(before)["held_out_bits_per_byte"]


def test_a_checkpoint_goes_on_with_other_ranks_and_another_stage(tmp_path):
    sharded = small_config(tmp_path, parallel={"data": 4, "zero_stage": 3})
    on_ranks(4, train_each, [session_for(sharded)])
    for count, stage in ((1, 0), (2, 2)):
        other = as_it_was_at(sharded, 3, f"{count}-{stage}", parallel={"data": count, "zero_stage": stage})
        on_ranks(count, train_each, [session_for(other)])
        assert losses(other)[:3] == losses(sharded)[:3]
        assert losses(other) == pytest.approx(losses(sharded), abs=1e-5)


class BadLoss(LanguageModel):
    """Rank 1's third batch in training has a loss that isn't finite."""

    calls = 0

    def forward(self, *arguments, **options):
        loss = super().forward(*arguments, **options)
        self.calls += self.training
        return loss * float("nan") if self.training and self.calls == 3 and os.environ["RANK"] == "1" else loss


class BadGradient(LanguageModel):
    """Rank 1's third batch in training has an ordinary loss and an infinite gradient."""

    calls = 0

    def forward(self, *arguments, **options):
        loss = super().forward(*arguments, **options)
        self.calls += self.training
        if self.training and self.calls == 3 and os.environ["RANK"] == "1":
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss


@pytest.mark.parametrize("model", [BadLoss, BadGradient])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(tmp_path, monkeypatch, model):
    monkeypatch.setattr(objective, "LanguageModel", model)
    configs = [
        small_config(
            tmp_path,
            train={"micro_batch_size": 4, "dtype": dtype},
            parallel={"data": 2, "zero_stage": stage},
            checkpoint={"every": 2},
            output_dir=str(tmp_path / f"{dtype}-{stage}"),
        )
        for stage, dtype in [
            (0, "float32"),
            (1, "float32"),
            (2, "float32"),
            (3, "float32"),
            (0, "bfloat16"),
            (1, "bfloat16"),
        ]
    ]
    on_ranks(2, train_each, [session_for(config) for config in configs])
    for config in configs:
        case = (config.parallel.zero_stage, config.train.dtype)
        skipped = [record["skipped"] for record in records(config)]
        assert skipped == [False, False, True, False, False, False], case
        assert records(config)[2]["grad_norm"] is None
        assert (losses(config)[2] is None) == (model is BadLoss), case
        assert outcome(config)["skipped_steps"] == 1
        assert None not in losses(config)[3:], case
        tolerance = 1e-5 if config.train.dtype == "float32" else 0.05
        assert losses(config)[3:] == pytest.approx(losses(configs[0])[3:], abs=tolerance), case


def test_weights_and_moments_stay_when_a_step_is_skipped(tmp_path, monkeypatch):
    class BadStart(LanguageModel):
        calls = 0

        def forward(self, *arguments, **options):
            loss = super().forward(*arguments, **options)
            self.calls += self.training
            return loss * float("inf") if self.training and self.calls == 1 else loss

    still = small_config(tmp_path, optimizer={"lr": 0.0}, output_dir=str(tmp_path / "still"))
    train_alone(still)
    monkeypatch.setattr(objective, "LanguageModel", BadStart)
    for stage in STAGES:
        config = small_config(tmp_path, parallel={"zero_stage": stage}, output_dir=str(tmp_path / str(stage)))
        train_alone(config)
        assert losses(config)[0] is None
        assert losses(config)[1] == losses(still)[1], "the second step must see the first weights"
        assert losses(config)[2] != losses(still)[2]
        assert find(folder_of(config).checkpoints).progress.taken == 5


def test_a_run_gives_up_after_too_many_bad_steps_in_a_row(tmp_path, monkeypatch):
    class Bad(LanguageModel):
        def forward(self, *arguments, **options):
            return super().forward(*arguments, **options) * float("nan")

    monkeypatch.setattr(objective, "LanguageModel", Bad)
    config = small_config(tmp_path, train={"max_nonfinite_steps": 2})
    with pytest.raises(SeqtrainError, match=r"train.max_nonfinite_steps=2: 3 steps in a row, up to step 3"):
        train_alone(config)
    assert len(records(config)) == 3


def test_a_stop_request_saves_and_the_next_call_goes_on(tmp_path):
    whole = small_config(tmp_path, output_dir=str(tmp_path / "whole"))
    train_alone(whole)
    config = small_config(tmp_path)
    folder = folder_of(config)

    def ask_after_two() -> None:
        if len(records(config)) == 2:
            folder.stop.touch()

    train_alone(config, after_step=ask_after_two)
    assert outcome(config)["stopped"]
    assert outcome(config)["steps"] == 2
    assert find(folder.checkpoints).progress.step == 2
    train_alone(config)
    assert not outcome(config)["stopped"]
    assert losses(config) == losses(whole)


def test_a_stop_during_the_last_evaluation_leaves_the_score_to_the_next_call(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    whole = small_config(tmp_path, output_dir=str(tmp_path / "whole"))
    train_alone(whole)
    score = worker.evaluate

    def interrupted(*arguments, **options):
        folder_of(config).stop.touch()
        return score(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "evaluate", interrupted)
        train_alone(config)
    assert outcome(config)["stopped"]
    assert outcome(config)["held_out_bits_per_byte"] is None
    train_alone(config)
    assert not outcome(config)["stopped"]
    assert outcome(config)["held_out_bits_per_byte"] == outcome(whole)["held_out_bits_per_byte"]
    assert len(records(config)) == 6


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    config = small_config(tmp_path)
    train_alone(config)
    other = change(config, optimizer={"lr": 0.5}, output_dir=str(tmp_path / "other"))
    session = session_for(other)
    folder_of(config).checkpoints.rename(folder_of(other).checkpoints)
    with pytest.raises(CheckpointError, match=r"step-00000006: was made with optimizer.lr=0.01, now 0.5;"):
        on_ranks(1, train_each, [session])


def test_a_named_checkpoint_starts_a_new_run_with_its_weights_and_step(tmp_path):
    config = small_config(tmp_path)
    train_alone(config)
    longer = change(
        config,
        train={"steps": 8},
        checkpoint={"resume": str(folder_of(config).checkpoints / "step-00000006")},
        output_dir=str(tmp_path / "longer"),
    )
    train_alone(longer)
    assert [record["step"] for record in records(longer)] == [7, 8]
    assert losses(longer)[0] < losses(config)[0] - 0.1
    wider = change(longer, model={"width": 32}, output_dir=str(tmp_path / "wider"))
    with pytest.raises(CheckpointError, match=r"step-00000006: was made with model.width=16, now 32"):
        train_alone(wider)
