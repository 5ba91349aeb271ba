"""The stages of a recipe, one run of the runtime after the other, resumed where they were left."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from seqtrain.convert.calibrate import calibrate, sizes_of
from seqtrain.convert.facts import write_facts
from seqtrain.convert.settings import ConvertConfig, StageConfig
from seqtrain.convert.tasks import TEACHER, Distillation, Pair, Transfer, training_data
from seqtrain.convert.weights import mapped, model_from, rest_of_teacher, write_tensors
from seqtrain.data import prepare
from seqtrain.data.config import WITHOUT_EFFECT
from seqtrain.errors import CheckpointError, ConfigError
from seqtrain.files import Manifest, remove_folder, sha256_of
from seqtrain.models import LanguageModel
from seqtrain.models.lora import merge_adapters
from seqtrain.runtime import PretrainConfig, check, checkpoint, run
from seqtrain.runtime.optimizers import OptimizerConfig
from seqtrain.runtime.run_folder import RunFolder, plain
from seqtrain.runtime.schedule import ScheduleConfig
from seqtrain.runtime.settings import EvaluationConfig, KernelsConfig, SampleConfig, TrainConfig
from seqtrain.testing import relative_error

START = "start"
# What a stage says of the training loop.
LOOP = ("steps", "sequence_length", "batch_size", "micro_batch_size", "dtype", "gradient_clipping")
# Tokens that the merging of adapters is checked on.
PROBE = 64
Progress = Callable[[str, str], None]


class Stopped(Exception):
    """A signal stopped the training; what was done is kept. `number`: the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number


@dataclass
class ConversionManifest(Manifest):
    """`manifest.json` in the folder of the training: what it is of, and which of its runs are done.

    `fingerprint`: what decides all that follows (hashes of source and recipe; the seed that random numbers and the
    order of the data follow from). `chosen`: the layers that stay and the scores they were chosen by. `runs`: by name,
    in their order, the hash of the weights each left, and what it reports.
    """

    error = CheckpointError
    remedy = "delete the folder to start the training again"

    # Older files call it `identity`.
    fingerprint: Annotated[dict[str, Any], Field(validation_alias=AliasChoices("fingerprint", "identity"))]
    chosen: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = 1
    folder: Path = field(default=Path(), kw_only=True)

    @classmethod
    def open(cls, folder: Path, fingerprint: dict[str, Any]) -> "ConversionManifest":
        """The manifest in `folder`, or a new one. Raises `ConfigError` where it is of something else."""
        file = folder / "manifest.json"
        found = cls.read(file) if file.is_file() else cls(fingerprint)
        found.folder = folder
        if differing := sorted(key for key in fingerprint if found.fingerprint.get(key) != fingerprint[key]):
            was, now = found.fingerprint.get(differing[0]), fingerprint[differing[0]]
            raise ConfigError(
                f"output_dir={folder.parent}: holds an unfinished conversion of another {differing[0]} "
                f"({was}, now {now}); use another output_dir"
            )
        return found

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in super().values().items() if key != "folder"}

    def choose(
        self,
        kept: Sequence[int],
        importance: list[float] | None,
        scores: Mapping[str, list[float]] = MappingProxyType({}),
    ) -> None:
        """Notes which layers stay."""
        self.chosen = {"kept": list(kept), "importance": importance, "scores": dict(scores)}
        self._write()

    def done(self, name: str) -> bool:
        """Whether run `name` is finished. Raises `CheckpointError` if its weights are not what they were."""
        if name not in self.runs:
            return False
        file = self.weights(name)
        if not file.is_file() or sha256_of(file) != self.runs[name]["sha256"]:
            raise CheckpointError(f"{file}: is not what the manifest next to it says; remove {self.folder}")
        return True

    def finish(self, name: str, about: dict[str, Any]) -> None:
        """Notes that run `name` is finished and its weights are written."""
        self.runs[name] = about | {"sha256": sha256_of(self.weights(name))}
        self._write()

    def weights(self, name: str) -> Path:
        """The weights that run `name` leaves."""
        return self.folder / f"{name}.safetensors"

    def remove_weights(self) -> None:
        """Removes all of a finished training but the manifest, metrics and curves."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        shutil.rmtree(self.folder / "tokenizer", ignore_errors=True)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(self.folder / "manifest.json")


@dataclass(frozen=True)
class Training:
    """The training of one conversion. `tokenizer`: of Hugging Face; None where the source has none."""

    config: ConvertConfig
    pair: Pair
    manifest: ConversionManifest
    tokenizer: Any
    progress: Progress

    @property
    def tokenizer_folder(self) -> Path:
        return self.manifest.folder / "tokenizer"

    @property
    def begun(self) -> Pair:
        """The pair once its start is written."""
        return replace(self.pair, hashes=(self.manifest.runs[START]["sha256"],))

    def facts_folder(self, name: str) -> Path:
        """Of the made-up text of run `name`."""
        return self.manifest.folder / f"{name}-facts"

    def begin(
        self,
        teacher: LanguageModel,
        student: LanguageModel,
        kept: Sequence[int] = (),
        importance: list[float] | None = None,
        scores: Mapping[str, list[float]] = MappingProxyType({}),
    ) -> None:
        """Keeps the untrained student, from which everything follows, its teacher, the layers that stay, the tokenizer.

        `student`: on the weights of `teacher`.
        """
        self.manifest.choose(kept, importance, scores)
        if not self.manifest.done(START):
            self.manifest.folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save_pretrained(self.tokenizer_folder)
            if rest := rest_of_teacher(teacher, student):
                write_tensors(self.manifest.weights(TEACHER), rest)
                self.manifest.finish(TEACHER, {})
            write_tensors(self.manifest.weights(START), dict(student.named_parameters()))
            self.manifest.finish(START, {})

    def run(
        self, transferred: Callable[[str, LanguageModel], None] = lambda name, student: None
    ) -> tuple[LanguageModel, list[dict[str, Any]]]:
        """Runs every stage that is not done yet; the student after the last, and what each run reports.

        `transferred(stage, student)` is called after each transfer. Raises `Stopped`.
        """
        pair, reports = self.begun, []
        for number, (name, stage) in enumerate(self.config.recipe.stages.items(), 1):
            sizes = f"{stage.steps} steps of {stage.batch_size} x {stage.sequence_length} tokens"
            self.progress("train", f"{name}, {sizes}")
            if stage.text == "facts":
                wanted = stage.steps * stage.batch_size * stage.sequence_length
                place = self.facts_folder(f"{number}-{name}")
                write_facts(place, tokens=wanted, length=stage.sequence_length, seed=self.config.seed)
            kinds = {"transfer": self._transfers, "calibrate": self._calibration}
            runs = kinds.get(stage.kind, self._distillation)
            for finished in runs(f"{number}-{name}", stage, pair):
                about = self.manifest.runs[finished]
                hashes = (*pair.hashes, about["sha256"])
                pair = replace(pair, files=(*pair.files, self.manifest.weights(finished)), hashes=hashes)
                reports.append({"run": finished, **about})
            if stage.kind in kinds:
                transferred(name, model_from(pair.student, pair.files))
        return model_from(pair.student, pair.files, own=mapped(pair.files)), reports

    def check(self) -> None:
        """Raises `ConfigError` for what can't be run, before anything is written."""
        config, converted = self.config, self.pair.converted
        if config.recipe.stages and self.tokenizer is None:
            raise ConfigError(f"recipe={config.recipe.name}: source={config.source} has no tokenizer to read text with")
        if config.recipe.stages and not converted and not config.upcycle.experts:
            raise ConfigError(
                f"recipe={config.recipe.name}: keep={config.keep} leaves no layer to train; use recipe=none"
            )
        for name, stage in config.recipe.stages.items():
            trained = range(self.pair.teacher.model.depth) if stage.trainable == "all" else converted
            if wrong := sorted(set(stage.layers) - set(trained)):
                rule = f"layer {wrong[0]} was not converted; those are {list(converted)}"
                raise ConfigError(f"recipe.stages.{name}.layers: {rule}")
            check(self._settings(stage, name))

    def _transfers(self, name: str, stage: StageConfig, pair: Pair) -> Iterator[str]:
        """One run for each group of layers."""
        layers = stage.layers or pair.converted
        size = stage.layers_at_once or len(layers)
        groups = [layers[start : start + size] for start in range(0, len(layers), size)]
        for group in groups:
            part = name if len(groups) == 1 else f"{name}-layers-{group[0]:03d}-{group[-1]:03d}"
            task, config = Transfer(pair, stage, group), self._settings(stage, part)
            if not self.manifest.done(part):
                weights = self._train(config, task)
                found = {
                    f"blocks.{key.removeprefix('mixers.').replace('.', '.mixer.', 1)}": weights[key] for key in weights
                }
                write_tensors(self.manifest.weights(part), found)
                self._finish(part, config, {"layers": list(group)})
            yield part

    def _calibration(self, name: str, stage: StageConfig, pair: Pair) -> Iterator[str]:
        """Of the first batch of the stage."""
        if not self.manifest.done(name):
            layers, config = stage.layers or pair.converted, self._settings(stage, name)
            batch = training_data(config, prepare(config.data).folder).at(0)
            tokens = batch.tokens.view(stage.batch_size, stage.sequence_length)
            changed = tuple(f"blocks.{index}.mixer." for index in layers)
            names = [each for each, _ in pair.student.build().named_parameters() if each.startswith(changed)]
            student = model_from(pair.student, pair.files, own=names)
            before, told = mapped(pair.files), partial(self.progress, "calibrate")
            factors = calibrate(pair.load_teacher(), student, tokens, stage.calibrations, layers, told)
            weights = {each: student.get_parameter(each) for each in names}
            found = {each: value for each, value in weights.items() if not torch.equal(value, before[each])}
            write_tensors(self.manifest.weights(name), found)
            self.manifest.finish(name, {"tokens": tokens.numel(), "factors": sizes_of(factors)})
        yield name

    def _distillation(self, name: str, stage: StageConfig, pair: Pair) -> Iterator[str]:
        task, config = Distillation(pair, stage), self._settings(stage, name)
        if not self.manifest.done(name):
            trained = self._train(config, task)
            student, _ = task.student(config)
            weights = {key.removeprefix("student."): value for key, value in trained.items()}
            unknown = student.load_state_dict(weights, strict=False).unexpected_keys
            assert not unknown, unknown
            found, about = self._merged(student, task)
            write_tensors(self.manifest.weights(name), found)
            self._finish(name, config, about)
        yield name

    @torch.no_grad()
    def _merged(self, student: LanguageModel, task: Distillation) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The student's changed weights under their own names, and what merging adapters did to the logits."""
        pair, lora = task.pair, task.stage.trainable == "lora"
        before = mapped(pair.files)
        tokens = torch.arange(PROBE)[None] * 7919 % pair.student.vocab_size
        expected = student(tokens, all_logits=True)[0] if lora else None
        merge_adapters(student)
        found: dict[str, Tensor] = {
            name: value for name, value in student.named_parameters() if not torch.equal(value, before[name])
        }
        if expected is None:
            return found, {}
        merged = model_from(pair.student, pair.files, own=found)
        merged.load_state_dict(found, strict=False)
        about = {"merging_changed_logits_by": relative_error(merged(tokens, all_logits=True)[0], expected)}
        return found, about

    def _settings(self, stage: StageConfig, name: str) -> PretrainConfig:
        """The stage as a run of the runtime."""
        config, student = self.config, self.pair.student
        data = replace(config.data, tokenizer=str(self.tokenizer_folder))
        if stage.text == "facts":
            data = replace(data, source="text", sources=(), path=str(self.facts_folder(name)), packing="document")
            data = replace(data, held_out=0.0, held_out_path="")
        ranks = config.parallel.ranks
        shared = stage.sequence_ranks or ranks
        kept = config.checkpoint.store.rstrip("/")
        return PretrainConfig(
            model=replace(student.model, activation_checkpointing=stage.activation_checkpointing),
            mixer=dict(student.mixers),
            data=data,
            optimizer=OptimizerConfig(
                name=stage.optimizer,
                lr=max(stage.lr_new, stage.lr) or 1.0,
                betas=stage.betas,
                weight_decay=stage.weight_decay,
                rank=stage.optimizer_rank,
            ),
            schedule=ScheduleConfig(warmup_fraction=stage.warmup_fraction, final_lr_ratio=stage.final_lr_ratio),
            train=TrainConfig(**{key: getattr(stage, key) for key in LOOP}),
            evaluation=EvaluationConfig(every=0),
            parallel=replace(config.parallel, data=ranks // shared, sequence=shared),
            runtime=config.runtime,
            checkpoint=replace(config.checkpoint, store=f"{kept}/{name}" if kept else ""),
            tracking=config.tracking,
            sample=SampleConfig(tokens=0),
            kernels=KernelsConfig(),
            seed=config.seed,
            output_dir=str(self.manifest.folder / name),
        )

    def _train(self, config: PretrainConfig, task: Transfer | Distillation) -> dict[str, Tensor]:
        """The weights under training, after it."""
        summary = run(config, task)
        if summary["stopped"]:
            raise Stopped(summary["stopped_by_signal"])
        found = checkpoint.find(RunFolder(Path(config.output_dir), config.checkpoint.store).checkpoints)
        assert found is not None, config.output_dir
        assert found.progress.step == config.train.steps, found
        return found.state_dict()

    def _finish(self, name: str, config: PretrainConfig, about: dict[str, Any]) -> None:
        folder = Path(config.output_dir)
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
        quarter = max(len(losses) // 4, 1)
        first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
        self.manifest.finish(name, about | {"tokens": tokens, "loss": {"first quarter": first, "last quarter": last}})
        remove_folder(RunFolder(folder, config.checkpoint.store).checkpoints)


def fingerprint(config: ConvertConfig, source_sha256: str) -> dict[str, Any]:
    """What decides the outcome of a training: two with the same fingerprint come to the same weights."""
    told = {key: plain(getattr(config, key)) for key in ("recipe", "layer", "upcycle", "data")}
    for key in WITHOUT_EFFECT:
        del told["data"][key]
    hashed = {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in told.items()
    }
    keep = config.keep if isinstance(config.keep, str) else list(config.keep)
    chosen = {"keep": keep} | ({"keep_score": config.keep_score} if "budget" in str(keep) else {})
    return {"source": source_sha256, "target": config.target, **chosen, "seed": config.seed} | hashed
