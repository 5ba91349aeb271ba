"""Several hosts on one machine, of Linux's namespaces: each has its network, host name, processes and /tmp. Needs root.

A host's name resolves to 127.0.1.1 on itself, as Debian has it, and to its address elsewhere.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Hosts are in 10.79.0.0/24.
NETWORK, BRIDGE = "10.79.0.", "faults0"
# The first process of a host: waits, and buries its dead.
INIT = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try:
        os.wait()
    except OSError:
        time.sleep(0.1)
"""


def available() -> bool:
    """Whether this process may make hosts."""
    tools = all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter"))
    return sys.platform == "linux" and os.geteuid() == 0 and tools


@dataclass
class Host:
    """One of them. `init`: its first process, as this machine sees it."""

    number: int
    init: int

    @property
    def address(self) -> str:
        return f"{NETWORK}{self.number + 1}"

    @property
    def cable(self) -> str:
        return f"{BRIDGE}n{self.number}"

    def processes(self) -> list[psutil.Process]:
        """What runs on it, its first process left out."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.init).children(recursive=True)
        return []


@dataclass
class Hosts:
    """Hosts below `folder`, a short path, on which Ray is started; a context manager that ends them all."""

    folder: Path
    count: int
    cpus: int = 1
    hosts: dict[int, Host] = field(default_factory=dict)

    def __enter__(self) -> "Hosts":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        for number in range(self.count):
            self.up(number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self.hosts):
            self.kill(number)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", BRIDGE)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def head(self) -> str:
        return f"{NETWORK}1:6379"

    def up(self, number: int) -> Host:
        """Makes a host, with Ray on it: the head on host 0."""
        own = self.folder / f"tmp{number}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o1777)
        names = [f"{'127.0.1.1' if n == number else f'{NETWORK}{n + 1}'} node{n}" for n in range(self.count)]
        (self.folder / f"hosts{number}").write_text("\n".join([*names, "127.0.0.1 localhost", ""]))
        prepare = (
            f"hostname node{number}; mount --bind {self.folder}/hosts{number} /etc/hosts; mount --bind {own} /tmp; "
            f'exec {sys.executable} -c "$0"'
        )
        outer = subprocess.Popen(
            ["unshare", "-n", "-u", "-m", "-p", "-f", "--mount-proc", "--kill-child", "bash", "-c", prepare, INIT],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while not (inner := psutil.Process(outer.pid).children()):
            time.sleep(0.02)
        host = self.hosts[number] = Host(number, inner[0].pid)
        time.sleep(0.3)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", host.cable)
        _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.init))
        _ip("link", "set", host.cable, "master", BRIDGE, "up")
        self.run(number, ["ip", "link", "set", "lo", "up"])
        self.run(number, ["ip", "addr", "add", f"{host.address}/24", "dev", "eth0"])
        self.run(number, ["ip", "link", "set", "eth0", "up"])
        where = ["--head", "--port=6379", "--include-dashboard=false"] if number == 0 else [f"--address={self.head}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={host.address}"]
        self.run(number, [*ray, f"--num-cpus={self.cpus}", *where])
        return host

    def command(self, number: int, words: Sequence[str]) -> list[str]:
        """The words that run `words` on a host."""
        environment = ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={self.token}", "TMPDIR=/tmp"]
        inside = ["nsenter", "-t", str(self.hosts[number].init), "-n", "-u", "-m", "-p"]
        return [*inside, "env", "-C", os.getcwd(), f"PYTHONPATH={os.getcwd()}", *environment, *words]

    def run(self, number: int, words: Sequence[str]) -> None:
        """Runs `words` on a host, and waits for their end."""
        subprocess.run(self.command(number, words), check=True, capture_output=True)

    def cut(self, number: int) -> None:
        """Takes a host's cable out."""
        _ip("link", "set", self.hosts[number].cable, "down")

    def join(self, number: int) -> None:
        """Puts it back."""
        _ip("link", "set", self.hosts[number].cable, "up")

    def stop(self, number: int) -> None:
        """Stops all that runs on a host, as a machine that stands still would."""
        for process in self.hosts[number].processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def kill(self, number: int) -> None:
        """Ends a host and everything on it."""
        with suppress(ProcessLookupError):
            os.kill(self.hosts.pop(number).init, signal.SIGKILL)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
