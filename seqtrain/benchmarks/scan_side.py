"""One side of a comparison of scans: a program whose ranks run the scans it is asked for, and note their messages.

It reads one JSON object a line and answers with one. As it runs with the code of other commits, too, it uses nothing of
this package but what they have.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import torch
import torch.distributed as dist

from seqtrain.benchmarks.ranks import makespan
from seqtrain.benchmarks.scan_methods import CHAINS, Setting, group_costs, scan, step
from seqtrain.kernels.affine import AffineMap
from seqtrain.parallel import flush_scans, scan_engine
from seqtrain.parallel.scan_engine import Engine, Job, Wire

# What a rank did: what, with which rank (-1: none), how many bytes, from when to when, by the machine's clock.
Deed = tuple[str, int, int, float, float]
# What is asked of a side: `ranks`, `form`, `kib`, `width`, `compute` seconds, `layers` (0: one scan), `traced`.
Request = dict[str, Any]
# From the kernel's headers.
CLONE_NEWNET = 0x40000000


@contextmanager
def recorded() -> Iterator[list[Deed]]:
    """While open, all that scans do on this rank is noted: started, wait for a message, apply a map, send, end.

    For tools: it replaces methods of the collective.
    """
    deeds: list[Deed] = []
    posted: dict[int, deque[tuple[int, int]]] = defaultdict(deque)

    def noted(what: str, method: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.monotonic()
            result = method(*arguments, **options)
            deeds.append((what, -1, 0, begun, time.monotonic()))
            return result

        return call

    def post(wire: Any, buffer: Any, place: int) -> None:
        posted[id(wire)].append((wire.rank(place), buffer.nbytes))
        originals["post"](wire, buffer, place)

    def post_all(wire: Any, arrivals: Any, messages: Sequence[tuple[int, int]]) -> None:
        posted[id(wire)].extend((wire.rank(place), numbers * arrivals.element_size()) for place, numbers in messages)
        originals["post_all"](wire, arrivals, messages)

    def send(wire: Any, buffer: Any, place: int) -> None:
        begun = time.monotonic()
        originals["send"](wire, buffer, place)
        deeds.append(("send", wire.rank(place), buffer.nbytes, begun, time.monotonic()))

    def receiving(receive: Callable) -> Callable:
        def call(wire: Any, count: int = 1) -> None:
            begun = time.monotonic()
            receive(wire, count)
            for _ in range(count):
                deeds.append(("receive", *posted[id(wire)].popleft(), begun, time.monotonic()))

        return call

    originals: dict[str, Callable] = {"post": Wire.post, "send": Wire.send}
    with ExitStack() as stack:
        for name, replacement in (("post", post), ("send", send)):
            stack.enter_context(mock.patch.object(Wire, name, replacement))
        for each in vars(scan_engine).values():
            if not isinstance(each, type) or not issubclass(each, Wire) or each is Wire:
                continue
            if "receive" in vars(each):
                stack.enter_context(mock.patch.object(each, "receive", receiving(each.receive)))
            # Where it does not go through `post`.
            if "post_all" in vars(each):
                originals["post_all"] = each.post_all
                stack.enter_context(mock.patch.object(each, "post_all", post_all))
        for owner, name, what in ((Engine, "start", "start"), (AffineMap, "apply", "apply"), (Job, "result", "result")):
            stack.enter_context(mock.patch.object(owner, name, noted(what, getattr(owner, name))))
        yield deeds


class Side:
    """Runs requests on the first ranks of `world`; all of them must ask alike."""

    def __init__(self, world: dist.ProcessGroup, counts: Sequence[int]):
        # All ranks take part in forming every group.
        self._groups = {n: world if n == world.size() else dist.new_group(list(range(n))) for n in counts}
        self._rank = world.rank()
        self._settings: dict[tuple, Setting] = {}

    def run(self, request: Request) -> dict[str, Any]:
        """`seconds` from a common start to the last rank's end, `costs` as measured, and, if `traced`, all `deeds`."""
        if self._rank >= request["ranks"]:
            return {}
        group = self._groups[request["ranks"]]
        key = tuple(request[name] for name in ("ranks", "form", "kib", "width", "compute"))
        if key not in self._settings:
            self._settings[key] = Setting.random(group, *key[1:4], tokens=1, compute=key[4])
        setting, layers = self._settings[key], request["layers"]
        deeds: list[list[Deed]] = [[] for _ in range(group.size())]
        noted: AbstractContextManager[list[Deed]] = recorded() if request["traced"] else nullcontext([])
        with noted as own:
            timed = step(setting, layers, CHAINS["auto"]) if layers else scan(setting, "auto")
            seconds = makespan(group, timed, shared_clock=True)
            if request["traced"]:
                flush_scans(group)
        if request["traced"]:
            dist.all_gather_object(deeds, own, group=group)
        return {"seconds": seconds, "costs": asdict(group_costs(group)), "deeds": deeds}


def enter(namespace: str) -> None:
    """Puts this process into a network namespace, whose interface has the same name."""
    with Path("/run/netns", namespace).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"can't enter the network namespace {namespace}")
    os.environ["GLOO_SOCKET_IFNAME"] = namespace


def serve(requests: TextIO, rank: int, store: str, counts: Sequence[int], namespace: str, priority: int) -> None:
    """A rank: runs requests until they end; the first one answers."""
    if namespace:
        enter(f"{namespace}{rank}")
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if priority:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))
    ranks = max(counts)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    world = dist.group.WORLD
    assert world is not None
    side = Side(world, counts)
    for line in requests:
        answer = side.run(json.loads(line))
        if rank == 0:
            print(json.dumps(answer), flush=True)


def main(store: str, counts: Sequence[int], namespace: str, priority: int) -> None:
    """Forks the ranks and passes on to each what comes on standard input."""
    torch.set_num_threads(1)
    pipes: list[TextIO] = []
    for rank in range(max(counts)):
        ends = os.pipe()
        if os.fork() == 0:
            try:
                for pipe in pipes:
                    pipe.close()
                os.close(ends[1])
                serve(os.fdopen(ends[0]), rank, store, counts, namespace, priority)
            except BaseException:
                traceback.print_exc()
                os.kill(os.getppid(), signal.SIGTERM)
            os._exit(0)
        os.close(ends[0])
        pipes.append(os.fdopen(ends[1], "w"))
    for line in sys.stdin:
        for pipe in pipes:
            pipe.write(line)
            pipe.flush()


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
