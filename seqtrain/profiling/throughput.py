"""Runs a few real training steps of any run and shows where time and memory go.

    python tools/profile_throughput.py experiment=quickstart model.depth=4 train.sequence_length=4096
    python tools/profile_throughput.py parallel.sequence=2 profile.trace=true
    python tools/profile_throughput.py --multirun 'model.layers=[gla],[mamba2]' train.dtype=float32,bfloat16

The keys are those of launch/pretrain.py and the group `profile` (steps, warmup, trace, peak); `--help` lists the
groups. Steps with and without the profiler take turns after the warm-up: speed is that of the steps without, parts are
those of the steps with it, and the difference is printed. Times are means over ranks; a rank's waiting for a slower one
counts as communication. `output_dir` gets profile.json, pictures, report.html (one file, nothing loaded from
elsewhere), ranks.json (what each rank measured), trace.json where asked for, and the run's own folder without its
checkpoint.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from seqtrain.config import launch
from seqtrain.errors import ConfigError
from seqtrain.planning.run_config import count_run
from seqtrain.profiling import ProfileConfig, Profiler, StepWork, by_kind, read_profiles, summarize, trace_events
from seqtrain.profiling.pictures import draw_layers, draw_memory, draw_parts, draw_sweep, words
from seqtrain.report import in_a_line, listing, machine, picture, show_table, table, text, write_json, write_page
from seqtrain.runtime import PretrainConfig, read_pretrain_config, run
from seqtrain.runtime.run_folder import RunFolder, plain, read_lines
from seqtrain.runtime.settings import segments
from seqtrain.validation import validate

MIB = 2**20


@dataclass(frozen=True)
class Profile:
    """One run to profile: as it was asked for, and how it is looked at."""

    asked: PretrainConfig
    settings: ProfileConfig

    @property
    def folder(self) -> Path:
        return Path(self.asked.output_dir)


def read_profile(config: DictConfig) -> Profile:
    """The checked settings of a composed config. Raises `ConfigError`."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    settings = validate(ProfileConfig, values.pop("profile"), prefix="profile.")
    profile = Profile(read_pretrain_config(OmegaConf.create(values)), settings)
    if (profile.folder / "profile.json").exists():
        raise ConfigError(f"output_dir={profile.folder}: holds a profile already; use another output_dir")
    return profile


def measure(profile: Profile) -> dict[str, Any] | None:
    """Trains with a profiler on every rank; gives the report; None where another process does, or it was stopped."""
    asked, settings, folder = profile.asked, profile.settings, profile.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    raw, run_folder = folder / "ranks.json", RunFolder(folder / "run")
    # As many steps as are looked at, and nothing written on the way.
    config = replace(
        asked,
        train=replace(asked.train, steps=settings.total_steps),
        # A run scores its model at the end; one sequence is the least.
        evaluation=replace(asked.evaluation, every=0, max_tokens=asked.train.sequence_length),
        checkpoint=replace(asked.checkpoint, every=0, minutes=0.0, keep_every=0, resume="never", store=""),
        tracking=replace(asked.tracking, mode="disabled"),
        sample=replace(asked.sample, tokens=0),
        output_dir=str(profile.folder / "run"),
    )
    summary = run(config, callback=Profiler(settings, raw))
    if not summary or summary["stopped"]:
        return None
    ranks = read_profiles(raw)
    records = zip(read_lines(run_folder.metrics), settings.plan(), strict=True)
    report = summarize(
        ranks,
        count_step(config, vocab_size=ranks[0]["vocab_size"]),
        checkpoint_every=asked.checkpoint.every,
        step_seconds=[record["step_seconds"] for record, kind in records if kind == "profiled"],
    )
    files = [path for path in run_folder.checkpoints.rglob("*") if path.is_file()]
    report["checkpoint"]["bytes"] = sum(path.stat().st_size for path in files)
    shutil.rmtree(run_folder.checkpoints)
    report |= {"machine": machine(), "parameters": summary["parameters"]}
    report |= {"profile": asdict(settings), "config": plain(asked)}
    write_json(folder / "profile.json", report)
    write_pictures(report, ranks, folder)
    if settings.trace:
        (folder / "trace.json").write_text(json.dumps(trace_events(ranks)))
    return report


def count_step(config: PretrainConfig, *, vocab_size: int) -> StepWork:
    """What a step of the run has to compute, all ranks together, as if every sequence were one document."""
    counts = count_run(config, vocab_size=vocab_size, shards=1)
    rows = config.train.batch_size
    executed = counts.executed_flops(checkpointing="block" in config.model.recomputed)
    if segments(config) > 1 and config.train.segment_gradients == "exact":
        # The pass that finds the states at the boundaries between segments.
        executed += sum(part.executed_forward for part in counts.parts if part.layer >= 0)
    return StepWork(rows * config.train.sequence_length, rows * counts.step_flops, rows * executed)


def describe(config: dict[str, Any]) -> str:
    """The run in a line."""
    model, train, parallel = config["model"], config["train"], config["parallel"]
    again = "".join(
        f", {part} recomputed" for part in (model["activation_checkpointing"] * ["block"] or model["recompute"])
    )
    return (
        f"{model['depth']} layers of {'+'.join(model['layers'])}, width {model['width']}, "
        f"{train['batch_size']} x {train['sequence_length']} tokens per step, {train['dtype']}{again}, "
        f"{parallel['data']} x {parallel['sequence']} ranks (data x sequence), ZeRO {parallel['zero_stage']}, "
        f"{config['runtime']['name']}"
    )


def headlines(report: dict[str, Any]) -> list[str]:
    """The figures of a profile as sentences."""
    speed, step = report["tokens_per_second"], report["step_seconds"]["without_profiler"]
    cost, flops = report["profiler_overhead"], report["flops"]
    exchange, save = report["communication"], report["checkpoint"]
    work = f"{flops['model'] / 1e9:.2f} GFLOP of the model per step, {flops['executed'] / 1e9:.2f} executed"
    if flops["peak_per_second"]:
        work += f"; MFU {flops['mfu']:.1%}, HFU {flops['hfu']:.1%} of a peak of {flops['peak_per_second'] / 1e9:.1f} "
        work += "GFLOP/s (matrix products on all ranks at once, in this run)"
    per_step = f"{1e3 * save['seconds_per_step']:.1f} ms per step, one every {save['every']}"
    return [
        f"{speed['median']:,.0f} tokens/s (quartiles {speed['low']:,.0f} to {speed['high']:,.0f}), "
        f"{1e3 * step['median']:.1f} ms per step (quartiles {1e3 * step['low']:.1f} to {1e3 * step['high']:.1f}), "
        f"{report['parameters']:,} parameters",
        work,
        f"warm-up steps, discarded: {', '.join(f'{1e3 * s:.0f} ms' for s in report['warm_up_seconds']) or 'none'}",
        f"with the profiler, steps take {cost['time']['median']:+.1%} (quartiles {cost['time']['low']:+.1%} to "
        f"{cost['time']['high']:+.1%}), {cost['processor']['median']:+.1%} of CPU time; "
        f"its parts sum to {report['sum_of_parts']:.1%} of the steps as the run itself timed them",
        f"communication: {1e3 * exchange['exposed_seconds']:.1f} ms exposed, "
        f"{1e3 * exchange['hidden_seconds']:.1f} ms overlapped with computation",
        f"a checkpoint takes {save['seconds']:.2f} s for {save['bytes'] / MIB:.1f} MiB: "
        + (per_step if save["every"] else "none asked"),
    ]


TIME_COLUMNS = ("part", "forward ms", "backward ms", "ms", "share")
MEMORY_COLUMNS = ("at the peak, MiB", "first rank", "fullest rank")


def time_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the table of parts, the longest first, and their sum."""
    rows = sorted(by_kind(report["parts"]), key=lambda row: -row["seconds"])
    cells = []
    for row in rows:
        passes = [f"{1e3 * row[each]:.2f}" if row[each] else "" for each in ("forward", "backward")]
        cells.append((row["part"], *passes, f"{1e3 * row['seconds']:.2f}", f"{row['share']:.1%}"))
    total = sum(row["seconds"] for row in rows)
    return [*cells, ("sum", "", "", f"{1e3 * total:.2f}", f"{report['sum_of_parts']:.1%}")]


def memory_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the table of memory."""
    first, fullest = report["memory"][0], max(report["memory"], key=lambda rank: rank["peak_bytes"])
    sizes = {kind: [rank["kinds"][kind] for rank in (first, fullest)] for kind in first["kinds"]}
    sizes["peak"] = [rank["peak_bytes"] for rank in (first, fullest)]
    sizes["peak of the timed steps"] = [rank["run_peak_bytes"] for rank in (first, fullest)]
    moments = [words(rank["peak_part"]) for rank in (first, fullest)]
    return [*((kind, *(f"{size / MIB:.1f}" for size in own)) for kind, own in sizes.items()), ("peak during", *moments)]


def write_pictures(report: dict[str, Any], ranks: list[dict[str, Any]], folder: Path) -> None:
    """The pictures, and the page that holds them and the tables."""
    draw_parts(report, folder / "parts.png", describe(report["config"]))
    draw_layers(report, folder / "layers.png")
    draw_memory(ranks, folder / "memory.png")
    write_page(
        folder / "report.html",
        "Where a training step's time and memory go",
        [
            (describe(report["config"]), text(headlines(report))),
            ("Time", table(TIME_COLUMNS, time_rows(report)) + picture(folder / "parts.png", "time by part")),
            ("Layers", picture(folder / "layers.png", "time and activations by layer")),
            ("Memory", table(MEMORY_COLUMNS, memory_rows(report)) + picture(folder / "memory.png", "memory")),
            ("Machine", text([in_a_line(report["machine"])])),
            ("Configuration", listing(yaml.safe_dump(report["config"], sort_keys=False))),
        ],
    )


# What the table over a sweep's points shows of each report.
SWEEP: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda report: f"{report['tokens_per_second']['median']:,.0f}",
    "quartiles": lambda report: "{low:,.0f} to {high:,.0f}".format(**report["tokens_per_second"]),
    "ms per step": lambda report: f"{1e3 * report['step_seconds']['without_profiler']['median']:.1f}",
    "MFU": lambda report: "" if report["flops"]["mfu"] is None else f"{report['flops']['mfu']:.1%}",
    "exposed ms": lambda report: f"{1e3 * report['communication']['exposed_seconds']:.1f}",
    "overlapped ms": lambda report: f"{1e3 * report['communication']['hidden_seconds']:.1f}",
    "peak MiB": lambda report: f"{max(rank['peak_bytes'] for rank in report['memory']) / MIB:.0f}",
}


def collect(folder: Path, points: list[tuple[tuple[str, ...], dict[str, Any]]]) -> None:
    """Writes the points of a sweep as one table, picture, JSON and page; each is named by the overrides that differ."""
    common = set.intersection(*(set(overrides) for overrides, _ in points))
    reports = [report for _, report in points]
    # `section.key=value` without the section.
    labels = [
        " ".join(re.sub(r"^[^=]*\.", "", word) for word in overrides if word not in common) or "all alike"
        for overrides, _ in points
    ]
    columns = ("point", *SWEEP)
    rows = [(label, *(form(each) for form in SWEEP.values())) for label, each in zip(labels, reports, strict=True)]
    show_table(columns, rows)
    named = zip(labels, points, strict=True)
    write_json(folder / "sweep.json", [{"point": label, "overrides": own} | each for label, (own, each) in named])
    draw_sweep(labels, reports, folder / "sweep.png")
    about = [f"{label}: {describe(report['config'])}" for label, report in zip(labels, reports, strict=True)]
    write_page(
        folder / "sweep.html",
        "Training steps compared",
        [
            ("Points", table(columns, rows) + picture(folder / "sweep.png", "throughput, time, memory")),
            ("Runs", text(about)),
            ("Machine", text([in_a_line(reports[0]["machine"])])),
        ],
    )
    print(f"{folder / 'sweep.html'}, sweep.png, sweep.json")


def main(arguments: list[str]) -> int:
    points: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    sweep: list[Path] = []

    def start(profile: Profile) -> int:
        report = measure(profile)
        if report is None:
            return 0
        print("\n".join([describe(report["config"]), *headlines(report)]))
        show_table(TIME_COLUMNS, time_rows(report))
        show_table(MEMORY_COLUMNS, memory_rows(report))
        print(f"{profile.folder / 'report.html'}, profile.json, parts.png, layers.png, memory.png")
        if HydraConfig.initialized():
            points.append((tuple(HydraConfig.get().overrides.task), report))
            sweep.append(profile.folder.parent)
        return 0

    status = launch("profile_throughput", arguments, read_profile, start)
    if points:
        collect(sweep[0], points)
    return status
