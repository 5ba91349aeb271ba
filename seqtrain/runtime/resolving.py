"""From composed values to the config of a run: types, the network of `source`, and a number for each `auto`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from seqtrain.errors import ConfigError
from seqtrain.models.config import default_config, mixer_class
from seqtrain.runtime.checks import check, check_address, check_answers, check_lora, launched_ranks
from seqtrain.runtime.choices import dtype_of
from seqtrain.runtime.settings import PretrainConfig, RuntimeConfig, largest_divisor, unit
from seqtrain.validation import AUTO, validate

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Seconds in which a cluster says what it has.
ANSWER_SECONDS = 120.0


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
    check_lora(typed)
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
    if train.dtype == AUTO:
        train = replace(train, dtype=dtype_of(config))
    if train.micro_batch_size == AUTO:
        train = replace(train, micro_batch_size=largest_divisor(unit(train) // parallel.data, limit=8))
    if runtime.cpus_per_worker in (AUTO, 0) and not runtime.cluster:
        inline, cores = runtime.name == "inline", os.cpu_count() or 1
        threads = torch.get_num_threads() if inline else max(1, cores // parallel.ranks)
        runtime = replace(runtime, cpus_per_worker=threads)
    return replace(config, train=train, parallel=parallel, runtime=runtime)


def _data_ranks(config: PretrainConfig) -> int:
    """Groups of ranks for the processes there are or can be: one where they don't suffice for more."""
    runtime, others = config.runtime, config.parallel.sequence * config.parallel.tensor
    if runtime.name == "inline":
        return max(1, launched_ranks() // others)
    if runtime.workers:
        return max(1, max(runtime.workers) // others)
    if runtime.cluster:
        check_address(runtime)
        there = ask_for_ranks(runtime)
        return largest_divisor(unit(config.train), limit=max(1, there // others))
    gpus = torch.cuda.device_count() if runtime.device != "cpu" else 0
    # More processes on a CPU take more memory and no less time: the other cores are threads.
    there = gpus or min(2, os.cpu_count() or 1)
    return largest_divisor(unit(config.train), limit=there // others)


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
