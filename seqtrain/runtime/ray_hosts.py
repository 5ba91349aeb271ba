"""The machines of a run, as the driver sees them: an actor `Host` on each."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from seqtrain.errors import ConfigError
from seqtrain.runtime import host
from seqtrain.runtime.cluster import Node
from seqtrain.runtime.restarts import Place
from seqtrain.runtime.watch import LONGEST_LOOK, RankState, states_of

# Seconds without an answer after which a machine is lost. Ray itself takes longer to notice a cable that is cut.
LOST_SECONDS = 15.0
# Seconds without an answer after which it may be.
SILENT_SECONDS = 3.0
# Seconds that an actor has to come up where there is room for it, and to say what it is.
READY_SECONDS = 180.0
# Calls of an actor that run at once: one watches, others end ranks.
CALLS = 4


class Hosts:
    """Starts an actor on each node that is used, and keeps it for the groups of ranks that come after each other.

    `poll` is called while something is waited for.
    """

    def __init__(self, poll: Callable[[], None], server: str = ""):
        self.poll = poll
        # Where a fork server of this machine listens, which is the only one.
        self.server = server
        self.nodes: dict[str, Node] = {}
        # CPUs and GPUs reserved, and what each actor said of its machine, by node.
        self.held: dict[str, tuple[int, int]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self._actors: dict[str, Any] = {}
        self._warming: dict[str, Any] = {}
        self._watched: dict[Any, str] = {}
        self._news: dict[str, int] = {}
        self._states: dict[int, RankState] = {}
        self._used: set[str] = set()
        self._silent: dict[str, float] = {}
        self._looked = time.monotonic()

    def prepare(self, wanted: Mapping[Node, tuple[int, int]]) -> list[Node]:
        """Has an actor with so many CPUs and GPUs on each of these nodes; those that could not be had."""
        for node, (cpus, gpus) in wanted.items():
            held = self.held.get(node.id, (-1, -1))
            if held[0] < cpus or held[1] < gpus:
                self.drop(node.id)
                self._start(node, cpus, gpus)
        asked = {self._actors[node.id].about.remote(): node for node in wanted if node.id not in self.about}
        lost, end = [], time.monotonic() + READY_SECONDS
        while asked:
            done, _ = _ray().wait(list(asked), timeout=0.2)
            self.poll()
            for reference in done:
                node = asked.pop(reference)
                try:
                    self.about[node.id] = _ray().get(reference)
                except _ray().exceptions.RayError:
                    lost.append(node)
            if time.monotonic() > end:
                lost += asked.values()
                break
        for node in lost:
            self.drop(node.id)
        for node in wanted:
            if error := self.about.get(node.id, {}).get("error"):
                raise ConfigError(f"{node}: what ranks need can't be imported there: {error}")
        return lost

    def warm(self, wanted: Mapping[Node, tuple[int, int]]) -> bool:
        """Whether there is an actor on each of these nodes that is ready; starts those that are missing."""
        for node, (cpus, gpus) in wanted.items():
            if node.id not in self._actors:
                self._start(node, cpus, gpus)
                self._warming[node.id] = self._actors[node.id].about.remote()
        for name, reference in list(self._warming.items()):
            done, _ = _ray().wait([reference], timeout=0)
            if not done:
                continue
            del self._warming[name]
            try:
                self.about[name] = _ray().get(reference)
            except _ray().exceptions.RayError:
                self.drop(name)
        return all(node.id in self.about for node in wanted)

    def start(self, environments: Mapping[str, dict[int, dict[str, str]]], work: bytes) -> None:
        """Starts ranks: by node, the environment of each."""
        self._states, self._used = {}, set(environments)
        self._watched, self._news = {}, dict.fromkeys(environments, 0)
        self._silent = dict.fromkeys(environments, 0.0)
        packed = _ray().put(work)
        started = {self._actors[name].start.remote(each, packed): name for name, each in environments.items()}
        self._get(list(started), seconds=LOST_SECONDS)
        self._looked = time.monotonic()

    def look(self, seconds: float) -> tuple[dict[int, RankState], list[str]]:
        """The ranks as they are now, by rank, and nodes that are lost; returns early where there are news."""
        for name in self._used - set(self._watched.values()):
            self._watched[self._actors[name].watch.remote(self._news[name], 1.0)] = name
        done, _ = _ray().wait(list(self._watched), timeout=seconds)
        # Others may be there, too.
        done, _ = _ray().wait(list(self._watched), num_returns=len(self._watched), timeout=0)
        now, lost = time.monotonic(), []
        passed, self._looked = min(now - self._looked, LONGEST_LOOK), now
        self._silent = {name: silent + passed for name, silent in self._silent.items()}
        for reference in done:
            name = self._watched.pop(reference)
            try:
                self._news[name], told = _ray().get(reference)
            except _ray().exceptions.RayError:
                lost.append(name)
                continue
            self._silent[name] = 0.0
            self._states |= states_of(told)
        lost += [name for name, silent in self._silent.items() if silent > LOST_SECONDS and name not in lost]
        return dict(self._states), lost

    def silent(self) -> bool:
        """Whether one of the machines has not answered for a while."""
        return any(silent > SILENT_SECONDS for silent in self._silent.values())

    def end(self, lost: Sequence[str] = ()) -> None:
        """Ends all ranks; gives up the nodes that are `lost`."""
        for name in lost:
            self.drop(name)
        self._get([self._actors[name].end.remote() for name in self._used if name in self._actors], LOST_SECONDS)
        self._used, self._watched = set(), {}

    def stacks(self) -> dict[int, str]:
        """Where each rank is in its program."""
        asked = [self._actors[name].stacks.remote() for name in self._used]
        return {rank: text for found in self._get(asked, LOST_SECONDS) for rank, text in found.items()}

    def unseen(self, paths: Sequence[Path], nodes: Sequence[Node]) -> dict[str, list[str]]:
        """Those of `paths` that one of `nodes` doesn't see, by node."""
        names = [node.id for node in nodes]
        found = self._get([self._actors[name].unseen.remote([str(path) for path in paths]) for name in names], 60)
        return {name: missing for name, missing in zip(names, found, strict=False) if missing}

    def port(self, node: Node) -> int:
        """A port that is free there; 0 where it doesn't answer."""
        found = self._get([self._actors[node.id].about.remote()], LOST_SECONDS)
        return int(found[0]["port"]) if found else 0

    def drop(self, name: str) -> None:
        """Gives up the actor of a node."""
        self.held.pop(name, None)
        self.about.pop(name, None)
        self._warming.pop(name, None)
        self._used.discard(name)
        self._watched = {reference: of for reference, of in self._watched.items() if of != name}
        if actor := self._actors.pop(name, None):
            with suppress(Exception):
                _ray().kill(actor)

    def close(self) -> None:
        """Ends everything."""
        self._get([actor.close.remote() for actor in self._actors.values()], LOST_SECONDS)

    def place(self, node: Node, pid: int) -> Place:
        return Place(self.about.get(node.id, {}).get("host", node.host), pid, node.id)

    def _start(self, node: Node, cpus: int, gpus: int) -> None:
        ray = _ray()
        from ray import cloudpickle
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cloudpickle.register_pickle_by_value(host)
        server, self.server = self.server, ""
        self.nodes[node.id], self.held[node.id] = node, (cpus, gpus)
        self._actors[node.id] = (
            ray.remote(host.Host)
            .options(
                num_cpus=cpus,
                num_gpus=gpus,
                max_concurrency=CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(python_paths(), os.getcwd(), server)
        )

    def _get(self, references: list[Any], seconds: float) -> list[Any]:
        """The values of those that come in time."""
        ray, end, left, found = _ray(), time.monotonic() + seconds, list(references), {}
        while left and time.monotonic() < end:
            done, left = ray.wait(left, num_returns=len(left), timeout=0.1)
            for reference in done:
                with suppress(ray.exceptions.RayError):
                    found[reference] = ray.get(reference)
            self.poll()
        return [found[reference] for reference in references if reference in found]


def python_paths() -> list[str]:
    """Where this process looks for modules."""
    return [path or os.getcwd() for path in sys.path]


def _ray() -> Any:
    return sys.modules["ray"]
