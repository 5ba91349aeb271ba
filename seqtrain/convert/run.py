"""Turns a pretrained Transformer into a recurrent model, trained towards its teacher.

    python launch/convert.py source=path/to/SmolLM2-135M target=gla recipe=transfer_then_kl output_dir=converted
    python launch/convert.py source=path/to/model.gguf target=gated_delta_net keep=every:4 recipe=lolcats
    python launch/convert.py source=path/to/Qwen3-0.6B target=liger_gla recipe=liger layer.window=128

Reads Llama, Mistral, Qwen2, Qwen3 or SmolLM2 checkpoints (safetensors or GGUF). Softmax attention becomes a window and
a recurrent state in all layers but those that `keep` names; a model that keeps none generates in constant memory.
`output_dir` gets the model in Hugging Face's form, report.md and report.json; the same command resumes what stopped.
"""

import sys
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from seqtrain.config import launch
from seqtrain.convert import verify
from seqtrain.convert.architecture import Architecture, architecture_of, changes, kept_layers, student_of
from seqtrain.convert.importance import combined, hessian_traces, rank_correlations, restore_one_layer
from seqtrain.convert.measure import PASSAGE, Evaluator, layer_errors, read_texts
from seqtrain.convert.report import heading, read_others, write
from seqtrain.convert.settings import ConvertConfig, read_convert_config
from seqtrain.convert.stages import START, ConversionManifest, Progress, Stopped, Training, fingerprint
from seqtrain.convert.tasks import Pair
from seqtrain.convert.weights import export, load_teacher, origin_of_export, refuse_existing, student_on
from seqtrain.errors import ConfigError
from seqtrain.memory import AnonymousPeak
from seqtrain.models import LanguageModel, pretrained
from seqtrain.models.families import is_servable
from seqtrain.models.gguf_writer import check_writable, write_gguf
from seqtrain.models.pretrained import family_of_config
from seqtrain.models.source import open_source
from seqtrain.runtime.guard import guarded
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.resume import claimed
from seqtrain.runtime.run_folder import RunFolder


def main(arguments: Sequence[str]) -> int:
    """Converts as `arguments` say; gives the exit status.

    0, 1 where a check of the new model failed, 2 for a mistake, 128 + the signal's number where one stopped the
    training, which the same command with that output_dir resumes.
    """
    return launch("convert", arguments, read_convert_config, start)


def start(config: ConvertConfig) -> int:
    """Converts, and prints the outcome; where Ray trains, in a process of its own."""
    if config.runtime.name == "inline" or not config.recipe.stages:
        return _convert_and_tell(config)
    folder = Path(config.output_dir).expanduser()

    def log_file() -> Path:
        """Of the stage that ran last."""
        logs = (folder / "training").glob("*/run.log")
        return max(logs, key=lambda file: file.stat().st_mtime, default=folder / "run.log")

    kept = f"the same command with output_dir={config.output_dir} goes on from what is saved"
    return guarded(lambda: _convert_and_tell(config), log_file, resume=lambda: kept)


def _convert_and_tell(config: ConvertConfig) -> int:
    console, stages = Console(stderr=True), [""]
    with console.status("") as status:

        def told(stage: str, what: str) -> None:
            if stage == "train":
                # The runtime shows how far it is.
                status.stop()
                print(f"training: {what}", file=sys.stderr)
            elif not console.is_terminal:
                if stage != stages[-1]:
                    print(f"{stage}: {what}", file=sys.stderr)
            else:
                status.start()
                status.update(f"{stage}: {what}")
            stages.append(stage)

        try:
            report = convert(config, told)
        except Stopped as stopped:
            print(f"stopped; the same command with output_dir={config.output_dir} resumes it", file=sys.stderr)
            return 128 + stopped.number
    for text, found in report["end"]["texts"].items():
        print(f"perplexity on {text}:", ", ".join(f"{name} {value:.2f}" for name, value in found["perplexity"].items()))
    for check in report["checks"]:
        if not check["passed"]:
            print(f"FAILED: {check['name']}: {check['error']:.1e}, at most {check['limit']:.0e}")
    print(f"model: {config.output_dir}/model, report: {config.output_dir}/report.md")
    return 0 if report["passed"] else 1


def convert(config: ConvertConfig, progress: Progress = lambda stage, what: None) -> dict[str, Any]:
    """Converts, and returns the report.

    `output_dir` then holds `model/`, `report.md` with `report.png`, `report.json`, `layers.json` and `run.json`, and
    `training/` where the recipe has stages: the same call resumes one that was stopped or killed.
    `progress(stage, what)` is told what is being done. The report is the same byte for byte for the same source, config
    and machine. Raises `ConfigError` or `CheckpointError` before anything is written, `Stopped` after a signal.
    """
    began = time.monotonic()
    conversion = _Conversion(config, progress)
    folder, manifest = RunFolder(conversion.folder), conversion.training.manifest
    seconds = config.runtime.lease_seconds
    with claimed(folder, uuid.uuid4().hex[:8], lease_seconds=seconds, began=manifest.folder) as lease:
        refuse_existing(conversion.folder / "model")
        # Whoever held the folder until now may have got further.
        if manifest != ConversionManifest.open(manifest.folder, manifest.fingerprint):
            conversion = _Conversion(config, progress)
        return _convert(conversion, lease, began)


def _convert(conversion: "_Conversion", lease: Lease, began: float) -> dict[str, Any]:
    config = conversion.config
    student, peaks = conversion.measured_and_trained()
    with torch.no_grad():
        expected = student(conversion.tokens, all_logits=True)[0]
    # Training takes long: the folder may be another's by now.
    lease.check()
    peaks |= conversion.export(student)
    # One copy of the weights at a time.
    del student
    conversion.check_exported(expected)
    run = {"source": config.source, "output_dir": config.output_dir, "seconds": round(time.monotonic() - began, 1)}
    lease.check()
    write(conversion.folder, conversion.report, run | {"peak_anonymous_bytes": peaks})
    conversion.training.manifest.remove_weights()
    return conversion.report


class _Conversion:
    """What is converted to what, and what it is compared on; the steps of doing it complete `report`."""

    def __init__(self, config: ConvertConfig, progress: Progress):
        """Finds out all that is to be known before anything is written. Raises `ConfigError` or `CheckpointError`."""
        self.config, self.progress, self.folder = config, progress, Path(config.output_dir).expanduser()
        refuse_existing(self.folder / "model")
        progress("source", config.source)
        self.source = open_source(config.source, config.source_sha256)
        self.teacher = architecture_of(self.source)
        pretrained.places_of(self.teacher.build(), self.source)
        self.texts = read_texts(config.verify, self.source, seed=config.seed)
        # How far back passages are asked for that the texts are long enough for.
        most = self.texts[0].tokens.numel() - PASSAGE
        self.distances = [distance for distance in config.verify.recall if distance < most]
        self.scores: dict[str, list[float]] = {}
        # One row for checks, `[1,T]`.
        self.tokens = self.texts[0].tokens[:1]
        self.tokenizer = self.source.tokenizer()
        manifest = ConversionManifest.open(self.folder / "training", fingerprint(config, self.source.sha256()))
        if manifest.chosen:
            # By an unfinished training.
            self.kept, self.importance = manifest.chosen["kept"], manifest.chosen["importance"]
            self.scores = manifest.chosen.get("scores", {})
        else:
            depth, every = self.teacher.model.depth, is_servable(config.target) or config.upcycle.experts > 0
            # What no choice of layers can make good.
            student_of(self.teacher, config, ()).build()
            self.kept, self.importance = kept_layers(config.keep, depth, self._measured_importance, every=every)
        self.student = student_of(self.teacher, config, self.kept)
        if is_servable(config.target):
            if not self.kept:
                rule = "leaves no softmax attention, without which transformers runs none; keep one layer at least"
                raise ConfigError(f"keep={config.keep}: target={config.target}: {rule}")
            origin = origin_of_export(self.student.build(), config.target, self.source)
        if config.gguf != "none":
            values = family_of_config(origin.config)[1] if is_servable(config.target) else None
            check_writable(config.target, values, f"gguf={config.gguf}")
        for what, layers in self.changed().items():
            progress("target", f"{config.target}'s attention {what}: layers {layers} stay, but are not their teacher's")
        pair = Pair(self.teacher, self.student, (manifest.weights(START),))
        self.training = Training(config, pair, manifest, self.tokenizer, progress)
        self.training.check()
        self.report = heading(config, self.source)

    def changed(self) -> dict[str, list[int]]:
        """What attention that stays has or lacks against its teacher's, and in which layers."""
        found: dict[str, list[int]] = {}
        for index, what in changes(self.teacher, self.student).items():
            found.setdefault(what, []).append(index)
        return found

    def _load(self, architecture: Architecture, dtype: torch.dtype) -> tuple[LanguageModel, LanguageModel]:
        """The teacher, and a student on its weights."""
        teacher = load_teacher(self.source, dtype=dtype, progress=partial(self.progress, "load"))
        return teacher, student_on(teacher, architecture, seed=self.config.seed)

    def _measured_importance(self) -> list[float]:
        """Of every layer."""
        config, tokens = self.config, self.texts[0].tokens
        teacher, student = self._load(student_of(self.teacher, config, ()), torch.float32)
        told = partial(self.progress, "choose layers")
        self.scores = restore_one_layer(student, teacher, tokens, max(self.distances, default=0), told)
        del student
        told("traces")
        self.scores["trace"] = hessian_traces(teacher, tokens, seed=config.seed)
        for names, correlation in rank_correlations(self.scores).items():
            told(f"rank correlation of {names}: {correlation:.2f}")
        return combined(self.scores, config.keep_score)

    def measured_and_trained(self) -> tuple[LanguageModel, dict[str, int]]:
        """The student, trained where the recipe has stages, and the peak memory of loading it."""
        config, report = self.config, self.report
        stages, dtype = config.recipe.stages, getattr(torch, config.dtype)
        with AnonymousPeak() as loading:
            # Trained in float32, and only then rounded.
            teacher, student = self._load(self.student, torch.float32 if stages else dtype)
        self.progress("verify", "against the teacher")
        evaluator = Evaluator(
            teacher, self.texts, tokenizer=self.tokenizer, prompt=config.verify.prompt, distances=self.distances
        )
        report |= {
            "layers": list(self.student.model.layers),
            "parameters": {"teacher": teacher.parameter_count(), "student": student.parameter_count()},
            "texts": {text.name: text.origin for text in self.texts},
            "cache_bytes_float32": verify.cache_bytes(teacher, student),
            "kept": list(self.kept),
            "changed": self.changed(),
            "layer_importance": self.importance,
            "layer_scores": self.scores,
            "rank_correlations": rank_correlations(self.scores),
            "training": [],
        }
        report["beside"] = read_others(config.beside, report)
        start = end = evaluator.measure(student)
        report["layer_errors"] = {"start": (reached := start["layer_errors"])}
        report["checks"] = verify.start_checks(
            teacher, student, self.tokens, identical=not self.training.pair.converted
        )
        if stages:
            self.training.begin(teacher, student, self.kept, self.importance, self.scores)
            del teacher, student
            student, end, reached = self._trained(evaluator)
        report |= {"start": start, "end": end, "gap_closed": verify.gap_closed(start, end)}
        if stages:
            report["checks"] += verify.goals(start, end | {"layer_errors": reached}, config.verify)
        student = student.to(dtype)
        report["checks"] += verify.end_checks(student, self.tokens)
        return student, {"load": loading.bytes}

    def _trained(self, evaluator: Evaluator) -> tuple[LanguageModel, dict[str, Any], list[float]]:
        """The student after training, what is measured of it, and the errors of its layers after their transfer."""
        errors = self.report["layer_errors"]
        # From here on the weights of both are those in a file.
        evaluator.teacher = theirs = self.training.pair.load_teacher()

        def transferred(name: str, after: LanguageModel) -> None:
            errors[name] = layer_errors(theirs, after, self.tokens)

        student, self.report["training"] = self.training.run(transferred)
        self.progress("verify", "against the teacher")
        end = evaluator.measure(student)
        # What a transfer reached is its own error: a later stage gives some of it up for the model as a whole.
        reached = [*errors.values()][-1] if len(errors) > 1 else end["layer_errors"]
        errors["end"] = end["layer_errors"]
        return student, end, reached

    def export(self, student: LanguageModel) -> dict[str, int]:
        """Writes the student; the bytes that it and its writing took."""
        self.progress("export", str(self.folder / "model"))
        with AnonymousPeak() as saving:
            family = self.config.target if is_servable(self.config.target) else ""
            export(student, self.student, self.source, self.folder / "model", family)
            if self.config.gguf != "none":
                # Of a GGUF file, its own tokenizer.
                written = open_source(str(self.folder / "model"))
                write_gguf(written, self.folder / "model.gguf", kind=self.config.gguf, vocabulary=self.source.opened)
        return {"save": saving.bytes, "student": sum(parameter.nbytes for parameter in student.parameters())}

    def check_exported(self, expected: Tensor) -> None:
        """Loads what was written again, and generates with it."""
        from transformers import AutoModelForCausalLM

        new, report = self.config.verify.generate, self.report
        self.progress("verify", "the exported folder")
        model = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype="auto").eval()
        report["checks"] += verify.check_reloaded(model, self.tokens, expected)
        report["generation"] = []
        if new:
            self.progress("verify", f"generating {new} tokens")
            report["generation"] = verify.long_generation(model, self.tokens[:, :16], new)
            report["checks"] += verify.check_generation(report["generation"], constant=not report["kept"])
        report["passed"] = all(check["passed"] for check in report["checks"])
