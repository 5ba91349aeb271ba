"""Measures All-Scan: every schedule, and the patterns other systems use, on the same states over the same ranks.

    torchrun --nproc-per-node 4 tools/bench_all_scan.py
    torchrun --nproc-per-node 4 tools/bench_all_scan.py form=head state_kib=[16,128,1024] compute_ms=20

Any launcher will do that starts one copy a rank with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Every round times
each method once, from a common start to the last rank's end. Rank 0 prints medians and minima beside the cost model's
time, and leaves `all_scan.json` and `all_scan.png` in `output_dir`.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.distributed as dist
from _settings import machine, read_settings
from pydantic import Field
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel import Algorithm, flush_scans, open_all_scan
from seqtrain.parallel.cost import Costs, costs_of, payload_bytes, plan_scan, seconds
from seqtrain.parallel.engine import engine_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMS = {
    "none": lambda heads, width: None,
    "head": lambda heads, width: (1, heads),
    "channel": lambda heads, width: (1, heads, width),
    "dense": lambda heads, width: (1, heads, width, width),
}
CPU = torch.device("cpu")
WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    # Sizes of the float32 state, KiB.
    state_kib: Annotated[list[float], Field(min_length=1)] = field(default_factory=lambda: [128.0])
    # Key and value width; the number of heads follows from the size.
    width: Annotated[int, Field(gt=0)] = 64
    # What one factor of the transition belongs to; dense: a matrix a head.
    form: Literal["none", "head", "channel", "dense"] = "dense"
    # Tokens a rank, for the all-to-all of activations.
    tokens: Annotated[int, Field(gt=0)] = 256
    # Local work a rank, milliseconds; slept where a method can compute without the incoming state.
    compute_ms: Annotated[float, Field(ge=0)] = 0.0
    # Rounds that count; two more come before them.
    rounds: Annotated[int, Field(gt=0)] = 15
    # One-way latency of a link in milliseconds, for the limit; 0: as measured.
    latency_ms: Annotated[float, Field(ge=0)] = 0.0
    # Rate of a link in Mbit/s, for the limit; 0: as measured.
    rate_mbit: Annotated[float, Field(ge=0)] = 0.0
    # Methods whose names start so; none: all.
    only: list[str] = field(default_factory=list)
    # Folder for the results.
    output_dir: str = "outputs/bench_all_scan"


@dataclass(frozen=True)
class Setting:
    """What every method is given: this rank's map, and its stand-in for local work in seconds."""

    group: dist.ProcessGroup
    transition: Tensor | None
    update: Tensor
    tokens: int
    compute: float

    @property
    def shape(self) -> AffineShape:
        return AffineShape.of(self.update.shape, None if self.transition is None else self.transition.shape)

    @property
    def map(self) -> AffineMap:
        return AffineMap(self.shape.transition(self.transition), self.shape.state(self.update))


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, bytes those the busiest rank receives."""

    state_kib: float
    form: str
    method: str
    payload_bytes: int
    median_ms: float
    minimum_ms: float
    model_ms: float | None
    limit_ratio: float


# A method prepares what may be ready before the clock starts, and returns what is timed.
Method = Callable[[Setting], Callable[[], object]]


def scan(setting: Setting, algorithm: Algorithm, blocks: int | None) -> Callable[[], object]:
    """All-Scan itself: receives are posted before the clock starts, as they are while a rank computes its update."""
    transition_shape = None if setting.transition is None else setting.transition.shape
    early = open_all_scan(
        transition_shape,
        setting.update.shape,
        dtype=setting.update.dtype,
        device=CPU,
        group=setting.group,
        algorithm=algorithm,
        blocks=blocks,
    )

    def timed() -> object:
        under_way = early.start(setting.transition, setting.update)
        time.sleep(setting.compute)
        return under_way.wait()

    return timed


def gathered(setting: Setting) -> Callable[[], object]:
    """LASP-2, flash-linear-attention: an all-gather of updates and transitions, folded by every rank."""
    own = setting.map
    packed = torch.cat([part.reshape(-1) for part in (own.update, own.transition) if part is not None])
    ranks, rank = setting.group.size(), setting.group.rank()
    everyone = [torch.empty_like(packed) for _ in range(ranks)]

    def timed() -> object:
        work = dist.all_gather(everyone, packed, group=setting.group, async_op=True)
        time.sleep(setting.compute)
        assert work is not None, "this rank is in the group"
        work.wait()
        state = torch.zeros_like(own.update)
        for other in everyone[:rank]:
            update, transition = other[: state.numel()], other[state.numel() :]
            theirs = AffineMap(
                None if own.transition is None else setting.shape.transition(transition), setting.shape.state(update)
            )
            state = theirs.apply(state)
        return own.apply(state)

    return timed


def ring(setting: Setting) -> Callable[[], object]:
    """LASP: a chain of blocking receives and sends, local work on the chain."""
    own, rank, last = setting.map, setting.group.rank(), setting.group.size() - 1

    def timed() -> object:
        state = torch.zeros_like(own.update)
        if rank > 0:
            dist.recv(state, group=setting.group, group_src=rank - 1)
        time.sleep(setting.compute)
        out = own.apply(state)
        if rank < last:
            dist.send(out, group=setting.group, group_dst=rank + 1)
        return out

    return timed


def swapped(setting: Setting) -> Callable[[], object]:
    """Ulysses: q, k, v of a rank's tokens go to the ranks of their heads, outputs come back; heads must divide."""
    _, heads, width, values = setting.update.shape
    ranks = setting.group.size()
    going = torch.zeros(ranks, setting.tokens, heads // ranks, 2 * width + values)
    coming = torch.zeros(ranks, setting.tokens, heads // ranks, values)

    def timed() -> object:
        arrived, back = torch.empty_like(going), torch.empty_like(coming)
        dist.all_to_all_single(arrived, going, group=setting.group)
        time.sleep(setting.compute)
        dist.all_to_all_single(back, coming, group=setting.group)
        return back

    return timed


def methods(setting: Setting) -> dict[str, tuple[Method, int, float | None]]:
    """By name: the method, the bytes its busiest rank receives, and the model's seconds where there is a model."""
    engine = engine_of(setting.group.group_name)
    costs = costs_of(engine, CPU)
    ranks, shape, dtype = setting.group.size(), setting.shape, setting.update.dtype
    wanted: list[tuple[str, Algorithm, int | None]] = [("auto", "auto", None)]
    wanted += [(f"pipeline {blocks}", "pipeline", blocks) for blocks in (1, 2, 4, 8, 16, 32, 64)]
    wanted += [("tree", "tree", None), ("all_gather", "all_gather", None), ("ring", "ring", None)]
    found: dict[str, tuple[Method, int, float | None]] = {}
    for name, algorithm, blocks in wanted:
        plan = plan_scan(engine, shape, dtype, CPU, algorithm, blocks)
        payload = max(payload_bytes(shape, plan, ranks, dtype.itemsize))
        expected = seconds(costs, shape, plan, ranks, dtype.itemsize) + setting.compute * (
            ranks if plan.blocking else 0
        )
        label = f"auto = {plan.schedule} {plan.blocks}" if name == "auto" else name
        found[label] = (partial(scan, algorithm=algorithm, blocks=blocks), payload, max(expected, setting.compute))
    item = dtype.itemsize
    everything = (ranks - 1) * (shape.state_numbers + shape.transition_numbers) * item
    found["their all-gather"] = (gathered, everything, None)
    found["their ring"] = (ring, shape.state_numbers * item, None)
    _, heads, width, values = setting.update.shape
    if heads % ranks == 0:
        activations = setting.tokens * heads * (2 * width + 2 * values) * item
        found[f"their all-to-all, {setting.tokens} tokens"] = (swapped, activations * (ranks - 1) // ranks, None)
    return found


def makespan(group: dist.ProcessGroup, timed: Callable[[], object], shared_clock: bool) -> float:
    """Seconds from a start all ranks agree on to the end of the last rank, on every rank."""
    start = torch.tensor([time.clock_gettime(time.CLOCK_MONOTONIC) + 0.05], dtype=torch.float64)
    dist.broadcast(start, group=group, group_src=0)
    if shared_clock:
        # Everyone begins at one instant of the machine's clock, and not whenever a barrier lets it go.
        time.sleep(max(0.0, start.item() - time.clock_gettime(time.CLOCK_MONOTONIC)))
        begin = start.item()
    else:
        dist.barrier(group=group)
        begin = time.clock_gettime(time.CLOCK_MONOTONIC)
    timed()
    taken = torch.tensor([time.clock_gettime(time.CLOCK_MONOTONIC) - begin], dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)
    return taken.item()


def wire_bytes(setting: Setting, scans: int = 20) -> tuple[float, float] | None:
    """(bytes received and sent a scan, per rank, worst rank) by the interface's counters, forward and backward scans
    alike; None where GLOO_SOCKET_IFNAME names no interface."""
    folder = Path("/sys/class/net") / os.environ.get("GLOO_SOCKET_IFNAME", "none") / "statistics"
    if not folder.is_dir():
        return None

    def counters() -> Tensor:
        time.sleep(0.5)  # nothing else may be under way
        names = ("rx_bytes", "tx_bytes")
        return torch.tensor([int((folder / name).read_text()) for name in names], dtype=torch.float64)

    update = setting.update.clone().requires_grad_()
    dist.barrier(group=setting.group)
    before = counters()
    for _ in range(scans // 2):
        under_way = open_all_scan(
            None, update.shape, dtype=update.dtype, device=CPU, group=setting.group, algorithm="pipeline"
        ).start(None, update)
        under_way.wait()[0].sum().backward()
    flush_scans(setting.group)
    used = (counters() - before) / scans
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=setting.group)
    received, sent = used.tolist()
    return received, sent


def same_clock(group: dist.ProcessGroup) -> bool:
    """Whether all ranks run under one kernel, whose monotonic clock they share."""
    boots: list[str | None] = [None] * group.size()
    dist.all_gather_object(boots, Path("/proc/sys/kernel/random/boot_id").read_text(), group=group)
    return len(set(boots)) == 1


def measure_state(settings: Settings, group: dist.ProcessGroup, kib: float, shared_clock: bool) -> list[Row]:
    """All methods for one size of state."""
    heads = max(1, round(kib * 1024 / 4 / settings.width**2))
    generator = torch.Generator().manual_seed(group.rank())
    form = FORMS[settings.form](heads, settings.width)
    transition = None if form is None else torch.rand(form, generator=generator) / settings.width
    update = torch.randn(1, heads, settings.width, settings.width, generator=generator)
    setting = Setting(group, transition, update, settings.tokens, settings.compute_ms / 1e3)
    limit = physical_limit(settings, costs_of(engine_of(group.group_name), CPU), group.size(), update.nbytes)
    found = {
        name: method
        for name, method in methods(setting).items()
        if not settings.only or any(name.startswith(wanted) for wanted in settings.only)
    }
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(WARM_UP + settings.rounds):
        for name, (method, _, _) in found.items():
            times[name].append(makespan(group, method(setting), shared_clock))
    rows = []
    for name, (_, payload, model) in found.items():
        counted = times[name][WARM_UP:]
        median, model_ms = statistics.median(counted), None if model is None else 1e3 * model
        ratio = median / max(limit, 1e-9)
        rows.append(Row(kib, settings.form, name, payload, 1e3 * median, 1e3 * min(counted), model_ms, ratio))
        if group.rank() == 0:
            print_row(rows[-1])
    traffic = wire_bytes(setting)
    if group.rank() == 0 and traffic is not None:
        received, sent = (figure / update.nbytes for figure in traffic)
        print(f"  wire, a pipelined scan: {received:.3f} states received, {sent:.3f} sent by the busiest rank")
    return rows


def physical_limit(settings: Settings, costs: Costs, ranks: int, state_bytes: int) -> float:
    """Seconds no scan can beat: the latency of every link, and one state on one link; or the local work if longer."""
    latency = settings.latency_ms / 1e3 or costs.latency
    byte = 8e-6 / settings.rate_mbit if settings.rate_mbit else costs.byte
    return max((ranks - 1) * latency + state_bytes * byte, settings.compute_ms / 1e3)


def print_row(row: Row) -> None:
    model = "" if row.model_ms is None else f"{row.model_ms:9.2f} {row.median_ms / row.model_ms:7.2f}"
    print(
        f"{row.state_kib:9.0f} {row.method:28s} {row.payload_bytes:12,d} {row.median_ms:9.2f} {row.minimum_ms:9.2f} "
        f"{row.limit_ratio:7.2f} {model}",
        flush=True,
    )


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Median time of every method: bars for one size of the state, lines over several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    if len({row.state_kib for row in rows}) == 1:
        labels, medians = [row.method for row in rows], [row.median_ms for row in rows]
        bars = axes.barh(labels, medians, color=["tab:orange" if "their" in name else "tab:blue" for name in labels])
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.axvline(rows[0].median_ms / rows[0].limit_ratio, color="black", label="limit of the links")
        axes.invert_yaxis()
        axes.set_xlabel(f"median time of a scan of {rows[0].state_kib:g} KiB, ms")
        axes.legend()
    else:
        draw_lines(axes, rows)
    figure.savefig(path, dpi=150)


def draw_lines(axes: "Axes", rows: list[Row]) -> None:
    """A line a method over the size of the state; the limit of the links is each point over its ratio."""
    names = list(dict.fromkeys("auto" if row.method.startswith("auto") else row.method for row in rows))
    for name in names:
        own = [row for row in rows if row.method == name or (name == "auto" and row.method.startswith("auto"))]
        style = "-" if name == "auto" else "--" if name.startswith("their") else ":"
        sizes, medians = [row.state_kib for row in own], [row.median_ms for row in own]
        axes.plot(sizes, medians, style, marker="o", linewidth=3 if name == "auto" else 1, label=name)
    limits = {row.state_kib: row.median_ms / row.limit_ratio for row in rows}
    axes.plot(list(limits), list(limits.values()), "k-", marker="_", label="limit of the links")
    axes.set(xscale="log", yscale="log", xlabel="state, KiB", ylabel="median time of a scan, ms")
    axes.legend(fontsize=7, ncols=2)


def main() -> None:
    settings = read_settings(Settings, sys.argv[1:], about=__doc__)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None, "the process group was just made"
    costs, shared_clock = costs_of(engine_of(group.group_name), CPU), same_clock(group)
    if group.rank() == 0:
        print(f"{group.size()} ranks, {settings.form} transition, {settings.compute_ms:g} ms of local work; {costs}")
        print("state KiB method                     bytes, worst    median   minimum  /limit     model  /model")
    rows = [row for kib in settings.state_kib for row in measure_state(settings, group, kib, shared_clock)]
    if group.rank() == 0:
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        head = {"machine": machine(), "ranks": group.size(), "settings": asdict(settings), "costs": asdict(costs)}
        report = {**head, "rows": [asdict(row) for row in rows]}
        (folder / "all_scan.json").write_text(json.dumps(report, indent=1))
        draw(rows, folder / "all_scan.png", f"All-Scan, {group.size()} ranks, {settings.form} transition")
    flush_scans(group)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
