"""Has a run trained by one group of ranks after the other, on the machines that there are."""

import json
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from seqtrain.errors import ConfigError, Interrupted
from seqtrain.report import announced
from seqtrain.runtime.checkpoint import latest
from seqtrain.runtime.cluster import Node, by_node, draining, drawn, nodes, place, straddling
from seqtrain.runtime.fork_server import about
from seqtrain.runtime.lease import saved_step
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.rank_group import RankGroup
from seqtrain.runtime.ray_hosts import Hosts
from seqtrain.runtime.restarts import Failure, Restarts, WorkerError
from seqtrain.runtime.resume import what_is_kept
from seqtrain.runtime.settings import PretrainConfig, RuntimeConfig
from seqtrain.runtime.signals import stop_requested
from seqtrain.runtime.timeline import Timeline
from seqtrain.runtime.watch import RankState
from seqtrain.runtime.worker import Session
from seqtrain.validation import AUTO

log = logging.getLogger("seqtrain.runtime")

# Seconds between two lines that say what is waited for.
WAITING_SECONDS = 60.0
# Seconds for which a machine isn't used that has stopped answering, or has told of its end and is still there.
AVOIDED_SECONDS = 60.0
# Seconds between two looks at the machines while ranks train.
LOOK_SECONDS = 5.0


class Driver:
    """Places groups of ranks on the machines, and says when one is to make way for another.

    `poll` is called a few times a second. `server`: where a fork server of this machine listens already.
    """

    def __init__(
        self, session: Session, poll: Callable[[], None], display: ProgressDisplay, timeline: Timeline, server: str
    ):
        self.session, self.poll, self.display = session, poll, display
        self.config = session.config
        self.hosts = Hosts(poll, server)
        self.timeline = timeline
        self.restarts = Restarts(self.config.runtime.max_restarts, saved=newest_saved(session))
        # Nodes that aren't used, and until when.
        self._avoided: dict[str, float] = {}
        self._looked = 0.0
        # Nodes that see the run's files, and have its code.
        self._checked: set[str] = set()
        # Whether a place that is missing may soon be there.
        self._waits = True

    def run(self) -> None:
        """Returns when a group has trained to the end, or was stopped."""
        while True:
            places, on_gpu = self._places()
            if not self._prepare(places, on_gpu=on_gpu):
                continue
            group = self._group(places, on_gpu=on_gpu)
            failure = group.run()
            for name in group.lost:
                self._avoided[name] = time.monotonic() + AVOIDED_SECONDS
            if failure is None and not (group.left and _was_stopped(self.session)):
                return
            self.timeline, self._waits = Timeline(), failure is not None
            if failure is None:
                log.warning("%s; saved, and on from step %d", group.left, newest_saved(self.session))
                # Not the user's.
                self.session.lease.own.stop.unlink(missing_ok=True)
                if stop_requested():
                    return
            else:
                _restart_or_raise(self.session, self.restarts, failure)
                self.timeline.mark("pause")

    def _room(self) -> tuple[list[tuple[Node, int]], bool]:
        """The nodes that may be used, and how many ranks each can have; whether these use GPUs."""
        runtime, now = self.config.runtime, time.monotonic()
        avoided = [name for name, until in self._avoided.items() if now < until]
        held = self.hosts.held
        there = nodes(held=held, but=[*avoided, *self.restarts.left_out]) or nodes(held=held, but=avoided)
        on_gpu = runtime.device == "cuda" or (runtime.device == "auto" and any(node.gpus for node in there))
        cores = max(1, _threads(runtime))
        return [(node, node.gpus if on_gpu else node.cpus // cores) for node in there], on_gpu

    def _best(self, room: Sequence[tuple[Node, int]]) -> list[Node]:
        """The places of as many ranks as there is room for, of those that the run may have; none for too few."""
        group = self.config.parallel.sequence * self.config.parallel.tensor
        for ranks in sizes(self.config):
            if places := place(room, ranks, group):
                return places
        return []

    def _places(self) -> tuple[list[Node], bool]:
        """The node of each rank, and whether they use GPUs; waits until there are enough."""
        config, said, began = self.config, -WAITING_SECONDS, time.monotonic()
        most, patience = sizes(config)[0], config.runtime.replacement_seconds if self._waits else 0.0
        while True:
            room, on_gpu = self._room()
            places, now = self._best(room), time.monotonic()
            if len(places) == most or (places and now - began >= patience):
                return places, on_gpu
            if stop_requested():
                raise Interrupted(signal.SIGTERM, f"stopped while it waited; {what_is_kept(self.session.folder)}")
            cores = max(1, _threads(config.runtime))
            what = "GPUs" if on_gpu else "CPUs" if cores == 1 else f"{cores} CPUs each"
            free = sum(count for _, count in room)
            if not config.runtime.cluster:
                parallel = config.parallel
                key = f"parallel.data={parallel.data} parallel.sequence={parallel.sequence}"
                raise ConfigError(f"{key}: {most} ranks, and this machine has {what} for {free}; use fewer")
            if now - said >= WAITING_SECONDS:
                then = f"; goes on with {len(places)} in {patience - now + began:.0f} s" if places else ""
                log.warning(
                    "%s: waits for %s for %d ranks; there are enough for %d, on %d machines%s",
                    config.runtime.cluster_key,
                    what,
                    most,
                    free,
                    len(room),
                    then,
                )
                said = now
            time.sleep(0.5)
            self.poll()

    def _wanted(self, places: Sequence[Node], *, on_gpu: bool) -> dict[Node, tuple[int, int]]:
        """CPUs and GPUs of each node for these ranks."""
        wanted = {}
        for node, ranks in by_node(places).items():
            threads = _threads(self.config.runtime) or max(1, node.cpus // len(ranks))
            wanted[node] = (threads * len(ranks), len(ranks) if on_gpu else 0)
        return wanted

    def _prepare(self, places: Sequence[Node], *, on_gpu: bool) -> bool:
        """Has the machines ready to start ranks; False where one could not be had."""
        wanted = self._wanted(places, on_gpu=on_gpu)
        new = [node for node in wanted if node.id not in self.hosts.about or node.id not in self._checked]
        if not new:
            return True
        machines = f"{len(new)} machines" if len(new) > 1 else "the machine"
        with announced(f"importing what ranks need on {machines}", self.display.say):
            lost = self.hosts.prepare(wanted)
        for node in lost:
            log.warning("%s: no process of Ray's could be started there; it is left out for now", node)
            self._avoided[node.id] = time.monotonic() + AVOIDED_SECONDS
        if lost:
            return False
        self.timeline.mark("imports")
        self._check(new)
        self._checked |= {node.id for node in new}
        return True

    def _check(self, new: Sequence[Node]) -> None:
        """Raises `ConfigError` where a machine doesn't see the run's files, or runs other code."""
        session, here = self.session, about()
        paths = {
            session.folder.path: f"output_dir={self.config.output_dir}",
            # One that was just made: a folder of the same name may be another.
            session.lease.own.holder: f"output_dir={self.config.output_dir}",
            session.corpus: f"data.cache_dir={self.config.data.cache_dir}",
        }
        if (tokenizer := Path(self.config.data.tokenizer)).exists():
            paths[tokenizer.absolute()] = f"data.tokenizer={tokenizer}"
        for name, missing in self.hosts.unseen(list(paths), new).items():
            raise ConfigError(
                f"{paths[Path(missing[0])]}: {self.hosts.nodes[name]} doesn't see {missing[0]}; name a folder on a "
                "file system that all machines share"
            )
        for node in new:
            there = self.hosts.about[node.id]
            if there["code"] != here["code"]:
                raise ConfigError(
                    f"{node}: runs other code of seqtrain ({there['version']}, {there['code']}) than this program "
                    f"({here['version']}, {here['code']}); install the same on all machines"
                )
            for package in ("python", "torch"):
                if there[package] != here[package]:
                    log.warning("%s: has %s %s, this program %s", node, package, there[package], here[package])

    def _group(self, places: Sequence[Node], *, on_gpu: bool) -> RankGroup:
        """The next group of ranks."""
        group = self.config.parallel.sequence * self.config.parallel.tensor
        log.info("ranks, those of a sequence between brackets:\n%s", "\n".join(drawn(places, group)))
        if spread := straddling(places, group):
            log.info("runtime: %d of %d sequences lie on several machines", spread, len(places) // group)
        parallel = replace(self.config.parallel, data=len(places) // group)
        session = replace(self.session, config=replace(self.config, parallel=parallel))

        def leave(states: Mapping[int, RankState]) -> str:
            return self._why_leave(places, states)

        return RankGroup(session, self.hosts, places, self.poll, self.timeline, leave, on_gpu=on_gpu)

    def _why_leave(self, places: Sequence[Node], states: Mapping[int, RankState]) -> str:
        """Why ranks are to save and make way for others; empty where they are not to."""
        for state in states.values():
            if state.noticed and state.status is None:
                node = places[state.rank]
                if self.config.runtime.cluster:
                    self._avoided[node.id] = time.monotonic() + AVOIDED_SECONDS
                return f"rank {state.rank} on {node} was sent SIGTERM, a notice of its machine's end"
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS or not self.config.runtime.cluster:
            return ""
        self._looked = now
        used = {node.id: node for node in places}
        for name in draining():
            if name in used:
                return f"{used[name]} is being drained"
        room, on_gpu = self._room()
        best = self._best(room)
        # Those that train go on until the others have imported what they need.
        if len(best) > len(places) and self.hosts.warm(self._wanted(best, on_gpu=on_gpu)):
            return f"there is room for {len(best)} ranks in place of {len(places)}"
        return ""


def sizes(config: PretrainConfig) -> list[int]:
    """How many ranks the run may have, the most first."""
    parallel, workers = config.parallel, config.runtime.workers
    group = parallel.sequence * parallel.tensor
    if not workers:
        return [parallel.ranks]
    return [group * data for data in range(parallel.data, 0, -1) if workers[0] <= group * data <= workers[1]]


def newest_saved(session: Session) -> int:
    """The step of the newest checkpoint; a rank that was killed may have written one and not come to note it."""
    noted, newest = saved_step(session.lease.of_checkpoints.root), latest(session.folder.checkpoints)
    return max(noted, newest.progress.step if newest else 0)


def _was_stopped(session: Session) -> bool:
    """Whether the group that has ended had not come to the end of the run."""
    return bool(json.loads(session.lease.current().outcome.read_text())["stopped"])


def _threads(runtime: RuntimeConfig) -> int:
    """Cores of a rank; 0 for its share of those of its machine."""
    return 0 if runtime.cpus_per_worker == AUTO else runtime.cpus_per_worker


def _restart_or_raise(session: Session, restarts: Restarts, failure: Failure) -> None:
    """Says what failed and from where the run goes on; raises `WorkerError` where it is not to."""
    saved = newest_saved(session)
    if reason := restarts.add(failure, saved=saved):
        raise WorkerError(f"{failure}; {reason}; {what_is_kept(session.folder)}")
    budget = f"restart {restarts.count} of {restarts.most} without a new checkpoint"
    log.warning("%s; it goes on from step %d (%s)", failure, saved, budget)
    time.sleep(restarts.pause)
