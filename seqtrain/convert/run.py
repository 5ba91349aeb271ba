"""A conversion from beginning to end: load, convert, verify, export, report."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqtrain.convert.architecture import Architecture, architecture_of, student_of
from seqtrain.convert.export import check_reloaded, export, long_generation, refuse_existing
from seqtrain.convert.manifest import ConversionManifest
from seqtrain.convert.measure import Evaluator, layer_errors
from seqtrain.convert.policy import kept_layers, restore_one_layer
from seqtrain.convert.report import heading, read_others, write
from seqtrain.convert.settings import ConvertConfig
from seqtrain.convert.sources import Source, open_source
from seqtrain.convert.stages import START, Progress, Training, fingerprint, remove_weights
from seqtrain.convert.tasks import Pair
from seqtrain.convert.texts import Text, read_texts
from seqtrain.convert.verify import cache_bytes, check_generation, end_checks, gap_closed, goals, start_checks
from seqtrain.convert.weights import load_student, teacher_sharing
from seqtrain.memory import AnonymousPeak
from seqtrain.models import LanguageModel


@dataclass(frozen=True)
class _Plan:
    """What is converted to what, and what it is compared on. `folder`: where to."""

    config: ConvertConfig
    progress: Progress
    source: Source
    teacher: Architecture
    texts: list[Text]
    tokenizer: Any
    folder: Path

    @property
    def tokens(self) -> Tensor:
        """One row for checks, `[1,T]`."""
        return self.texts[0].tokens[:1]

    def load(self, architecture: Architecture, dtype: torch.dtype) -> LanguageModel:
        told = partial(self.progress, "load")
        return load_student(architecture, self.source, dtype=dtype, seed=self.config.seed, progress=told)

    def importance(self) -> list[float]:
        """Of every layer."""
        student = self.load(student_of(self.teacher, self.config, ()), torch.float32)
        told = partial(self.progress, "choose layers")
        return restore_one_layer(student, teacher_sharing(student, self.teacher), self.tokens, told)


def convert(config: ConvertConfig, progress: Progress = lambda stage, what: None) -> dict[str, Any]:
    """Converts, and returns the report.

    `output_dir` then holds `model/`, `report.md` with `report.png`, `report.json`, `layers.json` and `run.json`, and
    `training/` where the recipe has stages: the same call resumes one that was stopped or killed.
    `progress(stage, what)` is told what is being done. The report is the same byte for byte for the same source, config
    and machine. Raises `ConfigError` or `CheckpointError` before anything is written, `Stopped` after a signal.
    """
    folder, began = Path(config.output_dir).expanduser(), time.monotonic()
    refuse_existing(folder / "model")
    plan = _plan(config, progress, folder)
    manifest = ConversionManifest.open(folder / "training", fingerprint(config, plan.source.sha256()))
    # As an unfinished training has chosen them.
    kept, scores = (manifest.chosen["kept"], manifest.chosen["importance"]) if manifest.chosen else _choose(plan)
    architecture = student_of(plan.teacher, config, kept)
    pair = Pair(plan.teacher, architecture, (manifest.weights(START),))
    training = Training(config, pair, manifest, plan.tokenizer, progress)
    training.check()
    report = heading(config, plan.source)
    chosen = {"kept": list(kept), "layer_importance": scores}
    student, peaks = _measured_and_trained(plan, training, chosen, report)
    with torch.no_grad():
        expected = student(plan.tokens, all_logits=True)[0]
    peaks |= _export(plan, student, architecture)
    # One copy of the weights at a time.
    del student
    _check_exported(plan, report, expected)
    run = {"source": config.source, "output_dir": config.output_dir, "seconds": round(time.monotonic() - began, 1)}
    write(folder, report, run | {"peak_anonymous_bytes": peaks})
    remove_weights(folder / "training")
    return report


def _plan(config: ConvertConfig, progress: Progress, folder: Path) -> _Plan:
    """Everything that is known before weights are read. Raises `ConfigError` or `CheckpointError`."""
    progress("source", config.source)
    source = open_source(config.source, config.source_sha256)
    teacher = architecture_of(source)
    student_of(teacher, config, ()).build()
    texts = read_texts(config.verify, source, seed=config.seed)
    return _Plan(config, progress, source, teacher, texts, source.tokenizer(), folder)


def _choose(plan: _Plan) -> tuple[tuple[int, ...], list[float] | None]:
    return kept_layers(plan.config.keep, plan.teacher.model.depth, plan.importance)


def _measured_and_trained(
    plan: _Plan, training: Training, chosen: dict[str, Any], report: dict[str, Any]
) -> tuple[LanguageModel, dict[str, int]]:
    """The student, trained where the recipe has stages, and the peak memory of loading it; completes `report`."""
    config, stages, dtype = plan.config, plan.config.recipe.stages, getattr(torch, plan.config.dtype)
    with AnonymousPeak() as loading:
        # Trained in float32, and only then rounded.
        student = plan.load(training.pair.student, torch.float32 if stages else dtype)
    teacher = teacher_sharing(student, plan.teacher)
    plan.progress("verify", "against the teacher")
    evaluator = Evaluator(teacher, plan.texts, tokenizer=plan.tokenizer, prompt=config.verify.prompt)
    report |= {
        "layers": list(training.pair.student.model.layers),
        "parameters": {"teacher": teacher.parameter_count(), "student": student.parameter_count()},
        "texts": {text.name: text.origin for text in plan.texts},
        "cache_bytes_float32": cache_bytes(teacher, student),
        **chosen,
        "training": [],
    }
    report["beside"] = read_others(config.beside, report)
    start = end = evaluator.measure(student)
    report["layer_errors"] = {"start": (reached := start["layer_errors"])}
    report["checks"] = start_checks(teacher, student, plan.tokens)
    del teacher
    if stages:
        training.begin(student, **chosen)
        del student
        student, end, reached = _trained(plan, training, evaluator, report)
    report |= {"start": start, "end": end, "gap_closed": gap_closed(start, end)}
    report["checks"] += goals(start, end | {"layer_errors": reached}, config.verify)
    student = student.to(dtype)
    report["checks"] += end_checks(student, plan.tokens)
    return student, {"load": loading.bytes}


def _trained(
    plan: _Plan, training: Training, evaluator: Evaluator, report: dict[str, Any]
) -> tuple[LanguageModel, dict[str, Any], list[float]]:
    """The student after `training`, what is measured of it, and the errors of its layers after their transfer."""
    errors = report["layer_errors"]
    # From here on the weights of both are those in a file.
    evaluator.teacher = theirs = training.pair.load_teacher()

    def transferred(name: str, after: LanguageModel) -> None:
        errors[name] = layer_errors(theirs, after, plan.tokens)

    student, report["training"] = training.run(transferred)
    plan.progress("verify", "against the teacher")
    end = evaluator.measure(student)
    # What a transfer reached is its own error: a later stage gives some of it up for the model as a whole.
    reached = [*errors.values()][-1] if len(errors) > 1 else end["layer_errors"]
    errors["end"] = end["layer_errors"]
    return student, end, reached


def _export(plan: _Plan, student: LanguageModel, architecture: Architecture) -> dict[str, int]:
    """Writes the student; the bytes that it and its writing took."""
    plan.progress("export", str(plan.folder / "model"))
    plan.folder.mkdir(parents=True, exist_ok=True)
    with AnonymousPeak() as saving:
        export(student, architecture, plan.source, plan.folder / "model")
    return {"save": saving.bytes, "student": sum(parameter.nbytes for parameter in student.parameters())}


def _check_exported(plan: _Plan, report: dict[str, Any], expected: Tensor) -> None:
    """Loads what was written again, generates with it, and completes `report`."""
    folder, new = plan.folder / "model", plan.config.verify.generate
    plan.progress("verify", "the exported folder")
    report["checks"] += check_reloaded(folder, plan.tokens, expected)
    report["generation"] = []
    if new:
        plan.progress("verify", f"generating {new} tokens")
        report["generation"] = long_generation(folder, plan.tokens[:, :16], new)
        report["checks"] += check_generation(report["generation"], constant=not report["kept"])
    report["passed"] = all(check["passed"] for check in report["checks"])
