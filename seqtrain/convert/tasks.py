"""What the stages of a recipe train, as the runtime takes it: layers towards their teacher's, a model towards all.

Layers trained a few at a time read their inputs from disk, float32 `[sequences, T, D]` in the run's order. Advancing
them to a later layer needs only the blocks between, so the teacher is streamed once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqtrain.convert.architecture import Architecture, computed_otherwise, layers_alone
from seqtrain.convert.losses import distillation_sum, mean_square_sum, norm_sum, relative_error_sum, with_gradients
from seqtrain.convert.settings import StageConfig
from seqtrain.convert.weights import model_from, recipe_targets
from seqtrain.convert.zeroth_order import Streamed, pieces, seed_of, two_sided
from seqtrain.data import WHOLE_BATCH, Batch, BatchSlice, open_corpus
from seqtrain.data.batches import places_of
from seqtrain.errors import ConfigError
from seqtrain.files import replacing, sha256_of
from seqtrain.mixers import WHOLE
from seqtrain.models import LanguageModel
from seqtrain.models.lora import add_adapters
from seqtrain.models.quantized import quantize
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.optimizers import parameter_groups
from seqtrain.runtime.run_folder import plain
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.task import Trainable, TrainingData, shards_to_verify

# The run that leaves what of the teacher is not the student's.
TEACHER = "teacher"
ERRORS = {"relative": relative_error_sum, "mean_square": mean_square_sum, "norm": norm_sum}


@dataclass(frozen=True)
class Pair:
    """A student and its teacher on disk: `files` are the student's, later ones over earlier ones.

    The first file is the start, which holds of the teacher all that the student has, too; what else the teacher has is
    in the file TEACHER beside it.
    """

    teacher: Architecture
    student: Architecture
    files: tuple[Path, ...]

    @property
    def converted(self) -> tuple[int, ...]:
        """The layers that are not the teacher's."""
        return computed_otherwise(self.teacher, self.student)

    def new(self) -> set[str]:
        """Names of the parameters that conversion added, which nothing of the teacher's is in."""
        before, student = {name for name, _ in self.teacher.build().named_parameters()}, self.student.build()
        taken = {
            f"blocks.{index}.mixer.{path}"
            for index, block in enumerate(student.blocks)
            for path, _ in block.mixer.projections().values()
        }
        # Experts are copies of MLPs.
        taken |= {name for name, _ in student.named_parameters() if ".mlp." in name and ".router." not in name}
        return {name for name, _ in student.named_parameters()} - before - taken

    def load_teacher(self) -> LanguageModel:
        """Raises `FileNotFoundError` before the start is written."""
        rest = self.files[0].with_name(f"{TEACHER}.safetensors")
        return model_from(self.teacher, (self.files[0], *((rest,) if rest.is_file() else ())))


@dataclass(frozen=True)
class Transfer:
    """Each of `layers` alone, from the input of its teacher's layer to that layer's output.

    `inputs`: file of what enters layer `first` for every sequence of the run (`CachedInputs`); empty: layer 0, tokens.
    """

    pair: Pair
    stage: StageConfig
    layers: tuple[int, ...]
    first: int = 0
    inputs: str = ""

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.stage, self.pair) | {"layers": list(self.layers)}

    def build(self, config: PretrainConfig, corpus: Path) -> Trainable:
        stage, pair, new = self.stage, self.pair, self.pair.new()
        rates = {
            name: stage.lr_new if name in new else stage.lr
            for name, _ in pair.student.build().named_parameters()
            if name.split(".")[1] in map(str, self.layers) and ".mixer." in name
        }
        student = model_from(pair.student, pair.files, own=[name for name, rate in rates.items() if rate])
        groups = _groups(student, rates, config)
        mixers = {str(index): student.get_submodule(f"blocks.{index}.mixer") for index in self.layers}
        model = TransferModel(mixers, pair.load_teacher(), first=self.first, error=stage.error)
        return Trainable(
            model, groups, self.data(config, corpus), to_verify=shards_to_verify(open_corpus(corpus, config.data))
        )

    def given(self, file: Path) -> "Transfer":
        """The same on the inputs in `file`, whose name says the layer."""
        return replace(self, first=int(file.stem.removeprefix("layer-")), inputs=str(file))

    def data(self, config: PretrainConfig, corpus: Path) -> TrainingData:
        """What the layers are given."""
        batches = training_data(config, corpus)
        return CachedInputs(batches, self.inputs, config, self.pair.teacher.model.width) if self.inputs else batches

    @torch.no_grad()
    def write_inputs(
        self, config: PretrainConfig, corpus: Path, file: Path, layer: int, progress: Callable[[str, str], None]
    ) -> None:
        """Writes what enters `layer` for every sequence of the run to `file`, atomically, from what this is given."""
        teacher, batches = self.pair.load_teacher(), self.data(config, corpus)
        with replacing(file) as unfinished, unfinished.open("wb") as opened:
            for step in range(config.train.steps):
                batch = batches.at(step)
                x = batch.tokens if batch.tokens.is_floating_point() else teacher.embedding(batch.tokens)
                sequence = SequenceContext(cu_seqlens=batch.cu_seqlens, backend=config.kernels.backend)
                for block in teacher.blocks[self.first : layer]:
                    x, _ = block(x, None, sequence=sequence)
                opened.write(x.float().numpy().tobytes())
                progress("teacher", f"what enters layer {layer}, step {step + 1}")


@dataclass(frozen=True)
class Distillation:
    """The whole model, towards its teacher's distribution, its last hidden states, and the text."""

    pair: Pair
    stage: StageConfig

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.stage, self.pair)

    def build(self, config: PretrainConfig, corpus: Path) -> Trainable:
        student, groups = self.student(config)
        teacher = self.pair.load_teacher() if self.stage.kl or self.stage.hidden else None
        if teacher is not None:
            # The loss multiplies by the head itself, whose numbers the student has, too.
            head = teacher.head.weight
            quantize(teacher, self.stage.teacher)
            teacher.head.weight = head
        kind = ZerothOrderModel if self.stage.kind == "zeroth_order" else DistilledModel
        # Experts count what they are given while a model is in training.
        model = kind(student.train(), teacher, self.stage, first=self.first(student))
        to_verify = shards_to_verify(open_corpus(corpus, config.data))
        return Trainable(model, groups, training_data(config, corpus), to_verify=to_verify)

    def student(self, config: PretrainConfig) -> tuple[LanguageModel, list[dict[str, Any]]]:
        """The student as it is trained, with adapters where the stage has them, and the optimizer's groups."""
        stage, new = self.stage, self.pair.new()
        names = [name for name, _ in self.pair.student.build().named_parameters()]
        lora = stage.trainable == "lora"
        converted = {f"blocks.{index}.mixer" for index in self.pair.converted}
        rates = {name: stage.lr_new for name in names if name in new}
        if not lora:
            inside = {name for name in names if ".".join(name.split(".")[:3]) in converted}
            rates |= dict.fromkeys((set(names) if stage.trainable == "all" else inside) - new, stage.lr)
        if stage.layers:
            chosen = tuple(f"blocks.{index}." for index in stage.layers)
            rates = {name: rate for name, rate in rates.items() if name.startswith(chosen)}
        student = model_from(self.pair.student, self.pair.files, own=[name for name, rate in rates.items() if rate])
        if lora:
            add_adapters(
                student, recipe_targets(student, stage.lora_targets), rank=stage.lora_rank, alpha=stage.lora_alpha
            )
            rates |= {name: stage.lr for name, parameter in student.named_parameters() if parameter.requires_grad}
        return student, _groups(student, rates, config)

    def first(self, student: LanguageModel) -> int:
        """The lowest layer that is trained, or not its teacher's."""
        if any(weight.requires_grad for weight in student.embedding.parameters()):
            return 0
        trained = {name.split(".")[1] for name, each in student.blocks.named_parameters("blocks") if each.requires_grad}
        return min([*map(int, trained), *self.pair.converted], default=len(student.blocks))


class TransferModel(nn.Module):
    """The mixers under training, and the teacher they learn from, which is no part of what is saved or trained."""

    def __init__(self, mixers: Mapping[str, nn.Module], teacher: LanguageModel, *, first: int, error: str):
        super().__init__()
        self.mixers = nn.ModuleDict(mixers)
        # In a tuple, which a module's list of children does not see.
        self.frozen = (teacher,)
        self.first = first
        self.error = ERRORS[error]

    def forward(self, tokens: Tensor, labels: Tensor, *, sequence: SequenceContext = WHOLE) -> Tensor:
        """`tokens`: int64 `[B,T]`, or what enters layer `first`, float `[B,T,D]`. The sum of the layers' errors."""
        [teacher] = self.frozen
        total = torch.zeros((), device=tokens.device)
        layers = range(self.first, max(map(int, self.mixers)) + 1)
        for index, given, expected in layers_alone(teacher, tokens, layers, sequence):
            if str(index) in self.mixers:
                mixer = self.mixers[str(index)]
                came, _ = mixer(given, sequence=sequence)
                weights = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
                total = total + with_gradients(self.error(came, expected, labels), weights)
        return total


class DistilledModel(nn.Module):
    """A student with the teacher it learns from, which is no part of what is saved or trained; None without.

    `first`: the lowest layer that is trained or not its teacher's; those before run once for both, and never backward.
    """

    def __init__(self, student: LanguageModel, teacher: LanguageModel | None, stage: StageConfig, *, first: int = 0):
        super().__init__()
        self.student = student
        self.frozen = (teacher,)
        self.stage, self.first = stage, first

    def forward(self, tokens: Tensor, labels: Tensor, *, sequence: SequenceContext = WHOLE) -> Tensor:
        """`tokens`, `labels`: int64 `[B,T]` -> the stage's loss, a scalar summed over labels that count."""
        student, [teacher] = self.student, self.frozen
        x: Tensor = tokens
        if self.first:
            with torch.no_grad():
                x = student.through(tokens, 0, self.first, sequence=sequence)
        expected = None
        if teacher is not None:
            with torch.no_grad():
                expected = teacher.norm(teacher.through(x, self.first, None, sequence=sequence))
        return self.loss(student.norm(student.through(x, self.first, None, sequence=sequence)), expected, labels)

    def loss(self, hidden: Tensor, expected: Tensor | None, labels: Tensor) -> Tensor:
        """Of last hidden states, the student's and its teacher's, `[B,T,D]`."""
        stage, student, [teacher] = self.stage, self.student, self.frozen
        loss = torch.zeros((), device=hidden.device)
        if stage.kl or stage.ce:
            loss = distillation_sum(
                hidden.flatten(0, 1),
                student.head.weight,
                None if expected is None or not stage.kl else expected.flatten(0, 1),
                None if teacher is None else teacher.head.weight,
                labels.flatten(),
                kl=stage.kl,
                ce=stage.ce,
                temperature=stage.temperature,
                chunk=student.config.loss_chunk,
            )
        if stage.hidden:
            assert expected is not None
            loss = loss + stage.hidden * ERRORS[stage.error](hidden, expected, labels)
        return loss


class ZerothOrderModel(DistilledModel):
    """The same, whose gradient is found by two forward passes."""

    def forward(self, tokens: Tensor, labels: Tensor, *, sequence: SequenceContext = WHOLE) -> Tensor:
        parts = pieces(tokens, labels, sequence, self.stage.segment)
        [teacher] = self.frozen

        def loss() -> Tensor:
            models = [None if model is None else Streamed(model) for model in (self.student, teacher)]
            total = torch.zeros((), device=tokens.device)
            for part in parts:
                hidden, expected = (None if model is None else model.hidden(part) for model in models)
                assert hidden is not None
                total = total + self.loss(hidden, expected, part.labels)
            return total

        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        return two_sided(loss, weights, seed_of(tokens), self.stage.epsilon)


def _fingerprint(stage: StageConfig, pair: Pair) -> dict[str, Any]:
    # How it is computed does not change what comes out.
    told = replace(stage, micro_batch_size=1, sequence_ranks=1, activation_checkpointing=False, layers_at_once=0)
    return {"stage": plain(told), "weights": [sha256_of(file) for file in pair.files]}


def _groups(model: nn.Module, rates: Mapping[str, float], config: PretrainConfig) -> list[dict[str, Any]]:
    """Makes the parameters with a rate above 0 trainable, and gives the optimizer's groups."""
    parameters = dict(model.named_parameters())
    groups = []
    for rate in sorted(set(rates.values()) - {0.0}):
        chosen = [parameters[name] for name, each in sorted(rates.items()) if each == rate]
        for parameter in chosen:
            parameter.requires_grad_()
        groups += parameter_groups(chosen, config.optimizer.weight_decay, rate=rate / config.optimizer.lr)
    return groups


def training_data(config: PretrainConfig, corpus: Path) -> TrainingData:
    """The tokens a stage trains on."""
    if config.data.carry_rows > 1:
        raise ConfigError(f"data.carry_rows={config.data.carry_rows}: a conversion takes rows one by one; use 1")
    opened = open_corpus(corpus, config.data)
    length, batch = config.train.sequence_length, config.train.batch_size
    return opened.training_batches(seed=config.seed, sequence_length=length, batch_size=batch)


class CachedInputs:
    """Training batches that hold, in place of tokens, the inputs `[1,n,D]` that a file has for them."""

    def __init__(self, batches: TrainingData, file: str, config: PretrainConfig, width: int):
        self.batches = batches
        self.batch_size = config.train.batch_size
        self.rows = np.memmap(file, np.float32, "r").reshape(-1, config.train.sequence_length, width)

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """As `seqtrain.data.Batches.at`, but for the tokens."""
        batch, rows = self.batches.at(index, part), part.rows(self.batch_size)
        first = index * self.batch_size
        held = self.rows[first + rows.start : first + rows.stop].reshape(1, -1, self.rows.shape[2])
        own = [held[:, place.start : place.stop] for place in places_of(batch.offsets, part.part, part.parts)]
        return replace(batch, tokens=torch.from_numpy(np.concatenate(own, 1)))
