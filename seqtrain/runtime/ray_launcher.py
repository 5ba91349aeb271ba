"""`runtime=ray`: Ray Train starts the ranks, and starts them again when one is killed."""

import atexit
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from seqtrain import errors
from seqtrain.errors import ConfigError
from seqtrain.report import announced
from seqtrain.runtime.lease import EpochFolder, has_ended, saved_step
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.ranks import pick_device, this_process
from seqtrain.runtime.restarts import Failure, Restarts, read_places
from seqtrain.runtime.resume import what_is_kept
from seqtrain.runtime.run_folder import log_to, read_lines
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.signals import kept_handlers
from seqtrain.runtime.worker import Session, one_line, train

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

log = logging.getLogger("seqtrain.runtime")

# Seconds between two looks at what the ranks have written.
POLL_SECONDS = 0.3
# A setting that Ray's type stubs don't know.
NO_RETRIES: dict[str, Any] = {"max_preemption_failures": 0}
# What Ray starts on this machine before any worker.
OWN_PROCESSES = ("gcs_server", "raylet")


class WorkerError(RuntimeError):
    """The ranks failed, and another restart would not help; the message says how."""


class RayEndedError(WorkerError):
    """A process that Ray itself needs has ended."""


def launch(session: Session, poll: Callable[[], None], display: ProgressDisplay) -> None:
    """Trains on `parallel.data x parallel.sequence` Ray workers; returns when they have finished or stopped.

    `poll` is called a few times a second meanwhile; `display` is told what takes long before the first step, and of
    restarts. Raises a rank's own `SeqtrainError` at once, and `WorkerError` for other failures that `Restarts` gives up
    on.
    """
    running = True
    try:
        with announced("starting Ray", display.say), kept_handlers():
            start_ray(session.config)
        children = {process: process.name() for process in psutil.Process().children()}
        started = {process: name for process, name in children.items() if name in OWN_PROCESSES}

        def check_ray() -> None:
            poll()
            if ended := [name for process, name in started.items() if has_ended(process)]:
                raise RayEndedError(f"Ray's {ended[0]} ended; {what_is_kept(session.folder)}")

        restarts = Restarts(session.config.runtime.max_restarts, saved=saved_step(session.lease.root))
        while failure := _train_once(session, check_ray, display, restarts.left_out):
            _restart_or_raise(session, restarts, failure)
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
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS))
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
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    log.info("runtime: Ray %s on %s", ray.__version__, config.runtime.address or "this machine (127.0.0.1 only)")


def _train_once(
    session: Session, poll: Callable[[], None], display: ProgressDisplay, left_out: Sequence[str]
) -> Failure | None:
    """Starts a group of ranks and waits for its end; how it failed, if it did."""
    before, began = session.lease.current().number, time.monotonic()
    starting = f"starting {session.config.parallel.ranks} workers"
    display.say(f"{starting} ...")

    def has_begun() -> bool:
        # The ranks take an epoch of their own.
        return session.lease.current().number > before

    def poll_and_say() -> None:
        nonlocal starting
        if starting and has_begun():
            display.say(f"{starting}: {time.monotonic() - began:.0f} s")
            starting = ""
        poll()

    failed = _follow(session, _trainer(session, f"{session.name}-{before}", left_out), poll_and_say)
    if failed is None:
        return None
    log.info("Ray says: %s", failed)
    if type(failed).__name__ in ("ActorDiedError", "ActorUnavailableError"):
        raise WorkerError(f"a process of Ray's own ended; {what_is_kept(session.folder)}. {one_line(failed)[:300]}")
    return _failure(session, failed, begun=has_begun())


def _failure(session: Session, failed: BaseException, *, begun: bool) -> Failure:
    """Who failed first, and how: what a rank has left, or else the first whose process ended."""
    errors_of, epoch = getattr(failed, "worker_failures", {}), session.lease.current()
    places = dict(enumerate(read_places(epoch.ranks) if begun else ()))
    if begun and (left := _left_error(epoch)):
        log.info("rank %d failed:\n%s", left["rank"], left["traceback"])
        return Failure(f"failed: {left['line']}", left["rank"], places.get(left["rank"]), left["kind"], left["step"])
    step = max((record["step"] for record in read_lines(session.folder.metrics)), default=-1) if begun else -1
    ended = [rank for rank, error in errors_of.items() if type(error).__name__ == "WorkerHealthCheckFailedError"]
    first = min(ended or errors_of, default=-1)
    what = "ended without a word (killed, or out of memory)"
    if not ended:
        what = f"failed: {one_line(errors_of.get(first, failed))[:300]}"
    return Failure(what, first, places.get(first), "", step)


def _restart_or_raise(session: Session, restarts: Restarts, failure: Failure) -> None:
    """Says what failed and from where the run goes on; raises `WorkerError` where it is not to."""
    saved = saved_step(session.lease.root)
    if reason := restarts.add(failure, saved=saved):
        raise WorkerError(f"{failure}; {reason}; {what_is_kept(session.folder)}")
    budget = f"restart {restarts.count} of {restarts.most} without a new checkpoint"
    log.warning("%s; it goes on from step %d (%s)", failure, saved, budget)
    time.sleep(restarts.pause)


def _trainer(session: Session, name: str, left_out: Sequence[str]) -> "TorchTrainer":
    """`name`: one used before would make Ray take up that one's records. `left_out`: nodes that are not used."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from seqtrain.runtime.ray_group import GroupConfig

    config = session.config
    on_gpu = config.runtime.device == "cuda" or (config.runtime.device == "auto" and torch.cuda.is_available())
    return TorchTrainer(
        _run_rank,
        train_loop_config={"session": session},
        torch_config=GroupConfig(
            backend="nccl" if on_gpu else "gloo",
            timeout_s=config.runtime.collective_timeout_seconds,
            store_folder="" if config.runtime.address else str(session.lease.own.ray),
        ),
        scaling_config=ScalingConfig(
            num_workers=config.parallel.ranks,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": config.runtime.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
            **_elsewhere(left_out),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(session.lease.own.ray),
            # What is started again is decided here: Ray counts failures, not what came between them.
            failure_config=FailureConfig(max_failures=0, **NO_RETRIES),
        ),
    )


def _elsewhere(left_out: Sequence[str]) -> dict[str, Any]:
    """The setting that makes Ray place workers on other nodes than these, if there are others."""
    nodes = {node["NodeID"] for node in sys.modules["ray"].nodes() if node["Alive"]} if left_out else set()
    others = {"label_selector": {"ray.io/node-id": f"!in({','.join(left_out)})"}}
    return others if nodes - set(left_out) else {}


def _run_rank(arguments: dict[str, Session]) -> None:
    """What Ray runs in each worker."""
    session = arguments["session"]
    config = session.config
    torch.set_num_threads(config.runtime.cpus_per_worker)
    ranks = this_process(pick_device(config.runtime.device))
    if ranks.first:
        log_to(session.folder.log)
    train(session, ranks)


def _follow(session: Session, trainer: "TorchTrainer", poll: Callable[[], None]) -> BaseException | None:
    """Runs the trainer in another thread, so that this one stays free for signals, and polls until it is done.

    What it raises, if it does.
    """
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except (Exception, SystemExit) as error:  # SystemExit is what Ray raises here when it is shut down meanwhile.
            failed.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        poll()
        _raise_mistake(session)
    poll()
    _raise_mistake(session)
    return failed[0] if failed else None


def _left_error(epoch: EpochFolder) -> dict[str, Any] | None:
    """What the first rank of a group to fail has left."""
    try:
        left: dict[str, Any] = json.loads(epoch.error.read_bytes())
    except (FileNotFoundError, ValueError):
        # None, or one that is being written.
        return None
    return left


def _raise_mistake(session: Session) -> None:
    """Raises a mistake of the user's that a rank of the group that trains now has met: a restart would, too."""
    left = _left_error(session.lease.current())
    if left and left["of_user"]:
        log.info("rank %d failed:\n%s", left["rank"], left["traceback"])
        raise vars(errors).get(left["kind"], ConfigError)(left["line"])
