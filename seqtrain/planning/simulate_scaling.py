"""Simulates training steps with one sequence over up to 1,024 ranks; every time it prints is simulated or says not.

    python tools/simulate_scaling.py                                  # calibrated here, on four ranks of its own
    python tools/simulate_scaling.py cluster=h100 layers=24 node=8 noise=0.05 slow_share=0.01 \
        slow_factor=1.3 schemes=[auto,tree,all_gather,ring]
    torchrun --nproc-per-node 8 tools/simulate_scaling.py calibrate_ranks=4 validate_ranks=[2,4,8] compute_ms=22

Latency, overhead and seconds per byte are measured on `calibrate_ranks` ranks, a layer's compute on one, unless
`cluster` gives them: a file, or the name of a shipped one. With `validate_ranks`, whole steps are measured too and
compared with what was simulated from the calibration alone. `output_dir` gets `simulate_scaling.json`, `cluster.yaml`
(the calibration, for other runs) and `simulate_scaling.png`, efficiency over rank counts with the range that noise and
uncertain costs make.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import Field

from seqtrain.benchmarks.ranks import measure_in_turn, on_first_ranks, on_ranks
from seqtrain.benchmarks.scan_layers import CHAINS, step
from seqtrain.benchmarks.scan_methods import CPU, Setting, map_shapes
from seqtrain.benchmarks.scan_pictures import draw_efficiency
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.kernels.affine import AffineShape
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.parallel.cost import costs_of
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.schedules.links import Cluster, Costs
from seqtrain.planning.calibrate import median_seconds
from seqtrain.planning.cluster import ClusterFile, read_cluster
from seqtrain.planning.scaling import Noise, Scheme, Work, scan_seconds, simulate
from seqtrain.report import machine, show_table, write_json

QUANTILES = (0.1, 0.5, 0.9)
# ZeCO (arXiv 2507.01004), its own table: milliseconds of one All-Scan over so many GPUs.
PUBLISHED = {8: 0.226, 256: 2.165}
PUBLISHED_STATE_SECONDS = 74e-6  # one state on their link, by a fit of that table

SCHEMES = {name: scheme for name, scheme in CHAINS.items() if scheme is not None}

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Settings:
    # Rank counts to simulate.
    ranks: Annotated[list[Positive], Field(min_length=1)] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    )
    # Chains to simulate; "auto" is overlapped and lets the cost model choose.
    schemes: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["auto", "pipeline", "auto, a barrier a layer", "all_gather", "ring"]
    )
    # weak: tokens per rank stay the same; strong: tokens in all, so that compute is divided by the ranks.
    scaling: Literal["weak", "strong"] = "weak"
    # A shipped cluster's name, or a YAML file with latency, overhead, byte, product (seconds), optionally node,
    # between_latency, between_overhead, between_byte, forward, backward (seconds per layer), caller (seconds per scan)
    # and source; empty: measured here.
    cluster: str = ""
    # Ranks the costs are measured on; 0: all of a launcher's, or 4.
    calibrate_ranks: Annotated[int, Field(ge=0)] = 0
    # Rank counts whose steps are measured and compared; none by default.
    validate_ranks: list[Annotated[int, Field(gt=1)]] = field(default_factory=list)
    # Rounds of each measured step.
    rounds: Positive = 5
    # A known change of the links since `cluster` was measured: factor of the seconds per byte, milliseconds of latency.
    byte_factor: Annotated[float, Field(gt=0)] = 1.0
    latency_add_ms: float = 0.0
    # Layers, one scan each in each direction.
    layers: Positive = 8
    # A layer's compute in one direction, ms; 0: of the cluster file, or measured: a mixer of this name, width and heads
    # on this many tokens.
    compute_ms: Scale = 0.0
    mixer: str = "gated_delta_net"
    tokens: Positive = 1024
    width: Positive = 256
    heads: Positive = 4
    # Share of a layer's time before its update is known.
    ready: Share = 0.0
    # A layer's float32 state: KiB, head width, and what its transition is.
    state_kib: Annotated[float, Field(gt=0)] = 128.0
    head_width: Positive = 64
    form: Literal["none", "head", "channel", "dense"] = "dense"
    # Ranks per node, 0: as in the cluster file, or one node.
    node: Annotated[int, Field(ge=0)] = 0
    # Sequences in parallel (data parallelism): so many times the ranks.
    replicas: Positive = 1
    # Gradients reduced at the end of a step, and parameters of a layer gathered before it (ZeRO-3), MiB; 0: none.
    gradient_mib: Scale = 0.0
    parameter_mib: Scale = 0.0
    # Relative deviation of a layer's compute time, and of latency, overhead and seconds per byte.
    noise: Scale = 0.03
    cost_noise: Scale = 0.1
    # Share of slow ranks, and how many times as long they take.
    slow_share: Share = 0.0
    slow_factor: Annotated[float, Field(ge=1)] = 1.0
    # Simulated steps of every point, and the seed.
    samples: Positive = 32
    seed: int = 0
    # Folder for the results.
    output_dir: str = "outputs/simulate_scaling"


@dataclass(frozen=True)
class Point:
    """Efficiency (compute alone over the step) and milliseconds of a step at one rank count, by quantiles."""

    scheme: str
    ranks: int
    plan: str
    step_ms: tuple[float, ...]
    efficiency: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """A measured step and the simulated one; `held_out`: of a rank count that was not calibrated on."""

    scheme: str
    ranks: int
    measured_ms: float
    minimum_ms: float
    simulated_ms: float
    held_out: bool


def measure_layer(settings: Settings) -> tuple[float, float]:
    """Median seconds of the mixer's forward and backward pass on one rank's tokens, on this machine."""
    mixer_class = MIXERS.get(settings.mixer)
    mixer = mixer_class(mixer_class.Config(), LayerShape(settings.width, settings.heads))
    x = torch.randn(1, settings.tokens, settings.width, requires_grad=True)

    def forward() -> torch.Tensor:
        return mixer(x)[0].square().sum()

    once, both = (median_seconds(run, clock=time.perf_counter) for run in (forward, lambda: forward().backward()))
    return once, max(0.0, both - once)


def setting_of(settings: Settings, group: dist.ProcessGroup, compute: float) -> Setting:
    """Random states of these settings, and `compute` seconds per layer."""
    form, kib, width = settings.form, settings.state_kib, settings.head_width
    return Setting.random(group, form=form, kib=kib, width=width, tokens=settings.tokens, compute=compute)


def measure_caller(settings: Settings, alone: dist.ProcessGroup) -> float:
    """Median seconds a scan takes of its caller, from a step that computes and sends nothing on a group of one rank."""
    setting = setting_of(settings, alone, 0.0)
    with_scans, without = (
        median_seconds(step(setting, settings.layers, CHAINS[name]), clock=time.perf_counter)
        for name in ("auto", "compute alone")
    )
    return max(0.0, with_scans - without) / (2 * settings.layers)


def calibrate(settings: Settings, group: dist.ProcessGroup) -> ClusterFile:
    """The costs of this group, and of a layer on its first rank alone."""
    costs = costs_of(engine_of(group.group_name), CPU)
    forward = backward = settings.compute_ms / 1e3
    if not settings.compute_ms and group.rank() == 0:
        forward, backward = measure_layer(settings)
    layer = torch.tensor([forward, backward], dtype=torch.float64)
    dist.broadcast(layer, group=group, group_src=0)
    forward, backward = layer.tolist()
    source = f"measured on {group.size()} gloo ranks: {machine()}"
    return ClusterFile(**asdict(costs), source=source, forward=forward, backward=backward)


def cluster_of(file: ClusterFile, settings: Settings) -> Cluster:
    """The links to simulate: the file's, changed as the settings say."""
    return file.links(node=settings.node, latency_add=settings.latency_add_ms / 1e3, byte_factor=settings.byte_factor)


def shape_of(form: str, kib: float, width: int) -> AffineShape:
    transition, update = map_shapes(form, kib, width)
    return AffineShape.of(update, transition)


def work_of(file: ClusterFile, settings: Settings) -> Work:
    """What a rank computes and sends in a step. `ConfigError` where nothing says how long a layer computes."""
    forward, backward = settings.compute_ms / 1e3, settings.compute_ms / 1e3
    if not settings.compute_ms:
        forward, backward = file.forward, file.backward
    if forward + backward == 0:
        raise ConfigError("compute_ms=0: the cluster file has no forward and backward; give compute_ms")
    return Work(
        settings.layers,
        forward,
        backward,
        shape_of(settings.form, settings.state_kib, settings.head_width),
        ready=settings.ready,
        caller=file.caller,
        gradient_bytes=settings.gradient_mib * 2**20,
        parameter_bytes=settings.parameter_mib * 2**20,
    )


def validate_steps(
    settings: Settings, file: ClusterFile, calibrated_on: int, group: dist.ProcessGroup
) -> list[Comparison]:
    """Whole steps measured over this group, next to what the calibration simulates."""
    costs_of(engine_of(group.group_name), CPU)
    cluster, work = cluster_of(file, settings), work_of(file, settings)
    setting = setting_of(settings, group, (work.forward + work.backward) / 2)
    runs = {name: partial(step, setting, settings.layers, chain) for name, chain in CHAINS.items()}
    times = measure_in_turn(group, runs, settings.rounds)
    # Sleeping takes a little longer than it was asked to.
    slept = statistics.median(times.pop("compute alone"))
    compute = slept / 2 / settings.layers
    work = Work(settings.layers, compute, compute, work.shape, caller=file.caller)
    rows = []
    for name, taken in times.items():
        simulated = simulate(cluster, work, SCHEMES[name], ranks=group.size())
        measured, least = 1e3 * statistics.median(taken), 1e3 * min(taken)
        held_out = group.size() != calibrated_on or settings.byte_factor != 1 or settings.latency_add_ms != 0
        rows.append(Comparison(name, group.size(), measured, least, 1e3 * float(simulated[0]), held_out))
    return rows


def on_group(group: dist.ProcessGroup, settings: Settings, calibrate_ranks: int) -> tuple:
    """Calibration where there is no cluster file, then the comparisons; the same file on every rank."""
    files: list = [read_cluster(settings.cluster)] if settings.cluster else []
    if not files:
        caller = on_first_ranks(group, [1], lambda alone: [measure_caller(settings, alone)])
        files = on_first_ranks(group, [calibrate_ranks], lambda part: [calibrate(settings, part)]) or [None]
        if group.rank() == 0:
            files = [dataclasses.replace(files[0], caller=caller[0])]
        dist.broadcast_object_list(files, group=group, group_src=0)
    calibrated_on = 0 if settings.cluster else calibrate_ranks
    measured = partial(validate_steps, settings, files[0], calibrated_on)
    return files[0], on_first_ranks(group, settings.validate_ranks, measured)


def project(settings: Settings, cluster: Cluster, work: Work) -> list[Point]:
    """Every scheme at every rank count."""
    noise = Noise(settings.noise, settings.slow_share, settings.slow_factor, settings.cost_noise)
    points = []
    for name in settings.schemes:
        scheme = SCHEMES[name]
        for ranks in settings.ranks:
            share = 1 / ranks if settings.scaling == "strong" else 1.0
            own = dataclasses.replace(work, forward=work.forward * share, backward=work.backward * share)
            options = {"ranks": ranks, "replicas": settings.replicas, "samples": settings.samples}
            seconds = simulate(cluster, own, scheme, noise, **options, seed=settings.seed)
            plan = scheme.plan(cluster, own, ranks) if ranks > 1 else None
            times = tuple(1e3 * float(q) for q in np.quantile(seconds, QUANTILES))
            efficiency = tuple(float(q) for q in np.quantile(own.compute / seconds, QUANTILES))
            points.append(Point(name, ranks, f"{plan.name} {plan.blocks}" if plan else "-", times, efficiency))
    return points


def published_check() -> list[tuple[int, float, float]]:
    """`(GPUs, published ms, simulated ms)` of ZeCO's table: the cost of a block fitted at its first row alone."""
    work = Work(1, 0.0, 0.0, shape_of("channel", 2048, 128))
    byte = PUBLISHED_STATE_SECONDS / (work.shape.state_numbers * work.item)

    def simulated(block: float, gpus: int) -> float:
        costs = Costs(latency=block, overhead=block, byte=byte, product=0.0)
        return 1e3 * scan_seconds(Cluster(costs, costs), work, Scheme("pipeline"), ranks=gpus)

    first, (low, high) = min(PUBLISHED), (0.0, 1e-4)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if simulated(middle, first) > PUBLISHED[first] else (middle, high)
    return [(gpus, ms, simulated(low, gpus)) for gpus, ms in PUBLISHED.items()]


COMPARISON_COLUMNS = ("whole steps, ms", "ranks", "measured", "minimum", "simulated", "simulated/measured", "")


def print_report(points: Sequence[Point], comparisons: Sequence[Comparison], published: Sequence[tuple]) -> None:
    if comparisons:
        show_table(COMPARISON_COLUMNS, [comparison_cells(row) for row in comparisons])
    for gpus, ms, simulated in published:
        note = "one cost fitted to this row" if gpus == min(PUBLISHED) else "held out"
        print(f"ZeCO's All-Scan over {gpus} GPUs: {ms:g} ms published, {simulated:.3f} ms simulated ({note})")
    quantiles = [f"{quantile:.0%}" for quantile in QUANTILES]
    columns = ("steps", "ranks", "plan", *(f"ms {q}" for q in quantiles), *(f"efficiency {q}" for q in quantiles))
    show_table(columns, [point_cells(point) for point in points])


def comparison_cells(row: Comparison) -> tuple[str, ...]:
    times = (row.measured_ms, row.minimum_ms, row.simulated_ms)
    note = "" if row.held_out else "(costs measured on so many ranks)"
    ratio = f"{row.simulated_ms / row.measured_ms:.3f}"
    return (row.scheme, str(row.ranks), *(f"{time:.1f}" for time in times), ratio, note)


def point_cells(p: Point) -> tuple[str, ...]:
    times, shares = [f"{q:.1f}" for q in p.step_ms], [f"{q:.3f}" for q in p.efficiency]
    return (f"simulated {p.scheme}", str(p.ranks), p.plan, *times, *shares)


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    for name in settings.schemes:
        if name not in SCHEMES:
            raise ConfigError(f"schemes: {name!r} is unknown. Known: {', '.join(SCHEMES)}")
    calibrate_ranks = settings.calibrate_ranks or int(os.environ.get("WORLD_SIZE", "4"))
    if settings.cluster and not settings.validate_ranks:
        outcome: tuple | None = (read_cluster(settings.cluster), [])
    else:
        ranks = max([*settings.validate_ranks, 0 if settings.cluster else calibrate_ranks])
        outcome = on_ranks(ranks, on_group, settings, calibrate_ranks)
    if outcome is not None:
        report(settings, *outcome)
    return 0


def report(settings: Settings, file: ClusterFile, comparisons: list[Comparison]) -> None:
    """Simulates, prints, draws and writes what came out."""
    cluster, work = cluster_of(file, settings), work_of(file, settings)
    print(
        f"{file.source}\n{cluster}\nper layer: {1e3 * work.forward:.2f} ms forward, {1e3 * work.backward:.2f} backward"
    )
    points, published = project(settings, cluster, work), published_check()
    print_report(points, comparisons, published)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(asdict(file), sort_keys=False))
    content = {
        "machine": machine(),
        "settings": asdict(settings),
        "cluster": asdict(file),
        "comparisons": [asdict(row) for row in comparisons],
        "published": published,
        "quantiles": QUANTILES,
        "simulated": [asdict(point) for point in points],
    }
    write_json(folder / "simulate_scaling.json", content)
    title = (
        f"simulated: {settings.layers} layers, {settings.state_kib:g} KiB {settings.form}, {settings.scaling} scaling"
    )
    draw_efficiency(points, folder / "simulate_scaling.png", title)
    print(f"{folder / 'simulate_scaling.json'}, {folder / 'simulate_scaling.png'}")
