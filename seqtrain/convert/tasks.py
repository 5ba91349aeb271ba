"""What the stages of a recipe train, as the runtime takes it: layers towards their teacher's, a model towards all.

The teacher is a part of what is trained, frozen: it lies where the student lies, ZeRO 3 divides it, and no checkpoint
holds it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqtrain.convert.architecture import Architecture, computed_otherwise, layers_alone
from seqtrain.convert.losses import distillation_sum, mean_square_sum, norm_sum, relative_error_sum, with_gradients
from seqtrain.convert.settings import StageConfig
from seqtrain.convert.weights import mapped, model_from, recipe_targets
from seqtrain.convert.zeroth_order import Streamed, pieces, seed_of, two_sided
from seqtrain.data import open_corpus
from seqtrain.errors import ConfigError
from seqtrain.initialization import Fill
from seqtrain.layers import upcast
from seqtrain.mixers import WHOLE
from seqtrain.models import LanguageModel
from seqtrain.models.lora import add_adapters
from seqtrain.models.quantized import quantize
from seqtrain.parallel.recompute import recomputed
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime.optimizers import parameter_groups
from seqtrain.runtime.run_folder import plain
from seqtrain.runtime.segmented import Segment
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.task import Trainable, TrainingData, shards_to_verify

# The run that leaves what of the teacher is not the student's.
TEACHER = "teacher"
ERRORS = {"relative": relative_error_sum, "mean_square": mean_square_sum, "norm": norm_sum}


@dataclass(frozen=True)
class Pair:
    """A student and its teacher on disk: `files` are the student's, later ones over earlier ones.

    The first file is the start, which holds of the teacher all that the student has, too; what else the teacher has is
    in the file TEACHER beside it. `hashes`: SHA-256 of each file, which no rank then finds again. Without files both
    are on the meta device.
    """

    teacher: Architecture
    student: Architecture
    files: tuple[Path, ...]
    hashes: tuple[str, ...] = ()

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

    @property
    def teacher_files(self) -> tuple[Path, ...]:
        rest = self.files[0].with_name(f"{TEACHER}.safetensors")
        return (self.files[0], *((rest,) if rest.is_file() else ()))

    def load_student(self, own: Iterable[str] = ()) -> LanguageModel:
        """Untrained; see `model_from`."""
        return model_from(self.student, self.files, own=own) if self.files else _on_meta(self.student)

    def load_teacher(self) -> LanguageModel:
        """Raises `FileNotFoundError` before the start is written."""
        return model_from(self.teacher, self.teacher_files) if self.files else _on_meta(self.teacher)

    def frozen_teacher(self, stage: StageConfig, config: PretrainConfig) -> tuple[LanguageModel, Fill | None]:
        """The teacher as a stage has it, and what fills it where it lies on the meta device, to be a `teacher`."""
        wanted = stage.teacher
        if wanted == "auto":
            wanted = "bfloat16" if config.runtime.device != "cpu" and torch.cuda.is_available() else "float32"
        if wanted != "bfloat16":
            teacher = self.load_teacher()
            if wanted == "int8":
                # The loss multiplies by the head itself, whose numbers the student has, too.
                head = teacher.head.weight
                quantize(teacher, wanted)
                teacher.head.weight = head
            return teacher, None
        tensors = mapped(self.teacher_files) if self.files else {}

        def fill(name: str, whole: Tensor, own: slice) -> None:
            # All else has its numbers.
            if name.startswith("teacher."):
                whole.view(-1)[own].copy_(tensors[name.removeprefix("teacher.")].view(-1)[own])

        return _on_meta(self.teacher).to(torch.bfloat16), fill


# The model that a stage trains, the optimizer's groups, and what fills what is on the meta device.
Staged = tuple[nn.Module, list[dict[str, Any]], Fill | None]


@dataclass(frozen=True)
class Transfer:
    """Each of `layers` alone, from the input of its teacher's layer to that layer's output."""

    pair: Pair
    stage: StageConfig
    layers: tuple[int, ...]

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.stage, self.pair) | {"layers": list(self.layers)}

    def build(self, config: PretrainConfig, corpus: Path) -> Trainable:
        return _trainable(*self.model(config), config, corpus)

    def model(self, config: PretrainConfig) -> Staged:
        stage, pair, new = self.stage, self.pair, self.pair.new()
        rates = {
            name: stage.lr_new if name in new else stage.lr
            for name, _ in pair.student.build().named_parameters()
            if name.split(".")[1] in map(str, self.layers) and ".mixer." in name
        }
        student = _trained_copy(pair, rates, divided=(divided := config.parallel.zero_stage == 3))
        groups = _groups(student, rates, config)
        mixers = {str(index): student.get_submodule(f"blocks.{index}.mixer") for index in self.layers}
        teacher, fill = pair.frozen_teacher(stage, config)
        model = TransferModel(mixers, teacher, error=stage.error, divided=divided)
        return model, groups, fill


@dataclass(frozen=True)
class Distillation:
    """The whole model, towards its teacher's distribution, its last hidden states, and the text."""

    pair: Pair
    stage: StageConfig

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.stage, self.pair)

    def build(self, config: PretrainConfig, corpus: Path) -> Trainable:
        return _trainable(*self.model(config), config, corpus)

    def model(self, config: PretrainConfig) -> Staged:
        student, groups = self.student(config, divided=config.parallel.zero_stage == 3)
        teacher, fill = None, None
        if self.stage.kl or self.stage.hidden:
            teacher, fill = self.pair.frozen_teacher(self.stage, config)
        kind = ZerothOrderModel if self.stage.kind == "zeroth_order" else DistilledModel
        # Experts count what they are given while a model is in training.
        model = kind(student.train(), teacher, self.stage, first=self.first(student))
        return model, groups, fill

    def student(self, config: PretrainConfig, *, divided: bool = False) -> tuple[LanguageModel, list[dict[str, Any]]]:
        """The student as it is trained, with adapters where the stage has them, and the optimizer's groups.

        `divided`: see `_trained_copy`.
        """
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
        # As it is computed in this stage.
        network = replace(self.pair.student.model, activation_checkpointing=stage.activation_checkpointing)
        pair = replace(self.pair, student=replace(self.pair.student, model=network))
        student = _trained_copy(pair, rates, divided=divided)
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
    """The mixers under training, and the teacher they learn from.

    `divided`: whether ZeRO 3 divides the weights: gradients then come in the backward pass, from which each leaves
    for its part, and of a layer its input and its teacher's output are kept till then.
    """

    def __init__(self, mixers: Mapping[str, nn.Module], teacher: LanguageModel, *, error: str, divided: bool = False):
        super().__init__()
        self.mixers, self.teacher = nn.ModuleDict(mixers), teacher
        self.error, self.divided = ERRORS[error], divided

    def forward(self, tokens: Tensor, labels: Tensor, *, sequence: SequenceContext = WHOLE) -> Tensor:
        """`tokens`: int64 `[B,T]`. The sum of the layers' errors."""
        total = torch.zeros((), device=tokens.device)
        layers = range(max(map(int, self.mixers)) + 1)
        for index, given, expected in layers_alone(self.teacher, tokens, layers, sequence):
            if str(index) not in self.mixers:
                continue
            mixer = self.mixers[str(index)]
            if self.divided:
                arguments = mixer, given, expected, labels, sequence
                total = total + recomputed(self._error, *arguments, keep="sent", sends=sequence.sends)
                continue
            weights = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
            total = total + with_gradients(self._error(mixer, given, expected, labels, sequence), weights)
        return total

    def _error(
        self, mixer: nn.Module, given: Tensor, expected: Tensor, labels: Tensor, sequence: SequenceContext
    ) -> Tensor:
        came, _ = mixer(upcast(given), sequence=sequence)
        return self.error(came, expected, labels)


class DistilledModel(nn.Module):
    """A student with the teacher it learns from; None without.

    `first`: the lowest layer that is trained or not its teacher's; those before run once for both, and never backward.
    """

    def __init__(self, student: LanguageModel, teacher: LanguageModel | None, stage: StageConfig, *, first: int = 0):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.loss = DistillationLoss(student, teacher, stage)
        self.stage, self.first = stage, first

    def forward(self, tokens: Tensor, labels: Tensor, *, sequence: SequenceContext = WHOLE) -> Tensor:
        """`tokens`, `labels`: int64 `[B,T]` -> the stage's loss, a scalar summed over labels that count."""
        student, teacher = self.student, self.teacher
        x: Tensor = tokens
        if self.first:
            with torch.no_grad():
                x = student.through(tokens, 0, self.first, sequence=sequence)
        expected = None
        if teacher is not None:
            with torch.no_grad():
                given = x.to(teacher.norm.weight.dtype) if x.is_floating_point() else x
                expected = teacher.norm(teacher.through(given, self.first, None, sequence=sequence))
        return self.loss(student.norm(student.through(x, self.first, None, sequence=sequence)), expected, labels)


class DistillationLoss(nn.Module):
    """The loss of last hidden states. It holds the matrices of both heads, so that ZeRO 3 gathers them for it."""

    teacher_weight: Tensor | None

    def __init__(self, student: LanguageModel, teacher: LanguageModel | None, stage: StageConfig):
        super().__init__()
        self.stage, self.chunk = stage, student.config.loss_chunk
        self.weight = student.head.weight
        taught: Any = teacher.head.weight if teacher is not None and stage.kl else None
        self.register_parameter("teacher_weight", taught)

    def forward(self, hidden: Tensor, expected: Tensor | None, labels: Tensor) -> Tensor:
        """`hidden`, `expected`: the student's and its teacher's, `[B,T,D]`; `labels`: int64 `[B,T]`."""
        stage = self.stage
        loss = torch.zeros((), device=hidden.device)
        if stage.kl or stage.ce:
            loss = distillation_sum(
                hidden.flatten(0, 1),
                self.weight,
                None if expected is None or not stage.kl else expected.flatten(0, 1),
                self.teacher_weight,
                labels.flatten(),
                kl=stage.kl,
                ce=stage.ce,
                temperature=stage.temperature,
                chunk=self.chunk,
            )
        if stage.hidden:
            assert expected is not None
            loss = loss + stage.hidden * ERRORS[stage.error](hidden, expected, labels)
        return loss


class ZerothOrderModel(DistilledModel):
    """The same, whose gradient is found by two forward passes."""

    def forward(self, tokens: Tensor, labels: Tensor, *, sequence: SequenceContext = WHOLE) -> Tensor:
        parts = pieces(tokens, labels, sequence, self.stage.segment)
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        return two_sided(self._losses(parts), weights, seed_of(tokens), self.stage.epsilon)

    def _losses(self, parts: Sequence[Segment]) -> Iterator[Callable[[int], Tensor]]:
        """Of each piece the loss of either side, whose states go on apart; its teacher runs once for both."""
        sides = Streamed(self.student), Streamed(self.student)
        taught = None if self.teacher is None else Streamed(self.teacher)
        for part in parts:
            expected = None if taught is None else taught.hidden(part)
            yield partial(self._side, sides, part, expected)

    def _side(self, sides: Sequence[Streamed], part: Segment, expected: Tensor | None, side: int) -> Tensor:
        return self.loss(sides[side].hidden(part), expected, part.labels)


def _fingerprint(stage: StageConfig, pair: Pair) -> dict[str, Any]:
    # How it is computed does not change what comes out.
    told = replace(stage, micro_batch_size=1, sequence_ranks=1, activation_checkpointing=False, layers_at_once=0)
    return {"stage": plain(told), "weights": list(pair.hashes)}


def _trained_copy(pair: Pair, rates: Mapping[str, float], *, divided: bool) -> LanguageModel:
    """The student, with weights of its own where they have a rate; `divided`: each rank will copy its part of them."""
    return pair.load_student([name for name, rate in rates.items() if rate and not divided])


def _on_meta(architecture: Architecture) -> LanguageModel:
    return architecture.build().requires_grad_(False).eval()


def _trainable(
    model: nn.Module, groups: list[dict[str, Any]], fill: Fill | None, config: PretrainConfig, corpus: Path
) -> Trainable:
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    to_verify = shards_to_verify(open_corpus(corpus, config.data))
    batches = training_data(config, corpus)
    return Trainable(model, groups, batches, to_verify=to_verify, first_weights=fill, frozen=frozen)


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
