"""Which layout of a run fits a cluster and is fastest, before paying for it.

    python tools/plan.py model=gated_delta_net_attention_125m train.sequence_length=32768 train.batch_size=64 \
        train.dtype=bfloat16 plan.cluster=h100 plan.nodes=2 plan.tokens=1e10
    python tools/plan.py plan.task=calibrate                  # measures this machine: outputs/plan/here.yaml
    python tools/plan.py plan.cluster=outputs/plan/here.yaml  # a plan for this machine
    python tools/plan.py plan.task=check                      # predictions next to measurements of other layouts
    python tools/plan.py plan.task=published                  # predictions next to published figures

The keys are those of launch/pretrain.py; parallel.*, model.activation_checkpointing and train.micro_batch_size are
what is looked for. Ranges are the machine's own error (`time_error`, `memory_error` of its YAML). `plan.output_dir`
gets plan.json, plan.png, plan.html; for the other tasks here.yaml, check.json or published.json.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from seqtrain import report
from seqtrain.config import split_settings
from seqtrain.data import load_tokenizer
from seqtrain.errors import ConfigError
from seqtrain.parallel.schedules.links import Cluster
from seqtrain.planning.calibrate import calibrate
from seqtrain.planning.cases import CASES, LAYOUTS, Case, layout_words
from seqtrain.planning.layout import Layout, Machine, Prediction, predict, read_cluster
from seqtrain.planning.layout_runs import QUIET, measure_layout
from seqtrain.planning.run_config import count_run, last_of_each, layout_of, read_run
from seqtrain.planning.scaling import Scheme
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.settings import micro_batch

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
    # Tokens of the whole training, for its duration; 0: those of train.steps.
    tokens: Annotated[float, Field(ge=0)] = 0.0
    # Ids of the vocabulary; 0: of data.tokenizer.
    vocab_size: Annotated[int, Field(ge=0)] = 0
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


def layouts_of(config: PretrainConfig, ranks: int) -> Iterator[Layout]:
    """Every way to divide the run's batch over so many ranks; sequences are sharded by powers of two."""

    def powers_of_two(limit: int) -> list[int]:
        return [1 << exponent for exponent in range(limit.bit_length())]

    batch = config.train.batch_size
    for sequence in powers_of_two(min(ranks, config.train.sequence_length)):
        data = ranks // sequence
        if ranks % sequence or batch % data:
            continue
        for micro, stage, checkpointing in product(powers_of_two(batch // data), range(4), (False, True)):
            if batch % (data * micro) == 0:
                yield Layout(data, sequence, stage, checkpointing, micro, batch)


def search(config: PretrainConfig, vocab_size: int, ranks: int, machine: Machine, cluster: Cluster) -> list[Prediction]:
    """All layouts: those that fit first, the fastest first. Raises `ConfigError` where there is none."""
    count = cache(lambda shards: count_run(config, vocab_size=vocab_size, shards=shards))
    found = [
        predict(count(layout.sequence).of_rows(layout.micro_batch), layout, machine, cluster)
        for layout in layouts_of(config, ranks)
    ]
    if not found:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: no layout of {ranks} ranks divides it; use a multiple of "
            "the data groups, or other plan.nodes"
        )
    return sorted(found, key=lambda each: (not each.fits, each.step_seconds if each.fits else each.peak_bytes))


COLUMNS = (
    "data", "sequence", "ZeRO", "checkpointing", "micro-batch", "step s", "range", "GiB per rank", "range", "fits",
    "tokens/s", "most of it",
)  # fmt: skip


def cells(one: Prediction, machine: Machine, tokens: int) -> tuple[str, ...]:
    """A row of texts under `COLUMNS`; `tokens`: of a step."""
    layout, seconds, size = one.layout, one.step_seconds, one.peak_bytes / GIB
    low, high = 1 - machine.time_error, 1 + machine.time_error
    less, more = 1 - machine.memory_error, 1 + machine.memory_error
    return (
        *(str(number) for number in (layout.data, layout.sequence, layout.stage)),
        "yes" if layout.checkpointing else "no",
        str(layout.micro_batch),
        f"{seconds:.3g}",
        f"{low * seconds:.3g} to {high * seconds:.3g}",
        f"{size:.2f}",
        f"{less * size:.2f} to {more * size:.2f}",
        "yes" if one.peak_bytes * more <= one.room else "perhaps" if one.peak_bytes * less <= one.room else "no",
        f"{tokens / seconds:,.0f}",
        one.binds,
    )


def describe(one: Prediction, overrides: list[str], tokens: int, whole: float) -> list[str]:
    """The chosen layout in words, with its command."""

    def largest(values: Mapping[str, float], form: Callable[[float], str]) -> str:
        # Those that are more than half a percent of all.
        ordered = sorted(values.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {form(value)}" for name, value in ordered if value > 0.005 * sum(values.values()))

    command = last_of_each(*overrides, *one.layout.overrides())
    return [
        f"time: {largest(one.seconds, lambda seconds: f'{seconds / one.step_seconds:.0%}')}",
        f"memory, GiB: {largest(one.bytes, lambda size: f'{size / GIB:.2f}')}; room for {one.room / GIB:.1f}",
        f"{whole:.3g} tokens take {whole / tokens * one.step_seconds / 3600:,.1f} h",
        f"python launch/pretrain.py {shlex.join(command)}",
    ]


def plan(settings: Settings, overrides: list[str]) -> int:
    """Prints the layouts and the command of the first; status 1 where none fits."""
    config = read_run(overrides)
    machine, cluster = read_machine(settings.cluster)
    vocab = settings.vocab_size or load_tokenizer(config.data).vocab_size
    ranks = settings.nodes * (settings.ranks or machine.processors)
    found = search(config, vocab, ranks, machine, cluster)
    tokens, shown = config.train.batch_size * config.train.sequence_length, found[: settings.shown]
    rows = [cells(one, machine, tokens) for one in shown]
    report.show_table(COLUMNS, rows)
    words = describe(found[0], overrides, tokens, settings.tokens or tokens * config.train.steps)
    print(*words, f"machine: {machine.name}", sep="\n")
    folder = Path(settings.output_dir)
    content = {"machine": asdict(machine), "ranks": ranks, "layouts": [as_record(one) for one in found]}
    report.write_json(folder / "plan.json", content)
    draw(shown, folder / "plan.png")
    sections = [
        ("Layouts", report.table(COLUMNS, rows) + report.text(words)),
        ("What they are made of", report.picture(folder / "plan.png", "time and memory by layout")),
        ("Machine", report.text([machine.name])),
    ]
    report.write_page(folder / "plan.html", f"{ranks} ranks: {' '.join(overrides)}", sections)
    return 0 if found[0].fits else 1


def draw(found: Sequence[Prediction], path: Path) -> None:
    """Bars of seconds and of GiB, one per layout, the first layout on top."""
    figure = report.new_figure(12, 1.8 + 0.42 * len(found))
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [
        f"{one.data} x {one.sequence}, ZeRO {one.stage}, {one.micro_batch} row(s){', recomputed' * one.checkpointing}"
        for one in (each.layout for each in found)
    ]
    for axes, values, scale, label in (
        (left, [one.seconds for one in found], 1.0, "seconds per step"),
        (right, [one.bytes for one in found], 1 / GIB, "GiB per rank"),
    ):
        report.stacked_bars(axes, labels, values, scale=scale)
        axes.set(xlabel=label)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
    right.axvline(found[0].room / GIB, color="black", linestyle="--", linewidth=1)
    left.invert_yaxis()
    report.save_figure(figure, path)


def as_record(one: Prediction) -> dict[str, Any]:
    return asdict(one) | {"step_seconds": one.step_seconds, "peak_bytes": one.peak_bytes, "fits": one.fits}


def calibrate_here(settings: Settings, mixers: Iterable[str]) -> str:
    """Measures this machine into `here.yaml`, whose path it returns."""
    machine, costs = calibrate(tuple(mixers), tell=lambda what: print(f"calibrating: {what}", flush=True))
    path = Path(settings.output_dir) / "here.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"source": machine.name, **costs, "machine": asdict(machine)}, sort_keys=False))
    print(path)
    return str(path)


CHECK_COLUMNS = ("layout", "step s", "predicted", "error", "peak MiB", "predicted", "error", "without the program")


def check(settings: Settings) -> int:
    """Measures every layout of `LAYOUTS` and compares it with its prediction; status 1 where these are not close."""
    chosen = [layout_words(*layout, settings.shorter) for layout in LAYOUTS[: settings.layouts or len(LAYOUTS)]]
    configs = [read_run([*QUIET, *words]) for words in chosen]
    default = settings.cluster == Settings.cluster
    mixers = dict.fromkeys(name for config in configs for name in config.model.layers)
    machine, cluster = read_machine(calibrate_here(settings, mixers) if default else settings.cluster)
    rows, records = [], []
    for words, config in zip(chosen, configs, strict=True):
        one = predict(count_run(config, rows=micro_batch(config)), layout_of(config), machine, cluster)
        measured = measure_layout(words, steps=settings.steps)
        time = one.step_seconds / measured.seconds - 1
        # Of all memory, and of what the run adds to the program.
        memory, net = ((one.peak_bytes - b) / (measured.peak_bytes - b) - 1 for b in (0, machine.base))
        sizes = [f"{size / 2**20:.0f}" for size in (measured.peak_bytes, one.peak_bytes)]
        seconds = f"{measured.seconds:.2f}", f"{one.step_seconds:.2f}"
        label = " ".join(word.rpartition(".")[2] for word in words)
        rows.append((label, *seconds, f"{time:+.0%}", *sizes, f"{memory:+.0%}", f"{net:+.0%}"))
        print("  ".join(rows[-1]), flush=True)
        records.append(as_record(one) | {"measured": asdict(measured), "time_error": time, "memory_error": memory})
    print()
    report.show_table(CHECK_COLUMNS, rows)
    near = {"memory_error": 0.15, "time_error": 0.3}
    memory, time = (sum(abs(record[key]) <= limit for record in records) for key, limit in near.items())
    print(f"of {len(rows)} layouts: peak memory within 15% for {memory}, step time within 30% for {time}")
    report.write_json(Path(settings.output_dir) / "check.json", {"machine": asdict(machine), "layouts": records})
    return 0 if memory == len(rows) and time >= len(rows) * 10 / 12 else 1


def published(settings: Settings) -> int:
    """Prints predictions next to published figures, and why they differ."""
    cases = CASES[: settings.layouts or len(CASES)]
    records = [asdict(case) | {"predicted": predicted_figure(case, *read_machine(case.cluster))} for case in cases]
    rows = []
    for record in records:
        real, value = record["published"], record["predicted"]
        rows.append((record["name"], f"{real:,.4g} {record['figure']}", f"{value:,.4g}", f"{value / real:.2f}"))
    report.show_table(("setting", "published", "predicted", "ratio"), rows)
    for case in CASES:
        print(f"\n{case.name}: {case.source}\n{case.discussion}")
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
    if case.figure == "ratio to one rank":
        single = Layout(1, 1, layout.stage, layout.checkpointing, 1, 1)
        return passes / predict(counts, single, machine, cluster).step_seconds
    if case.figure == "ratio to gathering":
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
