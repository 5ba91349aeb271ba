"""A conversion from beginning to end: load, convert, verify, export, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.architecture import Architecture, architecture_of
from seqtrain.convert.beside import read_others
from seqtrain.convert.export import check_reloaded, export, load_tokenizer, long_generation, refuse_existing
from seqtrain.convert.manifest import ConversionManifest
from seqtrain.convert.policy import kept_layers, restore_one_layer
from seqtrain.convert.report import heading, write
from seqtrain.convert.settings import ConvertConfig
from seqtrain.convert.sources import Source, open_source
from seqtrain.convert.stages import Training, identity, prepare_training, remove_weights
from seqtrain.convert.student import load_student, student_of, teacher_beside
from seqtrain.convert.texts import Text
from seqtrain.convert.verify import (
    Judge,
    cache_bytes,
    check_generation,
    end_checks,
    gap_closed,
    goals,
    layer_errors,
    read_texts,
    start_checks,
)
from seqtrain.memory import AnonymousPeak
from seqtrain.models import LanguageModel

Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class _Plan:
    """What is converted to what, and what it is compared on."""

    config: ConvertConfig
    progress: Progress
    source: Source
    teacher: Architecture
    texts: list[Text]
    tokenizer: Any

    @property
    def tokens(self) -> Tensor:
        """One row for checks, `[1,T]`."""
        return self.texts[0].tokens[:1]

    def load(self, architecture: Architecture, dtype: torch.dtype) -> LanguageModel:
        told = lambda name: self.progress("load", name)  # noqa: E731
        return load_student(architecture, self.source, dtype=dtype, seed=self.config.seed, progress=told)

    def importance(self) -> list[float]:
        """Of every layer."""
        student = self.load(student_of(self.teacher, self.config, ()), torch.float32)
        told = lambda name: self.progress("choose layers", name)  # noqa: E731
        return restore_one_layer(student, teacher_beside(student, self.teacher), self.tokens, told)


def convert(config: ConvertConfig, progress: Progress = lambda stage, what: None) -> dict[str, Any]:
    """Converts, and returns the report.

    `output_dir` then holds `model/`, `report.md` with `report.png`, `report.json`, `layers.json` and `run.json`, and
    `training/` where the recipe has stages: the same call goes on from there where one was stopped or killed.
    `progress(stage, what)` is told what is being done. The report is the same byte for byte for the same source, config
    and machine. Raises `ConfigError` or `CheckpointError` before anything is written, `Stopped` after a signal.
    """
    folder, began = Path(config.output_dir).expanduser(), time.monotonic()
    refuse_existing(folder / "model")
    plan = _plan(config, progress)
    manifest = ConversionManifest.open(folder / "training", identity(config, plan.source.sha256()))
    kept, scores = _choose(plan, manifest)
    architecture = student_of(plan.teacher, config, kept)
    dtype, stages = getattr(torch, config.dtype), config.recipe.stages
    training = prepare_training(config, plan.teacher, architecture, manifest, plan.tokenizer, progress)
    with AnonymousPeak() as loading:
        # Trained in float32, and only then rounded.
        student = plan.load(architecture, torch.float32 if stages else dtype)
    beside = teacher_beside(student, plan.teacher)
    progress("verify", "against the teacher")
    judge = Judge(beside, plan.texts, tokenizer=plan.tokenizer, prompt=config.verify.prompt)
    report = _described(plan, architecture, beside, student)
    report |= {"kept": list(kept), "layer_importance": scores, "training": []}
    report["beside"] = read_others(config.beside, report)
    start = end = judge.measure(student)
    report["layer_errors"] = {"start": (reached := start["layer_errors"])}
    report["checks"] = start_checks(beside, student, plan.tokens)
    del beside
    if stages:
        manifest.choose(kept, scores)
        training.begin(student)
        del student
        student, end, reached = _trained(plan, training, judge, report)
    report |= {"start": start, "end": end, "gap_closed": gap_closed(start, end)}
    report["checks"] += goals(start, end | {"layer_errors": reached}, config.verify)
    peaks, expected = _export(plan, student.to(dtype), architecture, report)
    # One copy of the weights at a time.
    del student, judge
    _check_exported(plan, report, expected)
    run = {"source": config.source, "output_dir": config.output_dir, "seconds": round(time.monotonic() - began, 1)}
    write(folder, report, run | {"peak_anonymous_bytes": {"load": loading.bytes} | peaks})
    remove_weights(folder / "training")
    return report


def _trained(
    plan: _Plan, training: Training, judge: Judge, report: dict[str, Any]
) -> tuple[LanguageModel, dict[str, Any], list[float]]:
    """The student after `training`, what is measured of it, and the errors of its layers after their transfer."""
    errors = report["layer_errors"]
    # From here on the weights of both are those in a file.
    judge.teacher = theirs = training.pair.load_teacher()

    def transferred(name: str, after: LanguageModel) -> None:
        errors[name] = layer_errors(theirs, after, plan.tokens)

    student, report["training"] = training.run(transferred)
    plan.progress("verify", "against the teacher")
    end = judge.measure(student)
    # What a transfer reached is its own error: a later stage gives some of it up for the model as a whole.
    reached = [*errors.values()][-1] if len(errors) > 1 else end["layer_errors"]
    errors["end"] = end["layer_errors"]
    return student, end, reached


def _described(
    plan: _Plan, architecture: Architecture, teacher: LanguageModel, student: LanguageModel
) -> dict[str, Any]:
    """What a report says before anything is measured."""
    return heading(plan.config, plan.source) | {
        "layers": list(architecture.model.layers),
        "parameters": {"teacher": teacher.parameter_count(), "student": student.parameter_count()},
        "texts": {text.name: text.origin for text in plan.texts},
        "cache_bytes_float32": cache_bytes(teacher, student),
    }


def _plan(config: ConvertConfig, progress: Progress) -> _Plan:
    """Everything that is known before weights are read. Raises `ConfigError` or `CheckpointError`."""
    progress("source", config.source)
    source = open_source(config.source, config.source_sha256)
    teacher = architecture_of(source)
    student_of(teacher, config, ()).build()
    texts = read_texts(config.verify, source, seed=config.seed)
    return _Plan(config, progress, source, teacher, texts, load_tokenizer(source))


def _choose(plan: _Plan, manifest: ConversionManifest) -> tuple[tuple[int, ...], list[float] | None]:
    """The layers that stay and their scores, as an unfinished training has chosen them, or chosen now."""
    if manifest.chosen:
        return tuple(manifest.chosen["kept"]), manifest.chosen["importance"]
    return kept_layers(plan.config.keep, plan.teacher.model.depth, plan.importance)


def _export(
    plan: _Plan, student: LanguageModel, architecture: Architecture, report: dict[str, Any]
) -> tuple[dict[str, int], Tensor]:
    """Checks and writes the student; the bytes it and its writing took, and its logits on `plan.tokens`."""
    folder = Path(plan.config.output_dir).expanduser()
    report["checks"] += end_checks(student, plan.tokens)
    with torch.no_grad():
        expected = student(plan.tokens, all_logits=True)[0]
    plan.progress("export", str(folder / "model"))
    folder.mkdir(parents=True, exist_ok=True)
    with AnonymousPeak() as saving:
        export(student, architecture, plan.source, folder / "model")
    held = sum(parameter.nbytes for parameter in student.parameters())
    return {"save": saving.bytes, "student": held}, expected


def _check_exported(plan: _Plan, report: dict[str, Any], expected: Tensor) -> None:
    """Loads what was written again, generates with it, and completes `report`."""
    folder, new = Path(plan.config.output_dir).expanduser() / "model", plan.config.verify.generate
    plan.progress("verify", "the exported folder")
    report["checks"] += check_reloaded(folder, plan.tokens, expected)
    report["generation"] = []
    if new:
        plan.progress("verify", f"generating {new} tokens")
        report["generation"] = long_generation(folder, plan.tokens[:, :16], new)
        report["checks"] += check_generation(report["generation"], constant=not report["kept"])
    report["passed"] = all(check["passed"] for check in report["checks"])
