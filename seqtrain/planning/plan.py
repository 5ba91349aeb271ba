"""Which batch and which layout of a run fit a cluster and are fastest, before paying for it.

    python tools/plan.py model=hybrid_125m train.sequence_length=65536 plan.cluster=h100 plan.tokens=1e10
    python tools/plan.py plan.task=calibrate                  # measures this machine: outputs/plan/here.yaml
    python tools/plan.py plan.cluster=outputs/plan/here.yaml  # a plan for this machine
    python tools/plan.py plan.task=check                      # predictions next to measurements of other layouts
    python tools/plan.py plan.task=published                  # predictions next to published figures

The keys are those of launch/pretrain.py. What is looked for is train.batch_size, train.micro_batch_size, parallel.data,
parallel.sequence, parallel.tensor (within a node), parallel.zero_stage, parallel.shard and
model.activation_checkpointing; those that are given stay as they are. Layouts that surely fit come first; of those that
are equally fast, the one of least memory. Products are bfloat16 where the cluster's processors are made for it, unless
train.dtype says otherwise. Ranges are as wide as predictions were wrong (`time_error`, `memory_error` of the cluster's
file). `plan.output_dir` gets plan.json, plan.png, plan.html; for the other tasks here.yaml, check.json or
published.json.
"""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from seqtrain import report
from seqtrain.config import split_settings
from seqtrain.errors import ConfigError
from seqtrain.parallel.schedules.links import Cluster
from seqtrain.planning.cases import CASES, LAYOUTS, Case, layout_words
from seqtrain.planning.counts import ModelCounter
from seqtrain.planning.goodput import Failures, describe_failures
from seqtrain.planning.layout import Layout, Machine, Prediction, predict, read_cluster
from seqtrain.planning.run_config import at_once, count_run, counter_of, last_of_each, layout_of, read_run
from seqtrain.planning.scaling import Scheme
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.checks import check_tensor
from seqtrain.runtime.settings import MOST_SHARDED, micro_batch, segments

GIB = 2**30


@dataclass(frozen=True)
class Settings:
    # What to do: plan, calibrate this machine, check predictions against measurements, or against published figures.
    task: Literal["plan", "calibrate", "check", "published"] = "plan"
    # The cluster, with its `machine`: a YAML file, or the name of one that comes with seqtrain; for check, the default
    # calibrates first.
    cluster: str = "h100"
    # Nodes to use, and ranks of each; 0: as many as a node of the cluster has processors.
    nodes: Annotated[int, Field(gt=0)] = 1
    ranks: Annotated[int, Field(ge=0)] = 0
    # Most tokens of a step where train.batch_size is not given; 0: as many as in a step of the model's preset.
    step_tokens: Annotated[int, Field(ge=0)] = 0
    # Tokens of the whole training; 0: those of train.steps, or as many as the preset trains on.
    tokens: Annotated[float, Field(ge=0)] = 0.0
    # Ids of the vocabulary; 0: of data.tokenizer.
    vocab_size: Annotated[int, Field(ge=0)] = 0
    # Hours of a rank from one of its failures to the next: GPU hours of the cluster divided by its failures.
    failure_hours: Annotated[float, Field(gt=0)] = 8000.0
    # Seconds that training stands still for a checkpoint, and from a failure to the first step after it: a rank's death
    # is noticed at once, a machine's in 20 s, a hang in a minute or two; run.log says what a start takes.
    save_seconds: Annotated[float, Field(ge=0)] = 10.0
    restart_seconds: Annotated[float, Field(ge=0)] = 120.0
    # Layouts shown.
    shown: Annotated[int, Field(gt=0)] = 10
    # Check: layouts measured, in order; 0: all. Steps of each.
    layouts: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(gt=1)] = 3
    # Check: sequences so many times shorter, for a quick look.
    shorter: Annotated[int, Field(gt=0)] = 1
    # Folder for the results.
    output_dir: str = "outputs/plan"


def read_machine(cluster: str) -> tuple[Machine, Cluster]:
    """A cluster file's machine and links. Raises `ConfigError`."""
    file = read_cluster(cluster)
    if file.machine is None:
        raise ConfigError(f"plan.cluster={cluster}: has no `machine`; plan.task=calibrate writes one")
    return file.machine, file.links()


def layouts_of(config: PretrainConfig, ranks: int, step_tokens: int = 0, tensors: Sequence[int] = (1,)) -> list[Layout]:
    """Every way to divide a step over so many ranks; sequences are sharded by powers of two.

    step_tokens: 0 for the run's own batch, or the most of any other. `tensors`: over how many ranks layers may be
    divided. Raises `ConfigError` where there is none.
    """
    found = [
        replace(layout, tensor=tensor)
        for tensor in tensors
        if tensor == 1 or ranks % (tensor * config.parallel.experts) == 0
        for layout in _undivided(config, ranks // tensor, step_tokens)
        if tensor == 1 or layout.stage < 3
    ]
    if not found:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: no layout of {ranks} ranks divides it; use a multiple of the "
            "data groups, other plan.nodes, or leave it out"
        )
    return [replace(layout, shard=shard) for layout in found for shard in (0, *_shards(layout))]


def dividing(config: PretrainConfig, machine: Machine, ranks: int) -> list[int]:
    """Over how many of a node's ranks this model's layers can be divided: 1, and powers of two."""
    found = [1]
    for tensor in _powers_of_two(min(ranks, machine.processors))[1:]:
        try:
            check_tensor(replace(config, parallel=replace(config.parallel, tensor=tensor, zero_stage=1)))
        except ConfigError:
            break
        found.append(tensor)
    return found


def _undivided(config: PretrainConfig, ranks: int, step_tokens: int) -> list[Layout]:
    train, experts = config.train, config.parallel.experts
    if ranks % experts or config.model.experts % experts:
        raise ConfigError(
            f"parallel.experts={experts}: must divide {ranks} ranks and model.experts={config.model.experts}; "
            f"use {math.gcd(ranks, config.model.experts)}, or a divisor of it"
        )
    sharded = [n for n in _powers_of_two(min(ranks, train.sequence_length)) if ranks % n == 0]
    most = max(step_tokens // train.sequence_length, ranks // sharded[-1])
    found = []
    for sequence in sharded:
        data = ranks // sequence
        batches = [data * n for n in _powers_of_two(most // data)] if step_tokens else [train.batch_size]
        for batch in (each for each in batches if each % data == 0):
            micros = [n for n in _powers_of_two(batch // data) if batch % (data * n) == 0]
            for micro, stage, again in product(micros, range(3 if experts > 1 else 4), (False, True)):
                cut = segments(config, micro), train.segment_gradients == "exact", train.offload_activations
                found.append(Layout(data, sequence, stage, again, micro, batch, experts, *cut))
    return found


def _shards(layout: Layout) -> list[int]:
    """Sizes of shards, smaller than all ranks, that are worth a look: a node, and what runs take by default."""
    divides = layout.stage > 0 and layout.experts == layout.tensor == 1
    return [n for n in (8, MOST_SHARDED) if n < layout.ranks and layout.ranks % n == 0 and divides]


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length())]


def as_given(layouts: Sequence[Layout], given: Mapping[str, str]) -> list[Layout]:
    """Those that the words of the command line (key to value) allow. Raises `ConfigError` where there is none."""

    def agrees(layout: Layout) -> bool:
        pairs = dict(word.split("=") for word in layout.overrides()) | {"parallel.shard": str(layout.shard_ranks)}
        return all(given.get(key, "auto").lower() in (value, "auto") for key, value in pairs.items())

    found = list(filter(agrees, layouts))
    if not found:
        keys = [key for key, _ in (word.split("=") for word in layouts[0].overrides()) if key in given]
        words = " ".join(f"{key}={given[key]}" for key in keys)
        raise ConfigError(f"{words}: no layout of {layouts[0].ranks} ranks is so; leave one out, or change plan.nodes")
    return found


def search(
    config: PretrainConfig,
    counter: Callable[[int], ModelCounter],
    layouts: Iterable[Layout],
    machine: Machine,
    cluster: Cluster,
) -> list[Prediction]:
    """What the layouts would take: those that surely fit first, then those that may; among them the fastest first, and
    of those about as fast the one of least memory; of those that are alike in that, too, the least divided.

    `counter`: of one of so many tensor-parallel ranks.
    """
    counter = cache(counter)
    count = cache(lambda tokens, tensor: counter(tensor).count(tokens))
    count_rows = cache(lambda tokens, tensor, rows: count(tokens, tensor).of_rows(rows))

    @cache
    def of_one_round(layout: Layout) -> Prediction:
        tokens, rows = at_once(config, layout.sequence, layout.micro_batch)
        return predict(count_rows(tokens, layout.tensor, rows), layout, machine, cluster)

    # Micro-batches of a step are alike, however many there are.
    found = [replace(of_one_round(each.of_rounds(1)), layout=each) for each in layouts]
    ordered: list[Prediction] = []
    for answer in FITS:
        group = [one for one in found if fits(one, machine) == answer]
        alike = ALIKE * min(map(_row_seconds, group), default=0.0)
        ordered += sorted(group, key=lambda one: (max(alike, _row_seconds(one)), *_simplicity(one)))
    return ordered


def _simplicity(one: Prediction) -> tuple[float, ...]:
    """The less the better. Memories that differ by less than a tenth are alike; the batch is as large as it may be."""
    layout = one.layout
    return round(math.log(one.peak_bytes, 1.1)), layout.stage, layout.sequence, layout.tensor, -layout.batch


# Predictions whose times differ by less are alike: they are wrong by more.
ALIKE = 1.02
FITS = ("yes", "perhaps", "no")


def _row_seconds(one: Prediction) -> float:
    return one.step_seconds / one.layout.batch


def fits(one: Prediction, machine: Machine) -> str:
    """Whether its memory suffices, given the error of predictions: one of `FITS`."""
    room, wrong = one.room / one.peak_bytes, 1 + machine.memory_error
    return FITS[(room < wrong) + (room < 1 / wrong)]


COLUMNS = ("data x seq", "ZeRO", "again", "rows", "step", "tokens/s", "GiB per rank", "fits", "most of it")
LEGEND = (
    "a third number: ranks over which layers are divided (tensor); again: layers are recomputed; rows: sequences at "
    "once on a group of ranks, of those in a step"
)


def cells(one: Prediction, machine: Machine, length: int) -> tuple[str, ...]:
    """A row of texts under `COLUMNS`; `length`: tokens of a sequence."""
    layout, size, wrong = one.layout, one.peak_bytes / GIB, 1 + machine.memory_error
    return (
        f"{layout.data} x {layout.sequence}" + (f" x {layout.tensor}" if layout.tensor > 1 else ""),
        f"{layout.stage} of {layout.shard}" if layout.shard else str(layout.stage),
        "yes" if layout.checkpointing else "no",
        f"{layout.micro_batch} of {layout.batch}",
        f"{one.step_seconds:.3g} s",
        _short(layout.batch * length / one.step_seconds),
        f"{size:.1f} ({size / wrong:.1f}-{size * wrong:.1f})",
        fits(one, machine),
        one.binds,
    )


def _short(number: float) -> str:
    """`1.23M`: three digits."""
    unit, letter = next(((unit, letter) for unit, letter in ((1e6, "M"), (1e3, "k")) if number >= unit), (1.0, ""))
    return f"{number / unit:.3g}{letter}"


def duration(seconds: float, error: float) -> str:
    """`about 12 min (9.2 to 16)`: so long, and how long where that is wrong by this error."""
    units = {"s": 1, "min": 60, "h": 3600, "days": 86400}
    name = max((name for name, unit in units.items() if seconds >= 2 * unit), key=units.__getitem__, default="s")
    each = (seconds, seconds / (1 + error), seconds * (1 + error))
    middle, low, high = (f"{one / units[name]:.{0 if one >= 10 * units[name] else 1}f}" for one in each)
    return f"about {middle} {name} ({low} to {high})"


def describe(one: Prediction, machine: Machine, steps: int, length: int) -> list[str]:
    """The chosen layout in words."""

    def largest(values: Mapping[str, float], form: Callable[[float], str]) -> str:
        # Those that are more than half a percent of all.
        ordered = sorted(values.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {form(value)}" for name, value in ordered if value > 0.005 * sum(values.values()))

    tokens = steps * one.layout.batch * length
    return [
        f"{steps:,} steps on {tokens:.3g} tokens: {duration(steps * one.step_seconds, machine.time_error)}",
        f"time: {largest(one.seconds, lambda seconds: f'{seconds / one.step_seconds:.0%}')}",
        f"memory, GiB: {largest(one.bytes, lambda size: f'{size / GIB:.2f}')}; room for {one.room / GIB:.1f}",
        f"machine: {machine.name}",
    ]


def command(overrides: list[str], config: PretrainConfig, layout: Layout, steps: int) -> list[str]:
    """The words that launch the chosen layout, with all that the plan stands on."""
    train = config.train
    needed = [f"{group}={config.presets[group]}" for group in ("data", "model")]
    needed.append(f"data.tokenizer={config.data.tokenizer}")
    last = [f"train.sequence_length={train.sequence_length}", f"train.dtype={train.dtype}", f"train.steps={steps}"]
    return ["python", "launch/pretrain.py", *last_of_each(*needed, *overrides, *last, *layout.overrides())]


def plan(settings: Settings, overrides: list[str]) -> int:
    """Prints the layouts and the command of the first; status 1 where none fits."""
    machine, cluster = read_machine(settings.cluster)
    given = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in overrides)}
    if machine.dtype != "float32" and "train.dtype" not in given:
        overrides = [*overrides, f"train.dtype={machine.dtype}"]
    config, length = read_run(overrides), ("train.sequence_length", "train.batch_size")
    preset = config.train
    if not given.keys().isdisjoint(length):
        preset = read_run([word for word in overrides if word.partition("=")[0] not in length]).train
    own_batch = "train.batch_size" in given
    step_tokens = 0 if own_batch else settings.step_tokens or preset.batch_size * preset.sequence_length
    ranks = settings.nodes * (settings.ranks or machine.processors)
    tensors = [config.parallel.tensor] if "parallel.tensor" in given else dividing(config, machine, ranks)
    layouts = as_given(layouts_of(config, ranks, step_tokens, tensors), given)
    if config.model.recompute:
        # The counts are of what it names.
        layouts = [layout for layout in layouts if layout.checkpointing == ("block" in config.model.recomputed)]
    with report.announced(f"counting the model's work, {len(layouts)} layouts on {ranks} ranks"):
        counter = partial(counter_of, config, settings.vocab_size)
        found = search(config, lambda tensor: counter(tensor=tensor), layouts, machine, cluster)
    best = found[0].layout
    whole = settings.tokens or preset.steps * preset.batch_size * preset.sequence_length
    steps = config.train.steps
    if settings.tokens or not (own_batch or "train.steps" in given):
        steps = math.ceil(whole / (best.batch * config.train.sequence_length))
    show(settings, found, machine, config, steps, command(overrides, config, best, steps))
    return 0 if found[0].fits else 1


def show(
    settings: Settings,
    found: Sequence[Prediction],
    machine: Machine,
    config: PretrainConfig,
    steps: int,
    words: Sequence[str],
) -> None:
    """Prints the layouts, says how long the first takes and how it is launched, and writes the report."""
    shown, length = found[: settings.shown], config.train.sequence_length
    rows = [cells(one, machine, length) for one in shown]
    said = describe(found[0], machine, steps, length)
    ranks, hours = found[0].layout.ranks, settings.failure_hours
    failures = Failures(3600 * hours / ranks, settings.save_seconds, settings.restart_seconds)
    said.append(describe_failures(ranks, rank_hours=hours, failures=failures))
    if settings.nodes > 1:
        said.append(f"{settings.nodes} nodes: add runtime.address of your Ray cluster, as docs/howto/nodes.md says")
    report.show_table(COLUMNS, rows)
    report.say(LEGEND, *said)
    report.show_command(words)
    folder = Path(settings.output_dir)
    content = {"machine": asdict(machine), "steps": steps, "command": words, "layouts": list(map(as_record, found))}
    report.write_json(folder / "plan.json", content)
    draw(shown, length, folder / "plan.png")
    sections = [
        ("Layouts", report.table(COLUMNS, rows) + report.text(said) + report.listing(shlex.join(words))),
        ("What they are made of", report.picture(folder / "plan.png", "time and memory by layout")),
    ]
    report.write_page(folder / "plan.html", f"{found[0].layout.ranks} ranks", sections)


def draw(found: Sequence[Prediction], length: int, path: Path) -> None:
    """Bars of seconds and of GiB, one per layout, the first layout on top; `length`: tokens of a sequence."""
    figure = report.new_figure(12, 2.2 + 0.35 * len(found))
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [str(one.layout) for one in found]
    # Layouts differ in the tokens of a step.
    times = [{name: s / one.layout.batch / length for name, s in one.seconds.items()} for one in found]
    for axes, values, scale, title, unit in (
        (left, times, 1e6, "Time, predicted", "seconds per million tokens"),
        (right, [one.bytes for one in found], 1 / GIB, "Memory at its peak, predicted", "GiB per rank"),
    ):
        largest = max(sum(each.values()) for each in values)
        shown = [{name: x for name, x in each.items() if x > 0.001 * largest} for each in values]
        report.stacked_bars(axes, labels, shown, scale=scale)
        axes.set(xlabel=unit, title=title)
        if axes is right:
            axes.axvline(found[0].room / GIB, color="black", linestyle="--", linewidth=1, label="room")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / figure.get_figheight() - 0.04), ncols=4)
    left.set_ylabel("data x sequence ranks, ZeRO stage,\nsequences at once / in a step", fontsize=9)
    left.invert_yaxis()
    report.save_figure(figure, path)


def as_record(one: Prediction) -> dict[str, Any]:
    return asdict(one) | {
        "seconds": one.seconds,
        "step_seconds": one.step_seconds,
        "peak_bytes": one.peak_bytes,
        "fits": one.fits,
    }


def calibrate_here(settings: Settings, mixers: Iterable[str]) -> str:
    """Measures this machine into `here.yaml`, whose path it returns."""
    # It starts ranks, which a plan does not: 2 s of imports, here as in `check`.
    from seqtrain.planning.calibrate import calibrate

    machine, costs = calibrate(tuple(mixers))
    path = Path(settings.output_dir) / "here.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"source": machine.name, **costs, "machine": asdict(machine)}, sort_keys=False))
    print(path)
    return str(path)


CHECK_COLUMNS = ("layout", "step", "predicted", "error", "peak MiB", "predicted", "error")


def check(settings: Settings) -> int:
    """Measures every layout of `LAYOUTS` and compares it with its prediction; status 1 where these are not close."""
    from seqtrain.planning.layout_runs import QUIET, measure_layout

    chosen = [layout_words(*layout, settings.shorter) for layout in LAYOUTS[: settings.layouts or len(LAYOUTS)]]
    configs = [read_run([*QUIET, *words]) for words in chosen]
    default = settings.cluster == Settings.cluster
    mixers = dict.fromkeys(name for config in configs for name in config.model.layers)
    machine, cluster = read_machine(calibrate_here(settings, mixers) if default else settings.cluster)
    rows, records = [], []
    for words, config in zip(chosen, configs, strict=True):
        layout = layout_of(config)
        label = f"{','.join(config.model.layers)} {config.train.sequence_length:,}: {layout}"
        with report.announced(label):
            one = predict(count_run(config, rows=micro_batch(config)), layout, machine, cluster)
            measured = measure_layout(words, steps=settings.steps)
        time, memory = one.step_seconds / measured.seconds - 1, one.peak_bytes / measured.peak_bytes - 1
        sizes = [f"{size / 2**20:.0f}" for size in (measured.peak_bytes, one.peak_bytes)]
        seconds = f"{measured.seconds:.2f} s", f"{one.step_seconds:.2f} s"
        rows.append((label, *seconds, f"{time:+.0%}", *sizes, f"{memory:+.0%}"))
        records.append(as_record(one) | {"measured": asdict(measured), "time_error": time, "memory_error": memory})
    report.show_table(CHECK_COLUMNS, rows)
    near = {"memory_error": 0.15, "time_error": 0.3}
    memory, time = (sum(abs(record[key]) <= limit for record in records) for key, limit in near.items())
    print(f"of {len(rows)} layouts: peak memory within 15% for {memory}, step time within 30% for {time}")
    report.write_json(Path(settings.output_dir) / "check.json", {"machine": asdict(machine), "layouts": records})
    return 0 if memory == len(rows) and time >= len(rows) * 10 / 12 else 1


def published(settings: Settings) -> int:
    """Prints predictions next to published figures; docs/performance.md says where these are from, why they differ."""
    records, rows = [], []
    for case in CASES[: settings.layouts or len(CASES)]:
        with report.announced(case.name):
            value = predicted_figure(case, *read_machine(case.cluster))
        records.append(asdict(case) | {"predicted": value})
        rows.append(
            (case.name, f"{case.published:,.4g} {case.figure}", f"{value:,.4g}", f"{value / case.published:.2f}")
        )
    report.show_table(("setting", "published", "predicted", "ratio"), rows)
    report.write_json(Path(settings.output_dir) / "published.json", records)
    return 0


def predicted_figure(case: Case, machine: Machine, cluster: Cluster) -> float:
    """The published setting's figure, as its layout is predicted here."""
    config = read_run(["experiment=quickstart", *case.overrides])
    layout, length = case.layout, config.train.sequence_length
    counts = count_run(config, vocab_size=case.vocab_size, shards=layout.sequence).of_rows(layout.micro_batch)
    found = predict(counts, layout, machine, cluster)
    # What gradients take is left out of the ratios, as it is where they were published.
    passes = found.step_seconds - found.seconds["gradient exchange"]
    if case.figure == "of one rank":
        single = Layout(1, 1, layout.stage, layout.checkpointing, 1, 1)
        return passes / predict(counts, single, machine, cluster).step_seconds
    if case.figure == "of gathering":
        gathered = predict(counts, layout, machine, cluster, Scheme("all_gather", overlapped=False))
        return (gathered.step_seconds - gathered.seconds["gradient exchange"]) / passes
    return layout.batch * length / found.step_seconds / layout.ranks


def main(arguments: list[str]) -> int:
    settings, overrides = split_settings(Settings, "plan", arguments)
    tasks: dict[str, Callable[[], int]] = {
        "plan": lambda: plan(settings, overrides),
        "calibrate": lambda: int(not calibrate_here(settings, read_run(overrides).model.layers)),
        "check": lambda: check(settings),
        "published": lambda: published(settings),
    }
    return tasks[settings.task]()
