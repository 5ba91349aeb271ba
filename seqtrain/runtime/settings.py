"""What a run can be told: one frozen dataclass a section, and the rules that hold between sections."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psutil
import torch
from pydantic import Field

from seqtrain.data import DataConfig, check_source
from seqtrain.data.synthetic import TASKS
from seqtrain.errors import ConfigError
from seqtrain.files import place
from seqtrain.models import LanguageModel, ModelConfig
from seqtrain.models.config import default_config, mixer_class
from seqtrain.models.divided import divide
from seqtrain.models.lora import LoraConfig
from seqtrain.parallel import Algorithm
from seqtrain.parallel.tensor import TensorParallel
from seqtrain.runtime.compilation import Compile, check_compile
from seqtrain.runtime.optimizers import OPTIMIZERS, OptimizerConfig, check_optimizer
from seqtrain.runtime.schedule import ScheduleConfig
from seqtrain.runtime.segmented import Gradients
from seqtrain.validation import AUTO, FilePath, OrAuto, validate

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Tokens that a step may have, and bytes that weights may have in all: more than any machine holds.
MOST_TOKENS, MOST_BYTES = 2**33, 10**15
# Ranks that ZeRO divides over by itself.
MOST_SHARDED = 64
# A year, and more cores than a machine has.
LONGEST_SECONDS, MOST_CORES = 31_536_000, 4096
# Seconds in which a cluster says what it has.
ANSWER_SECONDS = 120.0

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
    # Number format of the matrix products. The optimizer's state is float32 in both.
    dtype: Literal["float32", "bfloat16"] = "float32"
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
        return alike if undivided else _largest_divisor(alike, limit=MOST_SHARDED)

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


def read_pretrain_config(config: "DictConfig") -> PretrainConfig:
    """The typed config of a run, with the rules between its keys checked. Raises `ConfigError` with one line."""
    from omegaconf import OmegaConf

    typed = typed_pretrain_config(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    check(typed)
    return typed


def typed_pretrain_config(values: Mapping[str, Any]) -> PretrainConfig:
    """Plain values, composed or read from a run's config.yaml, as a `PretrainConfig`. Raises `ConfigError`.

    Every mixer's section is checked, those that `model.layers` uses are kept; each `auto` becomes a number. The network
    is that of `source` where there is one; a run that has begun keeps it in its config.
    """
    typed = validate(PretrainConfig, {**values, "mixer": {}})
    _check_lora(typed)
    if typed.source and not typed.model.vocab_size:
        from seqtrain.runtime.source import with_network_of_source

        return resolve(with_network_of_source(typed))
    mixers: dict[str, Any] = {
        name: validate(mixer_class(name).Config, section, prefix=f"mixer.{name}.")
        for name, section in values.get("mixer", {}).items()
    }
    used = typed.model.mixers
    for name in used:
        try:
            mixers[name] = mixers[name] if name in mixers else default_config(name)
        except ConfigError as error:
            raise ConfigError(f"model.layers: {error}") from error
    return resolve(replace(typed, mixer={name: mixers[name] for name in used}))


def resolve(config: PretrainConfig) -> PretrainConfig:
    """`config` with a number in place of each `auto`. Raises `ConfigError` where nothing says which.

    The only place that decides them; everything after it sees numbers.
    """
    train, parallel, runtime = config.train, config.parallel, config.runtime
    if parallel.data == AUTO:
        parallel = replace(parallel, data=_data_ranks(config))
    if train.micro_batch_size == AUTO:
        train = replace(train, micro_batch_size=_largest_divisor(unit(train) // parallel.data, limit=8))
    if runtime.cpus_per_worker in (AUTO, 0) and not runtime.cluster:
        inline, cores = runtime.name == "inline", os.cpu_count() or 1
        threads = torch.get_num_threads() if inline else max(1, cores // parallel.ranks)
        runtime = replace(runtime, cpus_per_worker=threads)
    return replace(config, train=train, parallel=parallel, runtime=runtime)


def _data_ranks(config: PretrainConfig) -> int:
    """Groups of ranks for the processes there are or can be: one where they don't suffice for more."""
    runtime, others = config.runtime, config.parallel.sequence * config.parallel.tensor
    if runtime.name == "inline":
        return max(1, int(os.environ.get("WORLD_SIZE", 1)) // others)
    if runtime.workers:
        return max(1, max(runtime.workers) // others)
    if runtime.cluster:
        _check_address(runtime)
        there = ask_for_ranks(runtime)
        return _largest_divisor(unit(config.train), limit=max(1, there // others))
    gpus = torch.cuda.device_count() if runtime.device != "cpu" else 0
    # More processes on a CPU take more memory and no less time: the other cores are threads.
    there = gpus or min(2, os.cpu_count() or 1)
    return _largest_divisor(unit(config.train), limit=there // others)


def ask_for_ranks(runtime: RuntimeConfig) -> int:
    """How many ranks the cluster has room for: its GPUs, or else a rank a machine. Raises `ConfigError`.

    It is asked by a process of its own: this one may not have threads yet.
    """
    code = (
        "import json, logging, sys, ray\n"
        "ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)\n"
        "print(json.dumps([node['Resources'] for node in ray.nodes() if node['Alive']]))\n"
    )
    check_answers(runtime)
    command = [sys.executable, "-c", code, runtime.cluster]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
        there = json.loads(asked.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{runtime.cluster_key}: no answer within {ANSWER_SECONDS:.0f} s") from None
    except (IndexError, ValueError):
        why = (asked.stderr.strip().splitlines() or ["no answer"])[-1][:300]
        raise ConfigError(f"{runtime.cluster_key}: no Ray cluster answers there: {why}") from None
    gpus = 0 if runtime.device == "cpu" else int(sum(node.get("GPU", 0) for node in there))
    return gpus or sum(node.get("CPU", 0) >= 1 for node in there)


def check_answers(runtime: RuntimeConfig) -> None:
    """Raises `ConfigError` where nothing listens at the cluster's address: Ray would try for minutes."""
    host, _, port = runtime.cluster.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"{runtime.cluster_key}: no Ray cluster answers: {error.strerror or error}; start one, or leave it out"
        ) from None


def _largest_divisor(number: int, *, limit: int) -> int:
    """The largest divisor of `number` up to `limit`; 1 where there is none."""
    return max((divisor for divisor in range(1, limit + 1) if number % divisor == 0), default=1)


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Spares what only asks torch._dynamo to leave a function alone its import, 2 s of CPU time.

    Operators on the meta device do so, and nothing is compiled here.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    stand_in: Any = ModuleType("torch._dynamo")
    stand_in.disable = lambda function, *_, **__: function
    sys.modules[stand_in.__name__] = stand_in
    try:
        yield
    finally:
        del sys.modules[stand_in.__name__]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Starts no pool of threads for the little that is computed: a process that forks must not have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(config: PretrainConfig) -> None:
    """Raises `ConfigError` for the first rule between keys that `config` breaks."""
    check_source(config.data, sequence_length=config.train.sequence_length)
    _check_encoder(config)
    _check_lora(config)
    check_optimizer(config.optimizer)
    _check_averages(config)
    _check_batch(config)
    _check_ranks(config)
    _check_workers(config)
    _check_shard(config)
    _check_wire(config)
    _check_experts(config)
    _check_device(config)
    check_compile(config)
    if config.checkpoint.store:
        check_store(config.checkpoint.store)
    _check_weights(config)
    _check_model(config)
    check_tensor(config)


def check_store(store: str, *, name: str = "checkpoint.store", read: bool = False) -> None:
    """Raises `ConfigError` where `store` is no place that fsspec knows; `read`: or can't be read."""
    key = f"{name}={store}"
    if not re.fullmatch(r"[a-z][a-z0-9]*://[^:/][^:]*", store):
        raise ConfigError(f"{key}: must be KIND://PLACE, as in s3://bucket/prefix; a folder is output_dir")
    if not find_spec("upath"):
        raise ConfigError(f"{key}: needs other packages: pip install 'seqtrain[store]'")
    try:
        found = place(store)
        if read:
            found.exists()
    # Each kind of store has errors of its own.
    except Exception as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None


def _check_encoder(config: PretrainConfig) -> None:
    """An encoder is asked for answers of a task or for masked tokens, and reads sequences at one time."""
    data, train = config.data, config.train
    task = data.source in TASKS.names and not data.sources
    if data.masked and (task or data.sources or config.model.kind == "decoder"):
        rule = "masks text of one source, for model.kind=encoder"
        raise ConfigError(f"data.masked={data.masked}: {rule}; leave it 0")
    if config.model.kind == "decoder":
        return
    if not task and not data.masked:
        rule = "would see the next token, for which it is asked; give data.masked=0.15, or a task as data.source"
        raise ConfigError(f"model.kind=encoder: {rule}")
    for key, value, least in (
        ("train.segment_tokens", train.segment_tokens, 0),
        ("data.carry_rows", data.carry_rows, 1),
    ):
        if value > least:
            raise ConfigError(f"{key}={value}: model.kind=encoder reads whole sequences, and carries no state")


def _check_averages(config: PretrainConfig) -> None:
    if not OPTIMIZERS[config.optimizer.name].averages:
        return
    key, name = f"optimizer.name={config.optimizer.name}", config.schedule.name
    if name != "constant":
        raise ConfigError(
            f"{key}: averages weights in place of a rate that falls, as schedule.name={name}; use constant"
        )
    if not config.optimizer.betas[0]:
        raise ConfigError(f"optimizer.betas={list(config.optimizer.betas)}: {key} needs the first above 0; use 0.9")


def _check_shard(config: PretrainConfig) -> None:
    parallel, ranks = config.parallel, config.parallel.ranks
    key = f"parallel.shard={parallel.shard_ranks}"
    if ranks % parallel.shard_ranks:
        fitting = _largest_divisor(ranks, limit=parallel.shard_ranks)
        raise ConfigError(f"{key}: must divide parallel.data x parallel.sequence={ranks}; use {fitting}, or auto")
    if parallel.shard_ranks == ranks // parallel.tensor:
        return
    if parallel.tensor > 1:
        raise ConfigError(f"{key}: isn't offered with parallel.tensor={parallel.tensor}; use auto, or one of them")
    if parallel.zero_stage == 0:
        raise ConfigError(f"{key}: parallel.zero_stage=0 divides nothing; use parallel.zero_stage=1 or more, or auto")
    if parallel.experts > 1:
        raise ConfigError(
            f"{key}: DeepSpeed divides sharded experts over all ranks, parallel.experts={parallel.experts}; use auto, "
            "or parallel.experts=1"
        )


def _check_wire(config: PretrainConfig) -> None:
    if config.parallel.wire == "float32":
        return
    key = "parallel.wire=bfloat16"
    if config.train.dtype != "bfloat16" or config.train.weights == "bfloat16":
        dtypes = f"train.dtype={config.train.dtype} train.weights={config.train.weights}"
        raise ConfigError(f"{key}: is for train.dtype=bfloat16 train.weights=float32, not {dtypes}; leave it out")
    if config.parallel.zero_stage == 0:
        raise ConfigError(f"{key}: needs ZeRO, parallel.zero_stage=1 or more; leave it out")


def _check_experts(config: PretrainConfig) -> None:
    parallel, model = config.parallel, config.model
    if parallel.experts == 1:
        return
    key = f"parallel.experts={parallel.experts}"
    if not model.experts:
        raise ConfigError(f"{key}: the model has no routed experts; use parallel.experts=1, or set model.experts=")
    ranks = parallel.data * parallel.sequence
    for number, name in ((model.experts, "model.experts"), (ranks, "parallel.data x parallel.sequence")):
        if number % parallel.experts:
            fitting = math.gcd(model.experts, ranks)
            raise ConfigError(f"{key}: must divide {name}={number}; use {fitting}, or a divisor of it")
    if parallel.zero_stage == 3:
        raise ConfigError(
            f"{key}: DeepSpeed doesn't divide sharded experts as well, parallel.zero_stage=3; "
            "use parallel.zero_stage=2 or less, or parallel.experts=1"
        )


def check_tensor(config: PretrainConfig) -> None:
    """Raises `ConfigError` where tensor-parallel ranks, if there are any, can't divide the model or its training."""
    parallel, model = config.parallel, config.model
    if parallel.tensor == 1:
        return
    key = f"parallel.tensor={parallel.tensor}"
    if parallel.zero_stage == 3:
        raise ConfigError(
            f"{key}: ZeRO 3 would divide weights that are divided already, parallel.zero_stage=3; use "
            "parallel.zero_stage=2 or less, or parallel.tensor=1"
        )
    if OPTIMIZERS[config.optimizer.name].matrix_options is not None:
        raise ConfigError(
            f"{key}: no rank has the whole matrices that optimizer.name={config.optimizer.name} works on; use "
            "optimizer=adamw, or parallel.tensor=1"
        )
    for there, other in (
        (config.train.compile, f"train.compile={str(config.train.compile).lower()}"),
        (config.train.weights != "float32", f"train.weights={config.train.weights}"),
        (config.lora.rank, f"lora.rank={config.lora.rank}"),
    ):
        if there:
            raise ConfigError(f"{key}: isn't offered with {other}; leave one of them out")
    with torch.device("meta"), _without_dynamo(), _one_thread():
        sample = LanguageModel(replace(model, depth=min(model.depth, model.period)), config.mixer, vocab_size=1)
        divide(sample, TensorParallel(0, parallel.tensor))


def _check_weights(config: PretrainConfig) -> None:
    if config.train.weights == "float32":
        return
    parallel, key = config.parallel, "train.weights=bfloat16"
    if config.train.dtype != "bfloat16":
        raise ConfigError(f"{key}: products would be float32 all the same; set train.dtype=bfloat16, too")
    if parallel.zero_stage != 2:
        raise ConfigError(
            f"{key}: DeepSpeed keeps float32 masters, gradients and vectors beside it in ZeRO 2 alone, not "
            f"parallel.zero_stage={parallel.zero_stage}; use parallel.zero_stage=2"
        )
    if config.optimizer.name != "adamw":
        raise ConfigError(f"{key}: is for optimizer=adamw, not {config.optimizer.name}; leave one of them out")
    if parallel.experts > 1 or config.lora.rank:
        other = f"parallel.experts={parallel.experts}" if parallel.experts > 1 else f"lora.rank={config.lora.rank}"
        raise ConfigError(f"{key}: isn't offered with {other}; leave one of them out")


def _check_lora(config: PretrainConfig) -> None:
    if config.lora.rank and not config.source:
        raise ConfigError(f"lora.rank={config.lora.rank}: adapters are for a pretrained model; name one: source=")
    if config.lora.rank and (rate := config.model.router.bias_rate) not in (AUTO, 0):
        raise ConfigError(f"model.router.bias_rate={rate}: with lora.rank all weights stay as they are; leave it out")
    if config.lora.rank and config.parallel.experts > 1:
        raise ConfigError(f"parallel.experts={config.parallel.experts}: with lora.rank no experts are trained; use 1")


def _check_model(config: PretrainConfig) -> None:
    """The model's own rules (widths, heads, kernel sizes) and its size, without its memory or its whole depth."""
    model = config.model
    depth = min(model.depth, model.period)
    try:
        with torch.device("meta"), _without_dynamo(), _one_thread():
            sample = LanguageModel(replace(model, depth=depth), config.mixer, vocab_size=1)
    except (RuntimeError, OverflowError) as error:
        # Sizes that are no tensor's.
        raise ConfigError(f"model.width={model.width}: a block can't be made: {str(error).splitlines()[0]}") from None
    needed = 4 * sum(parameter.numel() for parameter in sample.parameters()) * model.depth // depth
    alone = not config.runtime.cluster and config.parallel.zero_stage < 3 and "RANK" not in os.environ
    most = psutil.virtual_memory().total if alone and config.runtime.device == "cpu" else MOST_BYTES
    if needed > most:
        name, largest = max(sample.named_parameters(), key=lambda named: named[1].numel())
        layer = model.mixer(int(name.split(".")[1])) if ".mixer." in name else ""
        sizes = f"the sizes in mixer.{layer}." if layer else "model.width"
        raise ConfigError(
            f"model.depth={model.depth} model.width={model.width}: the weights alone are {needed:.1e} bytes, more than "
            f"{'this machine has' if most < MOST_BYTES else 'any has'}, {most:.1e}; the largest, {name} "
            f"{list(largest.shape)}, follows from {sizes}"
        )


def _check_batch(config: PretrainConfig) -> None:
    pieces, length = config.parallel.sequence, config.train.sequence_length
    if pieces > length:
        raise ConfigError(
            f"parallel.sequence={pieces}: more ranks than train.sequence_length={length} has tokens; "
            f"use {length} or less"
        )
    if (tokens := config.train.batch_size * length) > MOST_TOKENS:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: with train.sequence_length={length} a step has {tokens:.1e} "
            f"tokens; at most {MOST_TOKENS:.1e}"
        )
    batch, ranks, micro = config.train.batch_size, config.parallel.data, config.train.micro_batch_size
    if uneven(config):
        if ranks > unit(config.train):
            raise ConfigError(
                f"parallel.data={ranks}: more groups of ranks than sequences, train.batch_size={batch}; use {batch}"
            )
        return
    if batch % ranks:
        raise ConfigError(
            f"train.batch_size={batch}: must be a multiple of parallel.data={ranks}; use {-(-batch // ranks) * ranks}"
        )
    _check_warmup(config)
    if not config.train.batch_warmup and batch % (ranks * micro_batch(config)):
        raise ConfigError(
            f"train.batch_size={batch}: must be a multiple of parallel.data x train.micro_batch_size = "
            f"{ranks} x {micro}; use {-(-batch // (ranks * micro)) * ranks * micro}, or other sizes"
        )
    if micro_batch(config) % (carried := config.data.carry_rows):
        raise ConfigError(
            f"data.carry_rows={carried}: must divide the {micro_batch(config)} rows that pass the model at once, or "
            f"they would be torn apart; use train.micro_batch_size={carried}, or other sizes"
        )

    parallel, again = config.parallel, config.model.recomputed
    # Selective checkpointing counts every operator, DeepSpeed's too, which comes and goes with what it prefetches.
    selective = again and (parallel.sequence > 1 or again != {"block"})
    if segments(config) > 1 and parallel.zero_stage == 3 and parallel.ranks > 1 and selective:
        raise ConfigError(
            f"train.segment_tokens={config.train.segment_tokens}: with parallel.zero_stage=3 over {parallel.ranks} "
            f"ranks and parallel.sequence={parallel.sequence}, model.recompute=[{','.join(sorted(again))}] can't be; "
            "use parallel.zero_stage=2 or less, or leave out what is recomputed"
        )


def _check_warmup(config: PretrainConfig) -> None:
    train, ranks = config.train, config.parallel.data
    key = f"train.batch_warmup={list(train.batch_warmup)}"
    if not train.batch_warmup and not train.batch_warmup_steps:
        return
    if not 0 < len(train.batch_warmup) <= train.batch_warmup_steps:
        raise ConfigError(
            f"{key}: needs a step or more for each size, not train.batch_warmup_steps={train.batch_warmup_steps} in "
            "all; name both, or none"
        )
    if config.data.lengths or any(isinstance(entry.get("weight"), list) for entry in config.data.sources):
        raise ConfigError(f"{key}: data.lengths and weights that change count steps of one size; leave out one of them")
    for size in train.batch_warmup:
        if size % ranks:
            raise ConfigError(
                f"{key}: {size} must be a multiple of parallel.data={ranks}; use {-(-size // ranks) * ranks}"
            )
    if unit(train) % (ranks * micro_batch(config)):
        raise ConfigError(
            f"{key}: with train.batch_size={train.batch_size} all are multiples of {unit(train)}, which must be one of "
            f"parallel.data x train.micro_batch_size = {ranks} x {micro_batch(config)}; use "
            f"train.micro_batch_size={math.gcd(micro_batch(config), unit(train) // ranks)}, or other sizes"
        )


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


def _check_ranks(config: PretrainConfig) -> None:
    parallel, launched = config.parallel, os.environ.get("WORLD_SIZE")
    there = int(launched or 1)
    if config.runtime.name == "inline" and parallel.ranks != there:
        came = f"torchrun started {launched}" if launched else "this process is one"
        # What is left for the data axis where the others stay; else all as they would be.
        others = parallel.sequence * parallel.tensor
        tensor = f" parallel.tensor={parallel.tensor}" if parallel.tensor > 1 else ""
        fitting = f"parallel.data={there // others}"
        if there % others:
            fitting = f"parallel.data={there} parallel.sequence=1" + (" parallel.tensor=1" if tensor else "")
        raise ConfigError(
            f"parallel.data={parallel.data} parallel.sequence={parallel.sequence}{tensor}: runtime=inline uses the "
            f"ranks there are, and {came}; use {fitting}, runtime=ray, or torchrun --nproc-per-node={parallel.ranks}"
        )


def _check_workers(config: PretrainConfig) -> None:
    runtime, parallel = config.runtime, config.parallel
    if not runtime.workers:
        return
    key, others = f"runtime.workers={list(runtime.workers)}", parallel.sequence * parallel.tensor
    if runtime.name != "ray":
        raise ConfigError(f"{key}: torchrun's ranks are as many as it starts; leave it out, or use runtime=ray")
    if len(runtime.workers) != 2 or runtime.workers[0] > runtime.workers[1]:
        raise ConfigError(f"{key}: must be the fewest and the most ranks, as [2,4]")
    if runtime.workers[1] // others * others < max(runtime.workers[0], others):
        raise ConfigError(
            f"{key}: no number of ranks between is a multiple of parallel.sequence x parallel.tensor={others}; use "
            f"[{others},{others * parallel.data}]"
        )
    if parallel.ranks > runtime.workers[1]:
        raise ConfigError(f"parallel.data={parallel.data}: follows from {key}; leave it out")
    for there, other in (
        (parallel.experts > 1, f"parallel.experts={parallel.experts}"),
        (parallel.shard != AUTO, f"parallel.shard={parallel.shard}"),
        (bool(config.model.router.balance), "routers whose balance is a micro-batch's, model.router.balance"),
        (config.data.carry_rows > 1, f"data.carry_rows={config.data.carry_rows}"),
        (len(config.train.batch_warmup) > 0, f"train.batch_warmup={list(config.train.batch_warmup)}"),
    ):
        if there:
            raise ConfigError(f"{key}: isn't offered with {other}; leave one of them out")


def _check_address(runtime: RuntimeConfig) -> None:
    address = runtime.cluster
    if address.startswith("ray://"):
        raise ConfigError(
            f"{runtime.cluster_key}: Ray's client can't start ranks; start the program on a machine of the cluster, or "
            "with ray job submit"
        )
    host = address.rsplit(":", 1)[0]
    if host not in ("", "auto", "localhost", "127.0.0.1") and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            f"{runtime.cluster_key}: a cluster beyond this machine must ask for a token; start it and this program "
            "with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
        )


def _check_device(config: PretrainConfig) -> None:
    _check_address(config.runtime)
    if config.runtime.cluster or torch.cuda.is_available():
        return
    if config.train.offload_activations:
        raise ConfigError(
            "train.offload_activations=true: torch sees no CUDA device here, and on CPUs activations are in the CPU's "
            "memory already; leave it out"
        )
    if config.runtime.device == "cuda":
        raise ConfigError("runtime.device=cuda: torch sees no CUDA device here; use runtime.device=auto")
    if config.kernels.backend == "triton":
        raise ConfigError("kernels.backend=triton: needs a CUDA device, and torch sees none; use kernels.backend=auto")
