"""What a run can be told: one frozen dataclass a section, and the numbers that follow from it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from seqtrain.data import DataConfig
from seqtrain.models import ModelConfig
from seqtrain.models.lora import LoraConfig
from seqtrain.parallel import Algorithm
from seqtrain.runtime.compilation import Compile
from seqtrain.runtime.optimizers import OptimizerConfig
from seqtrain.runtime.schedule import ScheduleConfig
from seqtrain.runtime.segmented import Gradients
from seqtrain.validation import AUTO, FilePath, OrAuto

# Ranks that ZeRO divides over by itself.
MOST_SHARDED = 64
# A year, and more cores than a machine has.
LONGEST_SECONDS, MOST_CORES = 31_536_000, 4096

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class TrainConfig:
    """How much is trained, and in what pieces."""

    # Optimizer steps of the whole run.
    steps: Positive = 1000
    # Tokens in a sequence.
    sequence_length: Positive = 1024
    # Sequences in a step, all ranks together.
    batch_size: Positive = 8
    # Sequences in a step while the batch warms up, before batch_size: each for an equal share of batch_warmup_steps.
    batch_warmup: tuple[Positive, ...] = ()
    # Steps, from the first on, over which the batch warms up.
    batch_warmup_steps: Count = 0
    # Most sequences that run through the model at once on a rank, or on the sequence-parallel ranks of one group: fewer
    # take less memory. auto: as many as divide a group's sequences, 8 at most.
    micro_batch_size: Annotated[Positive, OrAuto] = AUTO
    # Most tokens of those that run through the model at once, with the layers' states carried over; 0: all of them.
    segment_tokens: Count = 0
    # Gradients between segments: exact (one more forward pass), or truncated (none crosses a segment's boundary).
    segment_gradients: Gradients = "exact"
    # Number format of the matrix products. Weights, states, sums and the optimizer's state are float32 in both. auto:
    # bfloat16 where a probe at the run's first start finds it faster (processors with AVX512-BF16 or AMX, GPUs).
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    # Number format of the matrices that the model computes with, of which the optimizer has float32 masters: half of
    # their memory in bfloat16. Vectors (norms, decays, step sizes, biases) are float32 in both.
    weights: Literal["float32", "bfloat16"] = "float32"
    # torch.compile of the model (true), or of its blocks (regions; of MLPs where parallel.sequence is more than 1): the
    # last digits of losses may differ.
    compile: Compile = False
    # Bytes that a rank may hold, or up to 1 a share of its GPU's memory, or of the machine's divided by ranks: what is
    # computed again for that is chosen (model.recompute, where that is empty). 0: no matter.
    memory_budget: Rate = 0.0
    # True: what the backward pass needs waits in the CPU's memory, not in the GPU's.
    offload_activations: bool = False
    # Largest norm of a step's gradient, all weights together; 0 leaves gradients alone.
    gradient_clipping: Rate = 1.0
    # Steps in a row that may have a non-finite loss or gradient (they are skipped) before the run gives up.
    max_nonfinite_steps: Count = 10


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on how much held-out text the model is scored."""

    # Steps between two evaluations; 0 evaluates only after the last step.
    every: Count = 200
    # Most held-out tokens scored each time, spread evenly over them; 0 scores all of them.
    max_tokens: Count = 10_000_000


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is divided over `data x sequence x tensor` processes (ranks)."""

    # Groups of ranks that read different sequences of a batch. auto: what the GPUs (runtime=ray without GPUs: two
    # processes) or torchrun's ranks leave for it.
    data: Annotated[Positive, OrAuto] = AUTO
    # Sequence-parallel (context-parallel) ranks of a group: each holds a piece of every sequence.
    sequence: Positive = 1
    # Tensor-parallel ranks, neighbors on one machine: each has a part of every layer's heads and channels, and of the
    # vocabulary.
    tensor: Positive = 1
    # Ranks over which routed experts are sharded: each has so small a part of them, and tokens travel. 1: each has all.
    experts: Positive = 1
    # What DeepSpeed divides over the ranks of a shard: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights.
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    # Neighboring ranks of a shard, of which there are replicas; gradients are averaged over them once a step. auto: all
    # ranks, or the most up to 64 that divide them: gathering over more would take longer than is worth its memory.
    shard: Annotated[Positive, OrAuto] = AUTO
    # Number format in which ZeRO sends gradients of matrices, and in stage 3 matrices: half the bytes in bfloat16, to
    # which sums are rounded, too. Gates, embeddings, the head and vectors travel in float32.
    wire: Literal["float32", "bfloat16"] = "float32"
    # How states travel between sequence-parallel ranks; `auto` takes the cheapest by costs measured at the start.
    algorithm: Algorithm = "auto"
    # Whether scans and, on GPUs, ZeRO's collectives run while the layers compute. auto: always, but where GPUs can't be
    # told to keep the order of operations (NCCL before 2.26): there never, if a rank is in several groups.
    overlap: Literal["auto", "always", "never"] = "auto"

    @property
    def ranks(self) -> int:
        """How many processes that is."""
        return self.data * self.sequence * self.tensor

    @property
    def shard_ranks(self) -> int:
        """Over how many ranks ZeRO divides: all that have the same parts of layers, where it divides nothing."""
        if self.shard != AUTO:
            return self.shard
        alike = self.ranks // self.tensor
        undivided = self.zero_stage == 0 or self.experts > 1 or self.tensor > 1
        return alike if undivided else largest_divisor(alike, limit=MOST_SHARDED)

    def overlaps(self, *, ordered: bool) -> bool:
        """Whether communication runs beside computation; `ordered`: operations of several groups keep their order."""
        several = self.sequence > 1 or self.experts > 1 or self.shard_ranks < self.ranks
        return self.overlap == "always" or (self.overlap == "auto" and (ordered or not several))


@dataclass(frozen=True)
class RuntimeConfig:
    """Who starts the ranks, and on what."""

    # `ray` starts them and starts them again after a fault; `inline` is this process, or the ranks torchrun started.
    name: Literal["ray", "inline"] = "ray"
    # Restarts without a new checkpoint between after which the run gives up (ray only).
    max_restarts: Count = 3
    # Ray cluster to use, `host:port` or auto; empty: RAY_ADDRESS of the environment, as `ray job submit` sets it, or
    # else one is started on this machine that listens on 127.0.0.1 only.
    address: str = ""
    # Fewest and most ranks of an elastic run, as [2,4] (ray only): parallel.data follows from the machines there are,
    # the batch stays as it is. Empty: as many as parallel.* says.
    workers: tuple[Positive, ...] = ()
    # Seconds for which an elastic run that has lost machines waits for others before it goes on with fewer ranks.
    replacement_seconds: Rate = 60.0
    # Processor of the ranks; `auto` is cuda where torch sees a GPU.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # CPU cores and threads of a rank. auto, or 0: its machine's cores divided over the ranks there (inline: torch's
    # number).
    cpus_per_worker: Annotated[int, Field(ge=0, le=MOST_CORES), OrAuto] = AUTO
    # Seconds after which a start that has stopped writing to output_dir may be replaced by another. More than a network
    # file system hides a change for.
    lease_seconds: Annotated[float, Field(gt=0, le=LONGEST_SECONDS)] = 20.0
    # Seconds a rank waits for the others in one exchange before it takes them for lost.
    collective_timeout_seconds: Annotated[int, Field(gt=0, le=LONGEST_SECONDS)] = 600
    # Seconds a step may take (ray only) before the rank that holds up the others is named, and all are started again.
    # auto: five times the median step, a minute at least.
    step_timeout_seconds: Annotated[float, Field(gt=0, le=LONGEST_SECONDS), OrAuto] = AUTO
    # Seconds without progress before the same, while ranks start, score, save and end, and in the first step.
    section_timeout_seconds: Annotated[float, Field(gt=0, le=LONGEST_SECONDS)] = 1800.0

    @property
    def cluster(self) -> str:
        """Address of the Ray cluster to use; empty for one of this machine alone."""
        return (self.address or os.environ.get("RAY_ADDRESS", "")) if self.name == "ray" else ""

    @property
    def cluster_key(self) -> str:
        """What names it."""
        return f"runtime.address={self.address}" if self.address else f"RAY_ADDRESS={self.cluster}"


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is written, how long it is kept, and from where it resumes."""

    # Steps between two checkpoints; 0 writes none by steps: only by minutes, at the end and when asked to stop.
    every: Count = 200
    # Minutes after which one is written, whatever `every` says; 0: none by the clock; auto: as often as loses the least
    # to saves and failures (Young and Daly), from the measured cost of a save and mtbf_hours.
    minutes: Annotated[Rate, OrAuto] = 0.0
    # Hours from one failure of the run to the next (MTBF), for minutes=auto; the session's own failures are taken into
    # account. auto: 8,000 divided by the ranks, 24 at most.
    mtbf_hours: Annotated[float, Field(gt=0), OrAuto] = AUTO
    # Newest checkpoints kept. One alone could be damaged with nothing to fall back to.
    keep: Annotated[int, Field(ge=2)] = 2
    # Steps between two checkpoints that are written in any case and kept for good; 0: none is.
    keep_every: Count = 0
    # `auto` resumes from output_dir's newest whole checkpoint; `never` wants a fresh output_dir; a checkpoint's folder
    # starts a new run in output_dir from that one's weights, optimizer and step.
    resume: FilePath = "auto"
    # Where checkpoints are written in place of output_dir, with copies of its records: s3://bucket/prefix, or what else
    # fsspec knows. Empty: in output_dir.
    store: str = ""


@dataclass(frozen=True)
class MetricsConfig:
    """What metrics.jsonl says besides a step's loss and speed."""

    # Steps between two that are measured: gradients, updates and losses by part, memory, MFU; 0: none.
    every: Count = 10


@dataclass(frozen=True)
class TrackingConfig:
    """Where figures go besides metrics.jsonl."""

    # Weights & Biases: `offline` writes below output_dir (upload later with `wandb sync`), `online` needs an API key.
    mode: Literal["offline", "online", "disabled"] = "disabled"
    # Project the run is filed under at Weights & Biases.
    project: str = "seqtrain"
    # Name of the run there; empty takes the name of output_dir.
    name: str = ""
    # True: files for TensorBoard in output_dir/tensorboard.
    tensorboard: bool = False


@dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end of a run."""

    # Text the model continues.
    prompt: str = "def "
    # Tokens to generate; 0 generates nothing.
    tokens: Count = 256


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation of the operators runs."""

    # `auto` takes the fastest that runs on the device.
    backend: Literal["auto", "reference", "chunked", "triton", "native"] = "auto"
    # Whose routine multiplies the float32 matrices of linear layers on CPUs: torch (its own choice, MKL on x86), or
    # onednn. auto: the faster by a probe at the run's first start; later starts take over what it found.
    linear: Literal["auto", "torch", "onednn"] = "auto"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything `seqtrain pretrain` can be told."""

    # A pretrained model to continue, in place of a new one: a Hugging Face folder, or a GGUF file.
    source: FilePath = ""
    # Adapters to train in place of the source's weights (LoRA).
    lora: LoraConfig = field(default_factory=LoraConfig)
    # The network: layers, depth, width.
    model: ModelConfig = field(default_factory=ModelConfig)
    # The `Config` of each mixer by name; those that model.layers names are used.
    mixer: dict[str, Any] = field(default_factory=dict)
    # Text, tokenizer, shards.
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracking: TrackingConfig = TrackingConfig()
    sample: SampleConfig = SampleConfig()
    kernels: KernelsConfig = KernelsConfig()
    # Seed of the weights and of the order of the data.
    seed: Count = 0
    # Folder of the run; the same folder again resumes the run (see checkpoint.resume).
    output_dir: FilePath
    # What the config was composed of, by group: filled in, for the reader of config.yaml.
    presets: Mapping[str, str] = field(default_factory=dict)


def unit(train: TrainConfig) -> int:
    """Sequences of which the batch of every step is a multiple: what the data is read in."""
    return math.gcd(train.batch_size, *train.batch_warmup)


def units(train: TrainConfig, step: int) -> range:
    """Which of them `step` (0 is the first) reads: a step goes on where the one before ended."""
    sizes, over = train.batch_warmup, train.batch_warmup_steps
    # Where each size begins to be used, and the last one of all.
    starts = [-(-over * number // len(sizes)) for number in range(len(sizes) + 1)] if sizes else [0]
    first = size = 0
    for size, start, end in zip((*sizes, train.batch_size), starts, (*starts[1:], step + 1), strict=True):
        if step < end:
            first += size * (step - start)
            break
        first += size * (end - start)
    return range(first // unit(train), (first + size) // unit(train))


def micro_batch(config: PretrainConfig) -> int:
    """Most sequences a group of ranks runs through the model at once: as asked for, or all where it has fewer."""
    return min(config.train.micro_batch_size, -(-unit(config.train) // config.parallel.data))


def uneven(config: PretrainConfig) -> bool:
    """Whether groups of ranks may have a sequence less than others in a step."""
    return len(config.runtime.workers) > 0


def micro_batches(config: PretrainConfig) -> int:
    """How many batches go through the model one after the other in a step: steps of gradient accumulation.

    While the batch warms up, fewer.
    """
    return -(-config.train.batch_size // (config.parallel.data * micro_batch(config)))


def segments(config: PretrainConfig, rows: int = 0) -> int:
    """Pieces in which a micro-batch of `rows` runs through the model, one after the other; 0: of the run's own."""
    tokens = (rows or micro_batch(config)) * config.train.sequence_length
    return -(-tokens // (config.train.segment_tokens or tokens))


def largest_divisor(number: int, *, limit: int) -> int:
    """The largest divisor of `number` up to `limit`; 1 where there is none."""
    return max((divisor for divisor in range(1, limit + 1) if number % divisor == 0), default=1)
