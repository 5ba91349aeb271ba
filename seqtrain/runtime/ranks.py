"""The processes of a run: which one this is, and the few exchanges they make besides DeepSpeed's."""

import atexit
import datetime
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.runtime.pulse import Pulse

# Lets NCCL (2.26 or newer) run operations of several communicators in the order of the host. Two GPUs that turned them
# around, each for itself, could wait in either for the other.
HOST_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
# What rank 0 says when it comes to an exchange that the others wait for; how long they do before they look again.
READY, LOOK = "seqtrain/ready", datetime.timedelta(seconds=5)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Every method is a collective: all ranks call it, in the same order."""

    rank: int
    count: int
    device: torch.device
    group: dist.ProcessGroup
    # All ranks again, through the CPU: what may take long on rank 0 is waited for in it.
    control: dist.ProcessGroup
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64 and in one exchange."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest `value` of any rank."""
        return self._reduce((value,), dist.ReduceOp.MAX)[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank; returns when all ranks have called."""
        everyone: list[Any] = [None] * self.count
        self.pulse.exchange()
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        self.pulse.exchange()
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def copy_first(self, tensor: Tensor) -> Tensor:
        """Puts rank 0's numbers into `tensor`, of the same shape on every rank, and gives it."""
        dist.broadcast(tensor, src=0, group=self.group)
        return tensor

    def from_first_in_time(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank, however long rank 0 takes to come to it: no exchange waits so long."""
        store = dist.distributed_c10d._get_default_store()
        ready = f"{READY}/{store.add(f'{READY}/calls/{self.rank}', 1)}"
        if self.first:
            store.set(ready, "")
        arrived = self.first
        while not arrived:
            with suppress(dist.DistStoreError):
                store.wait([ready], LOOK)
                arrived = True
        return self.from_first(value)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        self.pulse.exchange()
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, op=operation, group=self.group)
        return packed.tolist()


def pick_device(device: str) -> torch.device:
    """`runtime.device` as a device of this process: the GPU of its local rank, or the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(local)
    os.environ.setdefault(HOST_ORDER, "1")
    return local


def keeps_host_order(device: torch.device) -> bool:
    """Whether operations of several process groups run in the order in which this process asks for them."""
    return device.type == "cpu" or (torch.cuda.nccl.version() >= (2, 26) and os.environ.get(HOST_ORDER) == "1")


def this_process(device: torch.device, *, section_seconds: float = 1800.0, pulse: Pulse | None = None) -> Ranks:
    """The ranks of the process group that is already formed; every rank calls it.

    `section_seconds`: limit of what waits for a rank's long work.
    """
    world = dist.group.WORLD
    assert world is not None, "the process group must be formed first"
    control = world
    if world.size() > 1:
        control = dist.new_group(timeout=datetime.timedelta(seconds=section_seconds), backend="gloo")
    return Ranks(world.rank(), world.size(), device, world, control, pulse or Pulse())


def form_group(device: torch.device, *, timeout_seconds: int, section_seconds: float) -> Ranks:
    """The process group of torchrun's ranks, or of this process alone where torchrun didn't start it.

    A group that is there already is taken: DeepSpeed keeps the first one it sees for the life of the process.
    """
    if not dist.is_initialized():
        options: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout_seconds)}
        if "RANK" not in os.environ:
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"] and (
            first := os.environ.get("MASTER_ADDR")
        ):
            use_network_of(_own_address(first))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
        atexit.register(dist.destroy_process_group)
    return this_process(device, section_seconds=section_seconds)


def join_group(
    device: torch.device, *, timeout_seconds: int, section_seconds: float, store: str, pulse: Pulse
) -> Ranks:
    """The process group of ranks that know their places from the environment, as torchrun's do.

    `store`: a file of this machine through which they find each other; empty: at MASTER_ADDR.
    """
    limit, count = datetime.timedelta(seconds=timeout_seconds), int(os.environ["WORLD_SIZE"])
    options: dict[str, Any] = {"rank": int(os.environ["RANK"]), "world_size": count, "timeout": limit}
    if store:
        options["store"] = dist.FileStore(store, count)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    return this_process(device, section_seconds=section_seconds, pulse=pulse)


def use_network_of(address: str) -> None:
    """Has gloo and NCCL use the network in which this machine has this address, whatever its name resolves to."""
    for name, known in psutil.net_if_addrs().items():
        if any(each.address == address for each in known):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if address != "127.0.0.1":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _own_address(other: str) -> str:
    """The address that this machine has for `other`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):
        asked.connect((other, 9))
        address: str = asked.getsockname()[0]
        return address
    return ""


# Side of the product, and numbers summed over the ranks, by which a rank is checked before it joins.
CHECKED_SIDE, CHECKED_NUMBERS = 512, 2**16
# Memory without which no run comes far; the share of a GPU's that is free unless another process holds it.
LEAST_MEMORY, LEAST_SHARE = 2**28, 0.5


def check_health(ranks: Ranks) -> None:
    """A collective that raises `RuntimeError` on a rank that lacks memory or computes or transfers wrong numbers."""
    device = ranks.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < LEAST_SHARE * total:
            raise RuntimeError(f"{device} has {free / 2**30:.1f} of its {total / 2**30:.1f} GiB free; who holds them?")
    elif (free := psutil.virtual_memory().available) < LEAST_MEMORY:
        raise RuntimeError(f"{free / 2**20:.0f} MiB of memory are free on its machine")
    # Whole numbers below 2^24 are exact in float32, in any order.
    numbers = (torch.arange(CHECKED_SIDE**2, device=device) % 5).float().reshape(CHECKED_SIDE, CHECKED_SIDE)
    product = float((numbers @ numbers).double().sum())
    expected = float((numbers.double().sum(0) * numbers.double().sum(1)).sum())
    if product != expected:
        raise RuntimeError(f"a product of matrices sums to {product}, not {expected}: {device} is faulty")
    told = torch.full((CHECKED_NUMBERS,), float(ranks.rank + 1), device=device)
    dist.all_reduce(told, group=ranks.group)
    if not bool((told == ranks.count * (ranks.count + 1) / 2).all()):
        raise RuntimeError("a sum over the ranks came back wrong: the network or a processor is faulty")


# Words of the transport in errors that torch raises as a plain RuntimeError.
TRANSPORT = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout")


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone or silent, rather than that this one has a bug."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in TRANSPORT)
