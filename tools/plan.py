"""Which layout of a run fits a cluster and is fastest, before paying for it.

    python tools/plan.py model=gated_delta_net_attention_125m train.sequence_length=32768 train.batch_size=64 \
        train.dtype=bfloat16 plan.cluster=tools/clusters/h100.yaml plan.nodes=2 plan.tokens=1e10
    python tools/plan.py plan.task=calibrate                  # measures this machine: outputs/plan/here.yaml
    python tools/plan.py plan.cluster=outputs/plan/here.yaml  # a plan for this machine
    python tools/plan.py plan.task=check                      # predictions beside measurements of other layouts
    python tools/plan.py plan.task=published                  # predictions beside what others have published

The keys are those of launch/pretrain.py; parallel.*, model.activation_checkpointing and train.micro_batch_size are
what is looked for. Ranges are the machine's own error (`time_error`, `memory_error` of its YAML). Left behind in
`plan.output_dir`: plan.json, plan.png, plan.html; for the other tasks here.yaml, check.json or published.json.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from _console import open_console, show_table
from _html import picture, table, text, write_page
from _overrides import count_run, read_run, split_settings
from _plan_cases import CASES, LAYOUTS, Case, layout_words
from _plan_pictures import draw_plan
from pydantic import Field
from simulate_scaling import Settings as LinkSettings
from simulate_scaling import cluster_of, read_cluster

from seqtrain.analysis.layout import Layout, Machine, Prediction, predict
from seqtrain.analysis.scaling import Cluster, Scheme
from seqtrain.data import load_tokenizer
from seqtrain.errors import ConfigError, SeqtrainError
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.settings import micro_batch

GIB = 2**30


@dataclass(frozen=True)
class Settings:
    # What to do: plan, calibrate this machine, check predictions against measurements, or against published figures.
    task: Literal["plan", "calibrate", "check", "published"] = "plan"
    # YAML of the cluster, with its `machine`; for check: empty calibrates first.
    cluster: str = "tools/clusters/h100.yaml"
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


def read_machine(path: str) -> tuple[Machine, Cluster]:
    """A cluster file's machine and links. Raises `ConfigError`."""
    file = read_cluster(path)
    if file.machine is None:
        raise ConfigError(f"plan.cluster={path}: has no `machine`; plan.task=calibrate writes one")
    return file.machine, cluster_of(file, LinkSettings())


def layouts_of(config: PretrainConfig, ranks: int) -> Iterator[Layout]:
    """Every way to divide the run's batch over so many ranks; sequences are cut by powers of two."""
    batch, sequence = config.train.batch_size, 1
    while sequence <= min(ranks, config.train.sequence_length):
        data = ranks // sequence
        if ranks % sequence == 0 and batch % data == 0:
            micro = 1
            while micro <= batch // data:
                if batch % (data * micro) == 0:
                    for stage in range(4):
                        for again in (False, True):
                            yield Layout(data, sequence, stage, again, micro, batch)
                micro *= 2
        sequence *= 2


def search(config: PretrainConfig, vocab_size: int, ranks: int, machine: Machine, cluster: Cluster) -> list[Prediction]:
    """All layouts: those that fit first, the fastest first. Raises `ConfigError` where there is none."""
    found, counted = [], {}
    for layout in layouts_of(config, ranks):
        if layout.sequence not in counted:
            counted[layout.sequence] = count_run(config, vocab_size=vocab_size, pieces=layout.sequence)
        found.append(predict(counted[layout.sequence].of_rows(layout.micro_batch), layout, machine, cluster))
    if not found:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: no layout of {ranks} ranks divides it; use a multiple of "
            "the data groups, or other plan.nodes"
        )
    return sorted(found, key=lambda each: (not each.fits, each.step_seconds if each.fits else each.peak_bytes))


COLUMNS = (
    "data", "sequence", "ZeRO", "checkpointing", "micro-batch", "step s", "range", "GiB a rank", "range", "fits",
    "tokens/s", "most of it",
)  # fmt: skip


def cells(one: Prediction, machine: Machine, tokens: int) -> tuple[str, ...]:
    """A row of texts under `COLUMNS`; `tokens`: of a step."""
    layout, seconds, size = one.layout, one.step_seconds, one.peak_bytes / GIB
    low, high = 1 - machine.time_error, 1 + machine.time_error
    less, more = 1 - machine.memory_error, 1 + machine.memory_error
    return (
        str(layout.data),
        str(layout.sequence),
        str(layout.stage),
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
    seconds, share = one.step_seconds, sorted(one.seconds.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {value / seconds:.0%}" for name, value in share if value > 0.005 * seconds)
    held = sorted(one.bytes.items(), key=lambda item: -item[1])
    kinds = ", ".join(f"{name} {value / GIB:.2f}" for name, value in held if value > 0.005 * one.peak_bytes)
    fixed = [word for word in overrides if word.split("=")[0] not in {o.split("=")[0] for o in one.layout.overrides()}]
    return [
        f"time: {parts}",
        f"memory, GiB: {kinds}; room for {one.room / GIB:.1f}",
        f"{whole:.3g} tokens take {whole / tokens * seconds / 3600:,.1f} h",
        f"python launch/pretrain.py {shlex.join([*fixed, *one.layout.overrides()])}",
    ]


def plan(settings: Settings, overrides: list[str]) -> int:
    """Prints the layouts and the command of the first; status 1 where none fits."""
    config = read_run(overrides)
    machine, cluster = read_machine(settings.cluster)
    vocab = settings.vocab_size or load_tokenizer(config.data).vocab_size
    ranks = settings.nodes * (settings.ranks or machine.processors)
    found = search(config, vocab, ranks, machine, cluster)
    tokens = config.train.batch_size * config.train.sequence_length
    rows = [cells(one, machine, tokens) for one in found[: settings.shown]]
    show_table(open_console(), COLUMNS, rows)
    words = describe(found[0], overrides, tokens, settings.tokens or tokens * config.train.steps)
    print(*words, sep="\n")
    print(f"machine: {machine.name}")
    folder = Path(settings.output_dir)
    report = {"machine": asdict(machine), "ranks": ranks, "layouts": [as_record(one) for one in found]}
    write(folder / "plan.json", report)
    draw_plan(found[: settings.shown], folder / "plan.png")
    sections = [
        ("Layouts", table(COLUMNS, rows) + text(words)),
        ("What they are made of", picture(folder / "plan.png", "time and memory by layout")),
        ("Machine", text([machine.name])),
    ]
    write_page(folder / "plan.html", f"{ranks} ranks: {' '.join(overrides)}", sections)
    return 0 if found[0].fits else 1


def as_record(one: Prediction) -> dict[str, Any]:
    return asdict(one) | {"step_seconds": one.step_seconds, "peak_bytes": one.peak_bytes, "fits": one.fits}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def calibrate_here(settings: Settings, mixers: tuple[str, ...]) -> tuple[Machine, Cluster]:
    """Measures this machine into `here.yaml`."""
    from _calibrate import calibrate

    machine, costs = calibrate(mixers, tell=lambda what: print(f"calibrating: {what}", flush=True))
    path = Path(settings.output_dir) / "here.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"source": machine.name, **costs, "machine": asdict(machine)}, sort_keys=False))
    print(f"{path}")
    return read_machine(str(path))


CHECK_COLUMNS = ("layout", "step s", "predicted", "error", "peak MiB", "predicted", "error", "beside the program")


def check(settings: Settings) -> int:
    """Measures every layout of `LAYOUTS` and prints predictions beside it; status 1 where they are not good enough."""
    from _calibrate import layout_of
    from _layout_runs import QUIET, measure_layout

    chosen = [layout_words(*layout, settings.shorter) for layout in LAYOUTS[: settings.layouts or len(LAYOUTS)]]
    names = tuple(dict.fromkeys(name for words in chosen for name in read_run([*QUIET, *words]).model.layers))
    given = settings.cluster if settings.cluster != Settings.cluster else ""
    machine, cluster = read_machine(given) if given else calibrate_here(settings, names)
    rows, records = [], []
    for words in chosen:
        config = read_run([*QUIET, *words])
        one = predict(count_run(config, rows=micro_batch(config)), layout_of(config), machine, cluster)
        measured = measure_layout(words, steps=settings.steps)
        times = one.step_seconds / measured.seconds - 1
        memory = one.peak_bytes / measured.peak_bytes - 1
        net = (one.peak_bytes - machine.base) / (measured.peak_bytes - machine.base) - 1
        size = (measured.peak_bytes / 2**20, one.peak_bytes / 2**20)
        label = " ".join(word.rpartition(".")[2] for word in words)
        rows.append(
            (label, f"{measured.seconds:.2f}", f"{one.step_seconds:.2f}", f"{times:+.0%}", f"{size[0]:.0f}",
             f"{size[1]:.0f}", f"{memory:+.0%}", f"{net:+.0%}")
        )  # fmt: skip
        print("  ".join(rows[-1]), flush=True)
        records.append(as_record(one) | {"measured": asdict(measured), "time_error": times, "memory_error": memory})
    print()
    show_table(open_console(), CHECK_COLUMNS, rows)
    near = [
        sum(abs(record[key]) <= limit for record in records)
        for key, limit in (("memory_error", 0.15), ("time_error", 0.3))
    ]
    print(f"of {len(rows)} layouts: peak memory within 15% for {near[0]}, step time within 30% for {near[1]}")
    write(Path(settings.output_dir) / "check.json", {"machine": asdict(machine), "layouts": records})
    return 0 if near[0] == len(rows) and near[1] >= len(rows) * 10 / 12 else 1


PUBLISHED_COLUMNS = ("setting", "published", "predicted", "ratio")


def published(settings: Settings) -> int:
    """Prints predictions beside published figures, and why they differ."""
    rows, records = [], []
    for case in CASES[: settings.layouts or len(CASES)]:
        machine, cluster = read_machine(str(Path(__file__).parent / "clusters" / f"{case.cluster}.yaml"))
        value = predicted_figure(case, machine, cluster)
        rows.append(
            (case.name, f"{case.published:,.4g} {case.figure}", f"{value:,.4g}", f"{value / case.published:.2f}")
        )
        records.append(asdict(case) | {"predicted": value})
    show_table(open_console(), PUBLISHED_COLUMNS, rows)
    for case in CASES:
        print(f"\n{case.name}: {case.source}\n{case.discussion}")
    write(Path(settings.output_dir) / "published.json", records)
    return 0


def predicted_figure(case: Case, machine: Machine, cluster: Cluster) -> float:
    """The published setting's figure, as its layout is predicted here."""
    config = read_run(["experiment=quickstart", *case.overrides])
    layout, length = case.layout, config.train.sequence_length
    counts = count_run(config, vocab_size=case.vocab_size, pieces=layout.sequence).of_rows(layout.micro_batch)
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
    settings, overrides = split_settings(Settings, "plan", arguments, about=__doc__)
    tasks: dict[str, Callable[[], int]] = {
        "plan": lambda: plan(settings, overrides),
        "calibrate": lambda: int(not calibrate_here(settings, tuple(read_run(overrides).model.layers))),
        "check": lambda: check(settings),
        "published": lambda: published(settings),
    }
    try:
        return tasks[settings.task]()
    except SeqtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
