"""Comparing runs: same losses or not is the exit status; figures and settings that differ are the table."""

import json

import yaml

from tests.command_cases import run_command


def write_run(folder, losses, *, lr=0.001, speed=100.0):
    folder.mkdir(parents=True)
    config = {"optimizer": {"lr": lr, "betas": [0.9, 0.95]}, "seed": 0, "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": speed if step > 1 else 1.0}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps({"peak_memory_bytes": 3 * 2**20, "held_out_bits_per_byte": 2.5}))
    return folder


def write_profile(folder, losses):
    write_run(folder / "run", losses)
    part = {"kind": "gla", "layer": 0, "seconds": 0.25, "share": 0.5}
    report = {
        "tokens_per_second": {"median": 400.0},
        "memory": [{"peak_bytes": 2**20}, {"peak_bytes": 5 * 2**20}],
        "parts": [part | {"phase": phase} for phase in ("forward", "backward")],
        "config": {"optimizer": {"lr": 0.001, "betas": [0.9, 0.95]}, "seed": 1},
    }
    (folder / "profile.json").write_text(json.dumps(report))
    return folder


def compare(folder, *runs, **settings):
    """The command on these runs: what it gave, and its report."""
    words = [f"runs=[{','.join(map(str, runs))}]", *(f"{key}={value}" for key, value in settings.items())]
    done = run_command("compare", *words, f"output_dir={folder / 'out'}")
    assert (folder / "out" / "compare_runs.png").read_bytes().startswith(b"\x89PNG"), done.err
    return done, json.loads((folder / "out" / "compare_runs.json").read_text())


def test_the_same_losses_bit_for_bit(tmp_path):
    runs = [write_run(tmp_path / f"{speed}", [3.0, 0.1 + 0.2, None], speed=speed) for speed in (100.0, 150.0)]
    done, report = compare(tmp_path, *runs)
    assert done.status == 0, done.err
    assert "the same losses at all 3 steps, bit for bit" in done.out
    assert report["same"]
    assert report["settings"] == {}
    assert report["losses"][0]["loss"] == report["losses"][0]["first_step"] == 0
    figures = report["figures"]
    # Without the first step, which warms up.
    assert figures["tokens/s"] == [100.0, 150.0]
    assert figures["tokens/s over the first's"] == [1.0, 1.5]
    assert figures["peak MiB of a rank"] == [3.0, 3.0]
    assert figures["steps"] == [3, 3]


def test_the_tolerance_decides_and_the_first_step_is_named(tmp_path):
    first = write_run(tmp_path / "a", [3.0, 2.0, 1.0])
    near = write_profile(tmp_path / "near", [3.0, 2.0 + 1e-6, 1.5])
    short = write_run(tmp_path / "c", [3.0, 2.0], lr=0.01)
    done, report = compare(tmp_path, first, near, short, tolerance="1e-5")
    assert done.status == 1
    assert "at most 0.5 apart over 3 steps, differing first at step 3" in done.out
    assert "LOSSES DIFFER: at most 0 apart over 2 steps, 1 step exists in only one run" in done.out
    assert [one["same"] for one in report["losses"]] == [False, False]
    assert [one["first_step"] for one in report["losses"]] == [3, 0]
    # A profile tells of itself, and has a run inside.
    assert report["figures"]["tokens/s"] == [100.0, 400.0, 100.0]
    assert report["figures"]["peak MiB of a rank"] == [3.0, 5.0, 3.0]
    assert report["figures"]["ms of gla"] == [None, 500.0, None]
    assert report["settings"] == {"optimizer.lr": ["0.001", "0.001", "0.01"], "seed": ["0", "1", "0"]}


def test_a_loss_that_was_not_finite_differs_from_a_number(tmp_path):
    runs = [write_run(tmp_path / f"{last}", [3.0, last]) for last in (None, 2.0)]
    done, report = compare(tmp_path, *runs, tolerance=1000)
    assert done.status == 1
    assert report["losses"][0]["first_step"] == 2
