"""`runtime=ray`: the ranks are started on the machines of a Ray cluster, and started again when one is killed."""

import atexit
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from seqtrain.errors import ConfigError, Interrupted
from seqtrain.report import announced
from seqtrain.runtime.cluster import Node, by_node, drawn, nodes, place, straddling
from seqtrain.runtime.host import start_server
from seqtrain.runtime.lease import has_ended, saved_step
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.rank_group import RankGroup
from seqtrain.runtime.ray_hosts import Hosts, python_paths
from seqtrain.runtime.restarts import Failure, Restarts, WorkerError
from seqtrain.runtime.resume import what_is_kept
from seqtrain.runtime.settings import PretrainConfig, RuntimeConfig
from seqtrain.runtime.signals import kept_handlers, stop_requested
from seqtrain.runtime.timeline import Timeline
from seqtrain.runtime.worker import Session
from seqtrain.validation import AUTO

log = logging.getLogger("seqtrain.runtime")

# Seconds between two lines that say what is waited for.
WAITING_SECONDS = 60.0
# What Ray starts on this machine before any worker.
OWN_PROCESSES = ("gcs_server", "raylet")


class RayEndedError(WorkerError):
    """A process that Ray itself needs has ended."""


def launch(session: Session, poll: Callable[[], None], display: ProgressDisplay) -> None:
    """Trains on `parallel.data x parallel.sequence` Ray workers; returns when they have finished or stopped.

    `poll` is called a few times a second meanwhile; `display` is told what takes long before the first step, and of
    restarts. Raises a rank's own `SeqtrainError` at once, and `WorkerError` for other failures that `Restarts` gives up
    on.
    """
    running, timeline, address = True, Timeline(), ""
    server: subprocess.Popen[bytes] | None = None
    try:
        if not session.config.runtime.address:
            # Beside the start of Ray, as both take long.
            address = str(_private_folder() / f"fork-{session.name}")
            server = start_server(address, python_paths(), os.getcwd())
        with announced("starting Ray", display.say), kept_handlers():
            start_ray(session.config)
        timeline.mark("Ray")
        children = {process: process.name() for process in psutil.Process().children()}
        started = {process: name for process, name in children.items() if name in OWN_PROCESSES}

        def check_ray() -> None:
            poll()
            if ended := [name for process, name in started.items() if has_ended(process)]:
                raise RayEndedError(f"Ray's {ended[0]} ended; {what_is_kept(session.folder)}")

        _Driver(session, check_ray, display, timeline, address).run()
    except RayEndedError:
        # Asked to end, Ray would wait a minute for the one that is gone.
        left = psutil.Process().children(recursive=True)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        atexit.unregister(sys.modules["ray"].shutdown)
        running = False
        raise
    finally:
        if running and "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        if server:
            server.kill()
            server.wait()


@cache
def _private_folder() -> Path:
    """A folder that nobody else can read, for Ray's files and its token, which Ray reads once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="seqtrain-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return folder


def start_ray(config: PretrainConfig) -> None:
    """Connects to `runtime.address`, or starts Ray on this machine, reachable from it only, and by this user; once."""
    # What stands in the environment must do so before the first import of Ray, which reads it then.
    if not config.runtime.address:
        # Bind to 127.0.0.1, not to every interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Another user of this machine could run code as this one. Ray's own token can be read by everybody.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_private_folder() / "token")}
        os.environ.pop("RAY_AUTH_TOKEN", None)
    # The ranks keep the directory the program was started in, so that relative paths mean the same to them.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if config.runtime.address:
        options["address"] = config.runtime.address
    else:
        cpus = max(os.cpu_count() or 1, config.parallel.ranks * config.runtime.cpus_per_worker)
        # `local` whatever RAY_ADDRESS says.
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Not that folder itself: Ray lets everybody write into what it is given. A short name, as sockets' are limited.
        options["_temp_dir"] = str(_private_folder() / "r")
        options["runtime_env"] = {"env_vars": {"GLOO_SOCKET_IFNAME": "lo" if os.uname().sysname == "Linux" else "lo0"}}
    ray.init(**options)
    logging.getLogger("ray").setLevel(logging.ERROR)
    log.info("runtime: Ray %s on %s", ray.__version__, config.runtime.address or "this machine (127.0.0.1 only)")


class _Driver:
    """Has a run trained by one group of ranks after the other."""

    def __init__(
        self, session: Session, poll: Callable[[], None], display: ProgressDisplay, timeline: Timeline, server: str
    ):
        self.session, self.poll, self.display = session, poll, display
        self.config = session.config
        self.hosts = Hosts(poll, server)
        self.timeline = timeline
        self.restarts = Restarts(self.config.runtime.max_restarts, saved=saved_step(session.lease.root))

    def run(self) -> None:
        """Returns when a group has trained to the end, or was stopped."""
        while True:
            places, on_gpu = self._places()
            self._prepare(places, on_gpu=on_gpu)
            failure = self._train_once(places, on_gpu=on_gpu)
            if failure is None:
                return
            self.timeline = Timeline()
            _restart_or_raise(self.session, self.restarts, failure)
            self.timeline.mark("pause")

    def _places(self) -> tuple[list[Node], bool]:
        """The node of each rank, and whether they use GPUs."""
        config, said = self.config, 0.0
        parallel, runtime = config.parallel, config.runtime
        while True:
            there = nodes(held=self.hosts.held, but=self.restarts.left_out) or nodes(held=self.hosts.held)
            on_gpu = runtime.device == "cuda" or (runtime.device == "auto" and any(node.gpus for node in there))
            room = [(node, node.gpus if on_gpu else node.cpus // max(1, _threads(runtime))) for node in there]
            if places := place(room, parallel.ranks, parallel.sequence * parallel.tensor):
                return places, on_gpu
            if stop_requested():
                raise Interrupted(signal.SIGTERM, f"stopped while it waited; {what_is_kept(self.session.folder)}")
            what = "GPUs" if on_gpu else f"ranks of {max(1, _threads(runtime))} CPUs"
            free = sum(count for _, count in room)
            line = f"{parallel.ranks} ranks wait for {what}: {free} are free on {len(there)} nodes"
            if not runtime.address:
                sizes = f"parallel.data={parallel.data} parallel.sequence={parallel.sequence}"
                raise ConfigError(f"{sizes}: {parallel.ranks} ranks, and this machine has {what} for {free}; use fewer")
            if time.monotonic() - said >= WAITING_SECONDS:
                log.warning(line)
                said = time.monotonic()
            time.sleep(1.0)
            self.poll()

    def _prepare(self, places: Sequence[Node], *, on_gpu: bool) -> None:
        """Has the machines ready to start ranks, and sees whether they can."""
        wanted = {}
        for node, ranks in by_node(places).items():
            threads = _threads(self.config.runtime) or max(1, node.cpus // len(ranks))
            wanted[node] = (threads * len(ranks), len(ranks) if on_gpu else 0)
        if all(node.id in self.hosts.about for node in wanted):
            return
        machines = f"{len(wanted)} machines" if len(wanted) > 1 else "the machine"
        with announced(f"importing what ranks need on {machines}", self.display.say):
            self.hosts.prepare(wanted)
        self.timeline.mark("imports")

    def _train_once(self, places: Sequence[Node], *, on_gpu: bool) -> Failure | None:
        """Starts a group of ranks and waits for its end; how it failed, if it did."""
        group = self.config.parallel.sequence * self.config.parallel.tensor
        log.info("ranks, those of a sequence between brackets:\n%s", "\n".join(drawn(places, group)))
        if spread := straddling(places, group):
            log.info("runtime: %d of %d sequences lie on several nodes", spread, len(places) // group)
        return RankGroup(self.session, self.hosts, places, self.poll, self.timeline, on_gpu=on_gpu).run()


def _threads(runtime: RuntimeConfig) -> int:
    """Cores of a rank; 0 for its share of those of its node."""
    return 0 if runtime.cpus_per_worker == AUTO else runtime.cpus_per_worker


def _restart_or_raise(session: Session, restarts: Restarts, failure: Failure) -> None:
    """Says what failed and from where the run goes on; raises `WorkerError` where it is not to."""
    saved = saved_step(session.lease.root)
    if reason := restarts.add(failure, saved=saved):
        raise WorkerError(f"{failure}; {reason}; {what_is_kept(session.folder)}")
    budget = f"restart {restarts.count} of {restarts.most} without a new checkpoint"
    log.warning("%s; it goes on from step %d (%s)", failure, saved, budget)
    time.sleep(restarts.pause)
