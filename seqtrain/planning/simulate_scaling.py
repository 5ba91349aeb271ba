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

import os
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import Field

from seqtrain.benchmarks.ranks import measure_in_turn, on_first_ranks, on_ranks
from seqtrain.benchmarks.scan_methods import CHAINS, Setting, group_costs, map_shapes, step
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError
from seqtrain.kernels.affine import AffineShape
from seqtrain.mixers import MIXERS, LayerShape
from seqtrain.parallel.schedules.links import Cluster, Costs
from seqtrain.planning.calibrate import median_seconds
from seqtrain.planning.layout import ClusterFile, read_cluster
from seqtrain.planning.scaling import Noise, Scheme, Work, scan_seconds, simulate
from seqtrain.report import machine, new_figure, save_figure, show_table, write_results

# One line of a table, as the JSON has it.
Row = dict[str, Any]
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
    ranks: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    # Chains to simulate; "auto" is overlapped and lets the cost model choose.
    schemes: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "auto",
        "pipeline",
        "auto, a barrier a layer",
        "all_gather",
        "ring",
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
    validate_ranks: tuple[Annotated[int, Field(gt=1)], ...] = ()
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
    # Ranks over which both are divided; their parts are replicated beyond. 0, and where there are fewer: all ranks.
    shard: Annotated[int, Field(ge=0)] = 0
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
    """The costs of this group, and of a layer of the mixer, forward and backward, on its first rank alone."""
    costs = group_costs(group)
    layer = torch.full((2,), settings.compute_ms / 1e3, dtype=torch.float64)
    if not settings.compute_ms and group.rank() == 0:
        mixer_class = MIXERS.get(settings.mixer)
        mixer = mixer_class(mixer_class.Config(), LayerShape(settings.width, settings.heads))
        x = torch.randn(1, settings.tokens, settings.width, requires_grad=True)

        def forward() -> torch.Tensor:
            return mixer(x)[0].square().sum()

        once, both = (median_seconds(run, clock=time.perf_counter) for run in (forward, lambda: forward().backward()))
        layer = torch.tensor([once, max(0.0, both - once)], dtype=torch.float64)
    dist.broadcast(layer, group=group, group_src=0)
    forward_seconds, backward_seconds = layer.tolist()
    source = f"measured on {group.size()} gloo ranks: {machine()}"
    return ClusterFile(**asdict(costs), source=source, forward=forward_seconds, backward=backward_seconds)


def simulated(file: ClusterFile, settings: Settings) -> tuple[Cluster, Work]:
    """The file's links, changed as the settings say, and what a rank computes and sends in a step.

    `ConfigError` where nothing says how long a layer computes.
    """
    links = {"latency_add": settings.latency_add_ms / 1e3, "byte_factor": settings.byte_factor}
    own = settings.compute_ms / 1e3
    forward, backward = (own, own) if own else (file.forward, file.backward)
    if forward + backward == 0:
        raise ConfigError("compute_ms=0: the cluster file has no forward and backward; give compute_ms")
    transition, update = map_shapes(settings.form, settings.state_kib, settings.head_width)
    return file.links(node=settings.node, **links), Work(
        settings.layers,
        forward,
        backward,
        AffineShape.of(update, transition),
        ready=settings.ready,
        caller=file.caller,
        gradient_bytes=settings.gradient_mib * 2**20,
        parameter_bytes=settings.parameter_mib * 2**20,
    )


def validate_steps(settings: Settings, file: ClusterFile, calibrated_on: int, group: dist.ProcessGroup) -> list[Row]:
    """Whole steps measured over this group, next to what the calibration simulates.

    `held_out`: whether they are of a rank count that was not calibrated on.
    """
    group_costs(group)
    cluster, work = simulated(file, settings)
    setting = setting_of(settings, group, (work.forward + work.backward) / 2)
    runs = {name: partial(step, setting, settings.layers, chain) for name, chain in CHAINS.items()}
    times = measure_in_turn(group, runs, settings.rounds)
    # Sleeping takes a little longer than it was asked to.
    compute = median(times.pop("compute alone")) / 2 / settings.layers
    work = Work(settings.layers, compute, compute, work.shape, caller=file.caller)
    changed = settings.byte_factor != 1 or settings.latency_add_ms != 0
    return [
        {
            "scheme": name,
            "ranks": group.size(),
            "measured_ms": 1e3 * median(taken),
            "minimum_ms": 1e3 * min(taken),
            "simulated_ms": 1e3 * float(simulate(cluster, work, SCHEMES[name], ranks=group.size())[0]),
            "held_out": group.size() != calibrated_on or changed,
        }
        for name, taken in times.items()
    ]


def on_group(group: dist.ProcessGroup, settings: Settings, calibrate_ranks: int) -> tuple[ClusterFile, list[Row]]:
    """Calibration where there is no cluster file, then the comparisons; the same file on every rank."""
    files: list = [read_cluster(settings.cluster)] if settings.cluster else []
    if not files:
        caller = on_first_ranks(group, [1], lambda alone: [measure_caller(settings, alone)])
        files = on_first_ranks(group, [calibrate_ranks], lambda part: [calibrate(settings, part)]) or [None]
        if group.rank() == 0:
            files = [replace(files[0], caller=caller[0])]
        dist.broadcast_object_list(files, group=group, group_src=0)
    measured = partial(validate_steps, settings, files[0], 0 if settings.cluster else calibrate_ranks)
    return files[0], on_first_ranks(group, settings.validate_ranks, measured)


def project(settings: Settings, cluster: Cluster, work: Work) -> list[Row]:
    """Milliseconds of a step of every scheme at every rank count, and efficiency (compute alone over the step), each
    by quantiles.
    """
    noise = Noise(settings.noise, settings.slow_share, settings.slow_factor, settings.cost_noise)
    options: dict[str, int] = {name: getattr(settings, name) for name in ("replicas", "samples", "seed")}
    points = []
    for name in settings.schemes:
        for ranks in settings.ranks:
            share = 1 / ranks if settings.scaling == "strong" else 1.0
            own = replace(work, forward=work.forward * share, backward=work.backward * share)
            # Of fewer ranks, or a number that it doesn't divide, there are no replicas.
            shard = settings.shard if settings.shard and ranks * settings.replicas % settings.shard == 0 else 0
            seconds = simulate(cluster, own, SCHEMES[name], noise, ranks=ranks, shard=shard, **options)
            plan = SCHEMES[name].plan(cluster, own, ranks) if ranks > 1 else None
            point: Row = {"scheme": name, "ranks": ranks, "plan": f"{plan.name} {plan.blocks}" if plan else "-"}
            point["step_ms"] = [1e3 * float(q) for q in np.quantile(seconds, QUANTILES)]
            point["efficiency"] = [float(q) for q in np.quantile(own.compute / seconds, QUANTILES)]
            points.append(point)
    return points


def published_check() -> list[tuple[int, float, float]]:
    """`(GPUs, published ms, simulated ms)` of ZeCO's table: the cost of a block fitted at its first row alone."""
    transition, update = map_shapes("channel", 2048, 128)
    work = Work(1, 0.0, 0.0, AffineShape.of(update, transition))
    byte = PUBLISHED_STATE_SECONDS / (work.shape.state_numbers * work.item)

    def milliseconds(block: float, gpus: int) -> float:
        costs = Costs(latency=block, overhead=block, byte=byte, product=0.0)
        return 1e3 * scan_seconds(Cluster(costs, costs), work, Scheme("pipeline"), ranks=gpus)

    first, (low, high) = min(PUBLISHED), (0.0, 1e-4)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if milliseconds(middle, first) > PUBLISHED[first] else (middle, high)
    return [(gpus, ms, milliseconds(low, gpus)) for gpus, ms in PUBLISHED.items()]


def print_report(points: list[Row], comparisons: list[Row], published: list[tuple[int, float, float]]) -> None:
    rows = []
    for row in comparisons:
        times = (f"{row[f'{what}_ms']:.1f}" for what in ("measured", "minimum", "simulated"))
        note = "" if row["held_out"] else "(costs measured on so many ranks)"
        ratio = f"{row['simulated_ms'] / row['measured_ms']:.3f}"
        rows.append((row["scheme"], str(row["ranks"]), *times, ratio, note))
    if comparisons:
        show_table(("whole steps, ms", "ranks", "measured", "minimum", "simulated", "simulated/measured", ""), rows)
    for gpus, ms, own in published:
        note = "one cost fitted to this row" if gpus == min(PUBLISHED) else "held out"
        print(f"ZeCO's All-Scan over {gpus} GPUs: {ms:g} ms published, {own:.3f} ms simulated ({note})")
    titles = [f"{what} {quantile:.0%}" for what in ("ms", "efficiency") for quantile in QUANTILES]
    rows = []
    for point in points:
        quantiles = *(f"{ms:.1f}" for ms in point["step_ms"]), *(f"{share:.3f}" for share in point["efficiency"])
        rows.append((f"simulated {point['scheme']}", str(point["ranks"]), point["plan"], *quantiles))
    show_table(("steps", "ranks", "plan", *titles), rows)


def draw(points: list[Row], path: Path, title: str) -> None:
    """Efficiency over ranks: the median, and a band from the lowest to the highest quantile."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    names = list(dict.fromkeys(point["scheme"] for point in points))
    for index, name in enumerate(names):
        own = [(point["ranks"], *point["efficiency"]) for point in points if point["scheme"] == name]
        ranks, low, middle, high = zip(*own, strict=True)
        # Of lines that lie on each other, the first ones are the widest.
        axes.plot(ranks, middle, marker="o", markersize=3, linewidth=1.5 * (len(names) - index), label=name, alpha=0.8)
        axes.fill_between(ranks, low, high, alpha=0.25)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylim=(0, 1.05), xlabel="ranks of one sequence", ylabel="compute alone / step, simulated", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=150)


def report(settings: Settings, file: ClusterFile, comparisons: list[Row]) -> None:
    """Simulates, prints, draws and writes what came out."""
    cluster, work = simulated(file, settings)
    layer = f"per layer: {1e3 * work.forward:.2f} ms forward, {1e3 * work.backward:.2f} backward"
    print(file.source, cluster, layer, sep="\n")
    points, published = project(settings, cluster, work), published_check()
    print_report(points, comparisons, published)
    folder = Path(settings.output_dir)
    path, content = folder / "simulate_scaling.json", asdict(file)
    results: Row = {"comparisons": comparisons, "published": published, "quantiles": QUANTILES, "simulated": points}
    write_results(path, settings, cluster=content, **results)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shown = f"{settings.layers} layers, {settings.state_kib:g} KiB {settings.form}, {settings.scaling} scaling"
    draw(points, path.with_suffix(".png"), f"simulated: {shown}")
    print(f"{path}, {path.with_suffix('.png')}")


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    for name in settings.schemes:
        if name not in SCHEMES:
            raise ConfigError(f"schemes: {name!r} is unknown. Known: {', '.join(SCHEMES)}")
    calibrate_ranks = settings.calibrate_ranks or int(os.environ.get("WORLD_SIZE", "4"))
    if settings.cluster and not settings.validate_ranks:
        report(settings, read_cluster(settings.cluster), [])
        return 0
    ranks = max([*settings.validate_ranks, 0 if settings.cluster else calibrate_ranks])
    outcome = on_ranks(ranks, on_group, settings, calibrate_ranks)
    if outcome is not None:
        report(settings, *outcome)
    return 0
