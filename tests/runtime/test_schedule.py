"""Schedules that follow an earlier run, and runs that are made longer where the rate is constant."""

import json
import shutil

import numpy as np
import pytest

from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.runtime.checks import check
from seqtrain.runtime.resume import check_resumable, fingerprint, refuse_foreign
from seqtrain.runtime.schedule import NORMS, ScheduleConfig, gradient_norms, keep_norms, learning_rate, refine
from seqtrain.runtime.settings import unit, units
from tests.command_cases import refused
from tests.runtime.runtime_cases import (
    as_it_was_at,
    change,
    folder_of,
    grid,
    losses,
    records,
    session_for,
    small_config,
    train_on,
)

STEPS = 50


def test_equal_norms_refine_to_a_straight_line():
    """Whatever the power: the last step has nothing after it, the first has the most."""
    for _, power in NORMS.values():
        expected = [(STEPS - 1 - step) / (STEPS - 1) for step in range(STEPS)]
        assert refine([3.0] * 7, STEPS, power=power) == pytest.approx(expected)


@pytest.mark.parametrize("power", [-1, -2])
def test_a_refined_schedule_is_its_definition(power):
    """The loop of the paper, with the median over a tenth of the run."""
    norms = np.random.default_rng(0).uniform(0.5, 2.0, STEPS) * np.linspace(4.0, 1.0, STEPS)
    half = STEPS // 20
    ends = [*[norms[0]] * half, *norms, *norms[-2 : -2 - half : -1]]
    smooth = np.array([np.median(ends[step : step + 2 * half + 1]) for step in range(STEPS)])
    rates = [smooth[t] ** power * sum(smooth[t + 1 :] ** power) for t in range(STEPS)]
    found = refine(norms.tolist(), STEPS, power=power)
    assert found == pytest.approx(np.array(rates) / max(rates))
    assert 0 < np.argmax(found) < STEPS - 1, "it warms up by itself"
    schedule = ScheduleConfig(name="refined", from_="run", warmup_fraction=0.1, final_lr_ratio=0.0)
    came = [learning_rate(schedule, peak=2.0, steps=STEPS, step=step, refined=found) for step in range(STEPS)]
    assert came == pytest.approx([2 * min(rate, (step + 1) / 5) for step, rate in enumerate(found)])


def write_norms(folder, **columns) -> None:
    folder.mkdir(exist_ok=True)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))


def test_norms_are_read_once_and_kept_in_the_run(tmp_path):
    write_norms(tmp_path / "before", grad_norm=[1.0, None, 3.0], grad_norm_l1=[10.0, 20.0, None])
    schedule = {"name": "refined", "from_": str(tmp_path / "before")}
    config = small_config(tmp_path, schedule=schedule)
    folder = folder_of(config)
    folder.path.mkdir()
    norms = gradient_norms(config.schedule, folder)
    assert norms == (10.0, 20.0)
    assert gradient_norms(change(config, schedule={"norm": "l2"}).schedule, folder) == (1.0, 3.0)
    keep_norms(norms, config.schedule, folder)
    shutil.rmtree(tmp_path / "before")
    assert gradient_norms(config.schedule, folder) == norms
    found = fingerprint(config, norms=norms)
    assert found == fingerprint(change(config, schedule={"from_": "elsewhere"}), norms=norms)
    assert found != fingerprint(config, norms=(10.0, 21.0))
    folder.schedule.write_text("[")
    with pytest.raises(CheckpointError, match=r"schedule.json: is damaged"):
        gradient_norms(config.schedule, folder)


def test_a_run_without_norms_is_one_line(tmp_path):
    folder = folder_of(small_config(tmp_path))
    schedule = ScheduleConfig(name="refined", from_=str(tmp_path / "before"))
    with pytest.raises(ConfigError, match=r"schedule.from=\S+: holds no metrics.jsonl; name the output_dir of a run"):
        gradient_norms(schedule, folder)
    write_norms(tmp_path / "before", grad_norm=[1.0])
    with pytest.raises(ConfigError, match=r"has no grad_norm_l1; use schedule.norm=l2, or a run with metrics.every"):
        gradient_norms(schedule, folder)
    assert gradient_norms(ScheduleConfig(name="refined"), folder) == ()


def test_only_a_schedule_that_refines_is_told_apart_by_where_from(tmp_path):
    plain, linear = (small_config(tmp_path, schedule={"from_": "a", "name": name}) for name in ("cosine", "refined"))
    assert "from" not in fingerprint(plain)["schedule"]
    assert fingerprint(linear)["schedule"]["from"] == "a"
    assert "norm" not in fingerprint(change(linear, schedule={"from_": ""}))["schedule"]


WSD = {"name": "wsd", "decay_fraction": 0.5, "warmup_fraction": 0.2}


@pytest.mark.all
@pytest.mark.parametrize(("name", "goes_on_from"), [("wsd", 5), ("constant", 10)])
def test_a_run_is_made_longer_from_where_its_rate_is_constant(tmp_path, caplog, name, goes_on_from):
    base = small_config(tmp_path, schedule=WSD | {"name": name}, train={"steps": 10}, checkpoint={"every": 4})
    straight = change(base, "straight", train={"steps": 20}, schedule={"warmup_fraction": 0.1})
    train_on(base, straight)
    kept = {int(path.name[5:]) for path in folder_of(base).checkpoints.iterdir()}
    assert kept == {goes_on_from, 8, 10}
    longer = change(base, train={"steps": 20})
    refuse_foreign(folder_of(longer), longer)
    session = session_for(longer)
    with caplog.at_level("WARNING"):
        check_resumable(folder_of(longer), longer, session.fingerprint)
    said = f"train.steps=20: goes on from step {goes_on_from}, before the decay of the shorter run; "
    assert (said in caplog.text) == (goes_on_from < 10)
    train_on(session)
    assert [record["step"] for record in records(longer)] == list(range(1, 21))
    # The same numbers as the run that was meant to be so long, whose warm-up has as many steps.
    assert losses(longer) == losses(straight)
    kept = {int(path.name[5:]) for path in folder_of(longer).checkpoints.iterdir()}
    assert kept == ({10, 16, 20} if name == "wsd" else {16, 20})


@pytest.mark.all
def test_only_a_constant_rate_lets_a_run_be_longer(tmp_path):
    base = small_config(tmp_path, schedule=WSD, train={"steps": 10}, checkpoint={"every": 0})
    cosine = change(base, "cosine", schedule={"name": "cosine"})
    train_on(base, cosine)
    for config, reason in (
        (change(cosine, train={"steps": 20}), r"train.steps=10, now 20; .* checkpoint.resume="),
        (change(base, train={"steps": 20}, optimizer={"lr": 0.5}), r"optimizer.lr=0.01, now 0.5"),
        (change(base, train={"steps": 9}), r"train.steps=10, now 9"),
        # Its warm-up of 6 steps is not over at step 5.
        (change(base, train={"steps": 30}), r"train.steps=10, now 30"),
    ):
        with pytest.raises(ConfigError, match=reason):
            refuse_foreign(folder_of(config), config)


@pytest.mark.all
def test_a_refined_run_resumes_without_the_run_it_was_refined_from(tmp_path):
    first = small_config(tmp_path)
    train_on(first)
    again = change(first, "again", schedule={"name": "refined", "from_": first.output_dir, "norm": "l2"})
    norms = gradient_norms(again.schedule, folder_of(again))
    assert len(norms) == 6

    def session(config):
        found = session_for(config, norms=gradient_norms(config.schedule, folder_of(config)))
        keep_norms(found.norms, config.schedule, folder_of(config))
        return found

    train_on(session(again))
    shape = refine(norms, 6, power=-2)
    assert [record["lr"] for record in records(again)][1:] == pytest.approx(
        [0.01 * (0.1 + 0.9 * rate) for rate in shape[1:]]
    )
    resumed = as_it_was_at(again, 3, "resumed")
    shutil.rmtree(first.output_dir)
    train_on(session(resumed))
    assert losses(resumed) == losses(again)


def test_a_step_reads_on_where_the_one_before_ended(tmp_path):
    train = small_config(tmp_path, train={"batch_size": 12, "batch_warmup": (2, 6), "batch_warmup_steps": 5}).train
    assert unit(train) == 2
    read = [list(units(train, step)) for step in range(9)]
    assert [2 * len(each) for each in read] == [2, 2, 2, 6, 6, 12, 12, 12, 12]
    assert [index for each in read for index in each] == list(range(sum(map(len, read))))
    plain = change(small_config(tmp_path), train={"batch_size": 12}).train
    assert (unit(plain), units(plain, 7)) == (12, range(7, 8))


@pytest.mark.parametrize(
    ("train", "parallel", "said"),
    [
        (
            {"batch_warmup": (2, 3), "batch_warmup_steps": 4},
            2,
            "3 must be a multiple of parallel.data=2; use 4",
        ),
        ({"batch_warmup": (4,), "batch_warmup_steps": 4, "micro_batch_size": 3}, 1, "3; use train.micro_batch_size=1"),
        ({"batch_warmup": (2, 4), "batch_warmup_steps": 1}, 1, "more for each size, not train.batch_warmup_steps=1"),
        ({"batch_warmup_steps": 1}, 1, "train.batch_warmup=[]: needs a step or more"),
    ],
)
def test_sizes_of_a_warm_up_that_do_not_divide_are_one_line(tmp_path, train, parallel, said):
    config = small_config(tmp_path, train=train, parallel={"data": parallel}, runtime={"name": "ray"})
    with refused(said):
        check(config)


def test_a_batch_that_warms_up_is_refused_where_steps_decide_the_data(tmp_path):
    train = {"batch_warmup": (2, 4), "batch_warmup_steps": 4, "micro_batch_size": 1}
    check(small_config(tmp_path, train=train))
    for data in ({"lengths": ((0, 16),)}, {"path": "", "sources": ({"stdlib": None, "weight": [[0, 1]]},)}):
        with refused("train.batch_warmup=[2, 4]: data.lengths and weights that change count steps of one size"):
            check(small_config(tmp_path, train=train, data=data))


@pytest.mark.all
def test_a_batch_that_warms_up_reads_the_same_rows_in_every_layout(tmp_path):
    base = small_config(
        tmp_path,
        schedule={"name": "constant", "warmup_fraction": 0.0},
        train={"batch_warmup": (2, 4), "batch_warmup_steps": 4, "micro_batch_size": 2},
        parallel=grid(1, 1, 0),
        checkpoint={"every": 3},
    )
    small = change(base, "small", train={"batch_size": 2, "batch_warmup": (), "batch_warmup_steps": 0})
    others = [change(base, f"{case}", parallel=grid(*case)) for case in ((2, 1, 2), (1, 2, 1), (2, 1, 3))]
    cut = change(base, "cut", train={"segment_tokens": 24})
    train_on(base, small, cut, *others)
    assert [record["tokens"] for record in records(base)] == [32 * size for size in (2, 2, 4, 4, 8, 8)]
    assert records(base)[-1]["total_tokens"] == 32 * 28
    assert losses(base)[:2] == losses(small)[:2]
    for config in (cut, *others):
        assert losses(config) == pytest.approx(losses(base), rel=1e-5), config.output_dir
    resumed = as_it_was_at(base, 3, "resumed")
    train_on(resumed)
    assert losses(resumed) == losses(base)
    assert "batch_warmup" not in fingerprint(small)["train"]
