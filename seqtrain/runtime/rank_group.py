"""One group of ranks on the machines of a Ray cluster, from its start to its end or failure."""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from seqtrain import errors
from seqtrain.errors import ConfigError
from seqtrain.runtime.cluster import Node, by_node
from seqtrain.runtime.lease import EpochFolder
from seqtrain.runtime.pulse import Pulse
from seqtrain.runtime.ranks import TRANSPORT, join_group, pick_device, use_network_of
from seqtrain.runtime.ray_hosts import LOST_SECONDS, Hosts
from seqtrain.runtime.restarts import Failure
from seqtrain.runtime.run_folder import log_to, read_lines
from seqtrain.runtime.timeline import Timeline
from seqtrain.runtime.watch import RankState, Watch, describe
from seqtrain.runtime.worker import Session, leave_error, train
from seqtrain.validation import AUTO

log = logging.getLogger("seqtrain.runtime")

# Seconds between two looks at the ranks.
POLL_SECONDS = 0.3
# Seconds in which the one that failed first is to be told from those that lost it.
BLAME_SECONDS = 2.0
# Lines of a rank's last words that run.log gets.
LINES = 40


class RankGroup:
    """Ranks on `places`, one after the other.

    `poll` is called a few times a second; so is `leave`, which says why they are to save and make way, if they are.
    """

    def __init__(
        self,
        session: Session,
        hosts: Hosts,
        places: Sequence[Node],
        poll: Callable[[], None],
        timeline: Timeline,
        leave: Callable[[Mapping[int, RankState]], str] = lambda states: "",
        *,
        on_gpu: bool,
    ):
        self.session, self.hosts, self.places, self.poll, self.timeline = session, hosts, places, poll, timeline
        self.leave, self.on_gpu = leave, on_gpu
        # Why the ranks were asked to make way; machines that were lost.
        self.left = ""
        self.lost: list[str] = []
        runtime = session.config.runtime
        step = 0.0 if runtime.step_timeout_seconds == AUTO else float(runtime.step_timeout_seconds)
        self.watch = Watch(step_seconds=step, section_seconds=runtime.section_timeout_seconds)
        self.before = session.lease.current().number
        self.names = {rank: node.host for rank, node in enumerate(places)}

    def run(self) -> Failure | None:
        """Starts the ranks and waits for their end; how they failed, if they did. Raises a mistake of the user's."""
        ended = False
        try:
            if not self._start():
                self.lost = [self.places[0].id]
                return self._lost({})
            told = False
            while True:
                states, self.lost = self.hosts.look(POLL_SECONDS)
                self.poll()
                raise_mistake(self.session)
                if not told and (told := self.timeline.follow(states.values(), len(self.places))):
                    log.info("runtime: %s", self.timeline)
                if not self.left and (why := self.leave(states)):
                    self.left = why
                    log.info("runtime: %s: the ranks are asked to save and make way", why)
                    self.session.lease.own.stop.touch()
                if failure := self._lost(states) or self._failed(states) or self._hangs(states):
                    return failure
                if len(states) == len(self.places) and all(state.status == 0 for state in states.values()):
                    ended = True
                    return None
        finally:
            if not ended:
                self.hosts.end(self.lost)

    def _start(self) -> bool:
        """Starts the ranks; False where the first one's machine doesn't answer."""
        shared: dict[str, str] = {"WORLD_SIZE": str(len(self.places)), "SEQTRAIN_STORE": ""}
        if self.session.config.runtime.cluster:
            first = self.places[0]
            if not (port := self.hosts.port(first)):
                return False
            shared |= {"MASTER_ADDR": first.address, "MASTER_PORT": str(port)}
        else:
            # Through a file: nothing listens, not even on this machine.
            folder = self.session.lease.own.ray
            folder.mkdir(parents=True, exist_ok=True)
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            shared["SEQTRAIN_STORE"] = str(folder / f"store-{self.before}-{time.time_ns()}")
        environments: dict[str, dict[int, dict[str, str]]] = {}
        for number, (node, ranks) in enumerate(by_node(self.places).items()):
            cpus, _ = self.hosts.held[node.id]
            environments[node.id] = {
                rank: shared
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(local),
                    "LOCAL_WORLD_SIZE": str(len(ranks)),
                    "GROUP_RANK": str(number),
                    "OMP_NUM_THREADS": str(max(1, cpus // len(ranks))),
                    "SEQTRAIN_ADDRESS": node.address,
                }
                for local, rank in enumerate(ranks)
            }
        from ray import cloudpickle

        self.hosts.start(environments, cloudpickle.dumps(partial(run_rank, self.session, self.on_gpu)))
        return True

    def _lost(self, states: Mapping[int, RankState]) -> Failure | None:
        for name in self.lost:
            node = self.hosts.nodes[name]
            ranks = [rank for rank, place in enumerate(self.places) if place.id == name]
            pid = states[ranks[0]].pid if ranks[0] in states else 0
            return Failure(
                f"is lost: its machine {node} no longer answers",
                ranks[0],
                self.hosts.place(node, pid),
                "",
                self._step(),
            )
        return None

    def _failed(self, states: Mapping[int, RankState]) -> Failure | None:
        """Who failed first, and how: what a rank has left, or else one that was killed, or else the first to end."""
        if not any(state.status for state in states.values()):
            return None
        began = time.monotonic()
        while True:
            left = left_error(self.session.lease.current())
            if left or any((state.status or 0) < 0 for state in states.values()):
                break
            # Who ended by itself has lost another, which may have gone with its machine.
            if time.monotonic() - began > (LOST_SECONDS + BLAME_SECONDS if self.hosts.silent() else BLAME_SECONDS):
                break
            states, self.lost = self.hosts.look(POLL_SECONDS)
            raise_mistake(self.session)
            if failure := self._lost(states):
                return failure
        for state in states.values():
            if state.status:
                said = "\n".join(state.said.splitlines()[-LINES:])
                log.info(
                    "rank %d on %s ended with status %d:\n%s", state.rank, self.names[state.rank], state.status, said
                )
        if left:
            log.info("rank %d failed:\n%s", left["rank"], left["traceback"])
            return self._failure(states[left["rank"]], f"failed: {left['line']}", left["kind"], left["step"])
        failed = [state for state in states.values() if state.status]
        first = min(failed, key=lambda state: ((state.status or 0) > 0, state.rank))
        status = first.status or 0
        if status < 0:
            name = signal.Signals(-status).name
            memory = " (by someone, or for want of memory)" if -status == signal.SIGKILL else ""
            return self._failure(first, f"was ended by {name}{memory}")
        words = [line for line in first.said.splitlines() if line.strip()]
        word = words[-1][:300] if words else f"status {status}"
        if not any(name in word.lower() for name in TRANSPORT):
            return self._failure(first, f"ended: {word}")
        failure = self._failure(first, f"has lost others: {word}")
        # That is not its machine's fault.
        return replace(failure, place=failure.place and replace(failure.place, node=""))

    def _failure(self, state: RankState, what: str, kind: str = "", step: int | None = None) -> Failure:
        where = self.hosts.place(self.places[state.rank], state.pid)
        return Failure(what, state.rank, where, kind, self._step() if step is None else step)

    def _step(self) -> int:
        """Steps done by this group; -1 before it began."""
        if self.session.lease.current().number == self.before:
            return -1
        return max((record["step"] for record in read_lines(self.session.folder.metrics)), default=-1)

    def _hangs(self, states: Mapping[int, RankState]) -> Failure | None:
        told = list(states.values())
        self.watch.look(told, time.monotonic())
        if slow := self.watch.slow(told):
            log.warning("the others wait for %s", describe(slow, self.names))
        if not (hung := self.watch.hung(told)):
            return None
        for rank, text in sorted(self.hosts.stacks().items()):
            log.info("rank %d on %s, which is %s:\n%s", rank, self.names[rank], states[rank].where(), text)
        seconds = self.watch.limit(told)
        what = "is stopped" if hung[0].stopped else f"hangs: nobody came further for {seconds:.0f} s; it is"
        return self._failure(hung[0], f"{what} {hung[0].where()} (all of them: run.log)")


def run_rank(session: Session, on_gpu: bool, pulse: Pulse) -> None:
    """What each rank runs, in a process that was forked for it."""
    config = session.config
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if on_gpu and not torch.cuda.is_available():
        error = ConfigError(
            f"{socket.gethostname()}: Ray has GPUs there, and torch sees no CUDA device; reinstall torch"
        )
        leave_error(session.lease, int(os.environ["RANK"]), error, step=-1)
        raise error
    use_network_of(os.environ["SEQTRAIN_ADDRESS"])
    ranks = join_group(
        pick_device("cuda" if on_gpu else "cpu"),
        timeout_seconds=config.runtime.collective_timeout_seconds,
        section_seconds=config.runtime.section_timeout_seconds,
        store=os.environ["SEQTRAIN_STORE"],
        pulse=pulse,
    )
    if ranks.first:
        log_to(session.folder.log)
    train(session, ranks)


def left_error(epoch: EpochFolder) -> dict[str, Any] | None:
    """What the first rank of a group to fail has left."""
    try:
        left: dict[str, Any] = json.loads(epoch.error.read_bytes())
    except (FileNotFoundError, ValueError):
        # None, or one that is being written.
        return None
    return left


def raise_mistake(session: Session) -> None:
    """Raises a mistake of the user's that a rank of the group that trains now has met: a restart would, too."""
    left = left_error(session.lease.current())
    if left and left["of_user"]:
        log.info("rank %d failed:\n%s", left["rank"], left["traceback"])
        raise vars(errors).get(left["kind"], ConfigError)(left["line"])
