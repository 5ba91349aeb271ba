"""`runtime=ray`: the ranks are started on the machines of a Ray cluster, and started again when one is killed."""

import atexit
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from seqtrain.errors import ConfigError
from seqtrain.report import announced
from seqtrain.runtime.checks import check_answers
from seqtrain.runtime.driver import Driver
from seqtrain.runtime.host import start_server
from seqtrain.runtime.lease import has_ended
from seqtrain.runtime.progress import ProgressDisplay
from seqtrain.runtime.ray_hosts import python_paths
from seqtrain.runtime.restarts import WorkerError
from seqtrain.runtime.resume import what_is_kept
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.runtime.signals import kept_handlers
from seqtrain.runtime.timeline import Timeline
from seqtrain.runtime.worker import Session

log = logging.getLogger("seqtrain.runtime")

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
        if not session.config.runtime.cluster:
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

        driver = Driver(session, check_ray, display, timeline, address)
        try:
            driver.run()
        finally:
            # Where Ray is gone nobody is there to be asked.
            if not any(has_ended(process) for process in started):
                with suppress(Exception):
                    driver.hosts.close()
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
    if not config.runtime.cluster:
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
    if config.runtime.cluster:
        check_answers(config.runtime)
        options["address"] = config.runtime.cluster
    else:
        cpus = max(os.cpu_count() or 1, config.parallel.ranks * config.runtime.cpus_per_worker)
        # `local` whatever RAY_ADDRESS says.
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Not that folder itself: Ray lets everybody write into what it is given. A short name, as sockets' are limited.
        options["_temp_dir"] = str(_private_folder() / "r")
        options["runtime_env"] = {"env_vars": {"GLOO_SOCKET_IFNAME": "lo" if os.uname().sysname == "Linux" else "lo0"}}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        if not config.runtime.cluster:
            raise
        raise ConfigError(
            f"{config.runtime.cluster_key}: {' '.join(str(error).split())[:300]}; start the program on a machine "
            "of the cluster, or with ray job submit"
        ) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    log.info("runtime: Ray %s on %s", ray.__version__, config.runtime.cluster or "this machine (127.0.0.1 only)")
