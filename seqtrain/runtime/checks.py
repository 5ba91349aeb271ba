"""The rules that hold between the sections of a run's config: each broken one is one line that says what to do."""

import math
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from seqtrain.data import check_source
from seqtrain.data.synthetic import TASKS
from seqtrain.errors import ConfigError
from seqtrain.files import place
from seqtrain.models import LanguageModel
from seqtrain.models.divided import divide
from seqtrain.parallel.tensor import TensorParallel
from seqtrain.runtime.compilation import check_compile
from seqtrain.runtime.optimizers import OPTIMIZERS, check_optimizer
from seqtrain.runtime.settings import (
    PretrainConfig,
    RuntimeConfig,
    largest_divisor,
    micro_batch,
    segments,
    uneven,
    unit,
)
from seqtrain.threads import one_thread
from seqtrain.validation import AUTO

# Tokens that a step may have, and bytes that weights may have in all: more than any machine holds.
MOST_TOKENS, MOST_BYTES = 2**33, 10**15


def check(config: PretrainConfig) -> None:
    """Raises `ConfigError` for the first rule between keys that `config` breaks."""
    check_source(config.data, sequence_length=config.train.sequence_length)
    _check_encoder(config)
    check_lora(config)
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
    if not config.checkpoint.resume:
        raise ConfigError("checkpoint.resume=: is empty; use auto, never, or the folder of a checkpoint")
    if config.checkpoint.store:
        check_store(config.checkpoint.store)
    _check_weights(config)
    _check_model(config)
    check_tensor(config)


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


def check_lora(config: PretrainConfig) -> None:
    """Raises `ConfigError` where adapters are asked for that nothing can have."""
    if config.lora.rank and not config.source:
        raise ConfigError(f"lora.rank={config.lora.rank}: adapters are for a pretrained model; name one: source=")
    if config.lora.rank and (rate := config.model.router.bias_rate) not in (AUTO, 0):
        raise ConfigError(f"model.router.bias_rate={rate}: with lora.rank all weights stay as they are; leave it out")
    if config.lora.rank and config.parallel.experts > 1:
        raise ConfigError(f"parallel.experts={config.parallel.experts}: with lora.rank no experts are trained; use 1")


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


def launched_ranks() -> int:
    """How many ranks torchrun has started, of which this process is one; 1 where it hasn't.

    Raises `ConfigError` for an environment that isn't torchrun's.
    """
    found = {name: value for name in ("RANK", "WORLD_SIZE") if (value := os.environ.get(name)) is not None}
    for name, value in found.items():
        if not value.isdecimal() or int(value) < (name == "WORLD_SIZE"):
            raise ConfigError(f"{name}={value}: is no number of ranks; start them with torchrun, or unset it")
    if "RANK" in found:
        needed = ("WORLD_SIZE",) if dist.is_initialized() else ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise ConfigError(f"{missing[0]}: isn't set, but RANK={found['RANK']} is; start ranks with torchrun")
        if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
            raise ConfigError(f"RANK={found['RANK']}: must be below WORLD_SIZE={found['WORLD_SIZE']}")
    return int(found.get("WORLD_SIZE", 1))


def _check_ranks(config: PretrainConfig) -> None:
    parallel = config.parallel
    if config.runtime.name == "inline" and parallel.ranks != (there := launched_ranks()):
        came = f"torchrun started {there}" if "WORLD_SIZE" in os.environ else "this process is one"
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


def _check_shard(config: PretrainConfig) -> None:
    parallel, ranks = config.parallel, config.parallel.ranks
    key = f"parallel.shard={parallel.shard_ranks}"
    if ranks % parallel.shard_ranks:
        fitting = largest_divisor(ranks, limit=parallel.shard_ranks)
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


def _check_device(config: PretrainConfig) -> None:
    check_address(config.runtime)
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


def _check_weights(config: PretrainConfig) -> None:
    if config.train.weights == "float32":
        return
    parallel, key = config.parallel, "train.weights=bfloat16"
    if config.train.dtype != "bfloat16":
        raise ConfigError(f"{key}: products would be float32 all the same; set train.dtype=bfloat16, too")
    if parallel.zero_stage == 0:
        raise ConfigError(
            f"{key}: the float32 masters are ZeRO's, which parallel.zero_stage=0 is without; "
            "use parallel.zero_stage=1 or more"
        )
    if config.optimizer.name != "adamw":
        raise ConfigError(f"{key}: is for optimizer=adamw, not {config.optimizer.name}; leave one of them out")
    if parallel.experts > 1 or config.lora.rank:
        other = f"parallel.experts={parallel.experts}" if parallel.experts > 1 else f"lora.rank={config.lora.rank}"
        raise ConfigError(f"{key}: isn't offered with {other}; leave one of them out")


def _check_model(config: PretrainConfig) -> None:
    """The model's own rules (widths, heads, kernel sizes) and its size, without its memory or its whole depth."""
    model = config.model
    depth = min(model.depth, model.period)
    try:
        with torch.device("meta"), _without_dynamo(), one_thread():
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
    with torch.device("meta"), _without_dynamo(), one_thread():
        sample = LanguageModel(replace(model, depth=min(model.depth, model.period)), config.mixer, vocab_size=1)
        divide(sample, TensorParallel(0, parallel.tensor))


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


def check_address(runtime: RuntimeConfig) -> None:
    """Raises `ConfigError` where the cluster's address is of a kind that this program can't or mustn't use."""
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
