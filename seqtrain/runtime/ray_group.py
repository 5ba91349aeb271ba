"""How Ray's workers become ranks: the process group, and the signal that asks one of them to stop."""

import datetime
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from seqtrain.runtime import signals


@dataclass
class GroupConfig(TorchConfig):
    """Ray's settings of the process group.

    `store_folder`: a folder of this machine through which the ranks find each other; empty for ranks on several
    machines, which meet at a port of rank 0 that torch opens to every interface.
    """

    store_folder: str = ""

    @property
    def backend_cls(self) -> type["GroupBackend"]:
        return GroupBackend


class GroupBackend(_TorchBackend):
    """Forms the group when workers have started; Ray calls it again after each restart."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if backend_config.store_folder:
            worker_group.execute(_set_torch_distributed_env_vars)
            # Another file each time: a store remembers the ranks of the group before.
            store = Path(backend_config.store_folder) / f"store-{uuid.uuid4().hex}"
            count, settings = len(worker_group), (backend_config.backend, backend_config.timeout_s)
            ray.get(
                [worker_group.execute_single_async(rank, _join, store, rank, count, *settings) for rank in range(count)]
            )
        else:
            super().on_start(worker_group, backend_config)
        # Here, because Ray runs the training function in another thread than the worker's main one, and Python lets
        # only that one set a signal's handler.
        worker_group.execute(signals.ask_on_sigterm)


def _join(store: Path, rank: int, count: int, backend: str, timeout_seconds: int) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(store), count),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
