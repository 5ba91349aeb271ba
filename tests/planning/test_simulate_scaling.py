"""Simulated scaling: from a cluster file, and calibrated and compared on ranks of its own."""

import json

import pytest
import yaml

from seqtrain.planning.layout import CLUSTERS
from seqtrain.planning.simulate_scaling import main

SHIPPED = sorted(CLUSTERS.glob("*.yaml"))


@pytest.fixture
def simulated(tmp_path, capsys):
    """Runs the command; gives what it printed and its report."""

    def run(*arguments):
        assert main([*arguments, f"output_dir={tmp_path}"]) == 0
        assert (tmp_path / "simulate_scaling.png").read_bytes().startswith(b"\x89PNG")
        return capsys.readouterr().out, json.loads((tmp_path / "simulate_scaling.json").read_text())

    return run


@pytest.mark.parametrize("cluster", SHIPPED, ids=lambda path: path.stem)
def test_a_named_cluster_is_simulated_with_ranges(cluster, simulated):
    printed, report = simulated(f"cluster={cluster}", "ranks=[1,4,32]", "layers=2", "compute_ms=5", "samples=8")
    assert yaml.safe_load(cluster.read_text())["source"].split()[0] in printed
    points = {(point["scheme"], point["ranks"]): point for point in report["simulated"]}
    assert len(points) == 5 * 3
    for (_, ranks), point in points.items():
        low, middle, high = point["step_ms"]
        assert low < middle < high
        assert middle > 2 * 2 * 5 * (0.99 if ranks == 1 else 1.0)
        assert point["efficiency"][1] == pytest.approx(20 / middle, rel=0.01)
    assert points["auto, a barrier a layer", 32]["step_ms"][1] > points["auto", 32]["step_ms"][1]
    assert all("simulated" in line for line in printed.splitlines() if line.split()[-1].replace(".", "").isdigit())


@pytest.mark.all
def test_it_calibrates_and_compares_with_what_it_measures(simulated, tmp_path):
    settings = ("calibrate_ranks=2", "validate_ranks=[2,3]", "rounds=1", "layers=2", "tokens=64", "width=32", "heads=2")
    printed, report = simulated(*settings, "ranks=[2,8]", "samples=4", "state_kib=4", "head_width=16")
    assert "measured on 2 gloo ranks" in printed
    assert min(report["cluster"][key] for key in ("latency", "product", "forward")) > 0
    # A difference of two times, of which neighbours may leave nothing.
    assert report["cluster"]["backward"] >= 0
    rows = {(row["scheme"], row["ranks"]): row for row in report["comparisons"]}
    assert len(rows) == 7 * 2
    for (_, ranks), row in rows.items():
        assert row["held_out"] == (ranks == 3)
        assert row["measured_ms"] >= row["minimum_ms"] > 0
        assert row["simulated_ms"] > 0
    # What it measured serves later runs as a cluster file.
    again, _ = simulated(f"cluster={tmp_path / 'cluster.yaml'}", "ranks=[4]", "samples=2")
    assert "measured on 2 gloo ranks" in again


def test_strong_scaling_divides_the_compute(simulated):
    same = ("cluster=a100", "ranks=[4]", "compute_ms=50", "samples=2", "noise=0", "schemes=[auto]")
    _, weak = simulated(*same)
    _, strong = simulated(*same, "scaling=strong")
    of = [report["simulated"][0]["step_ms"][1] for report in (weak, strong)]
    assert of[0] == pytest.approx(4 * of[1], rel=0.02)
