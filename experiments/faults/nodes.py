"""Faults of machines: of hosts made of namespaces, on which an elastic run trains.

    python tools/run_node_faults.py minutes=30          # as many cases as half an hour holds; the same again goes on
    python tools/run_node_faults.py kinds=[cut,drain] cases=10

Each case lets one machine of four be killed, stopped, cut off, drained or told of its end, or takes the head, at a
random step of a run of two to four ranks, has the machine come back in half of the cases, and compares the losses with
those of one rank that nobody disturbed. `output_dir/cases.jsonl` gets a line for each; the table says what was tried.
"""

import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import Field

from experiments.faults.hosts import Hosts, available
from experiments.faults.run import ALONE, COLUMNS, EVERY, SMALL, STEPS, Run, table
from seqtrain import report
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.runtime.lease import saved_step
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.validation import FilePath

KINDS = ("kill", "stop", "cut", "drain", "notice", "rank", "freeze", "head")
COUNT = 4
ELASTIC = (
    "runtime=ray", f"runtime.workers=[2,{COUNT}]", "runtime.replacement_seconds=5", "runtime.cpus_per_worker=1",
    "runtime.max_restarts=5", "train.batch_size=6", "train.micro_batch_size=1", f"train.steps={STEPS}",
)  # fmt: skip
WHOLE = (*ALONE, *ELASTIC[-3:-2], "train.micro_batch_size=6", ELASTIC[-1])
# Largest relative difference of a loss from that of one rank: sums are added up in another order. Over twice as many
# steps it would grow a thousandfold, step by step, wherever a fault is.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Settings:
    # Folder of the runs and of the table; a short path, as it holds sockets.
    output_dir: FilePath = "/tmp/node-faults"
    # Cases in all, over all kinds in turn.
    cases: Annotated[int, Field(gt=0)] = 40
    # No case begins after so many minutes; 0: no limit.
    minutes: Annotated[float, Field(ge=0)] = 0.0
    # Kinds of faults.
    kinds: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: list(KINDS))
    seed: Annotated[int, Field(ge=0)] = 0


class NodesRun(Run):
    """A run whose program is on host 0."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.folder, self.log, self.hosts = RunFolder(folder), folder.with_suffix(".txt"), hosts
        words = [sys.executable, "-m", "seqtrain.cli", "pretrain", *SMALL, *ELASTIC, f"runtime.address={hosts.head}"]
        with self.log.open("ab") as said:
            self.process = psutil.Popen(
                hosts.command(0, [*words, f"output_dir={folder}"]), stdout=said, stderr=said, start_new_session=True
            )
        self.seen: set[psutil.Process] = {self.process}

    def starts(self) -> list[dict[str, Any]]:
        return read_lines(self.folder.starts)


def ranks_of(hosts: Hosts, number: int) -> list[psutil.Process]:
    return [process for process in hosts.hosts[number].processes() if "RayTrainWorker" in process.name()]


def strike(kind: str, hosts: Hosts, number: int) -> None:
    """Lets the fault happen to a host."""
    if kind in ("kill", "head"):
        hosts.kill(number)
    elif kind == "stop":
        hosts.stop(number)
    elif kind == "cut":
        hosts.cut(number)
    elif kind == "drain":
        code = (
            "import ray, subprocess, sys\n"
            "ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)\n"
            "[name] = [n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == sys.argv[2]]\n"
            "subprocess.run([sys.executable, '-m', 'ray.scripts.scripts', 'drain-node', '--address', sys.argv[1], "
            "'--node-id', name, '--reason', 'DRAIN_NODE_REASON_PREEMPTION', '--reason-message', 'told', "
            "'--deadline-remaining-seconds', '120'], check=True)\n"
        )
        hosts.run(0, [sys.executable, "-c", code, hosts.head, hosts.hosts[number].address])
    else:
        sent = {"notice": signal.SIGTERM, "rank": signal.SIGKILL, "freeze": signal.SIGSTOP}[kind]
        for process in ranks_of(hosts, number)[:1]:
            process.send_signal(sent)


def make(kind: str, folder: Path, chance: random.Random, hosts: Hosts) -> dict[str, Any]:
    """One case; leaves all hosts up."""
    run, step = NodesRun(hosts, folder), chance.randint(EVERY, STEPS - 3 * EVERY)
    number, back = 0 if kind == "head" else chance.randint(1, COUNT - 1), chance.random() < 0.5
    reached = run.until(lambda: run.step() >= step and bool(ranks_of(hosts, number)))
    case: dict[str, Any] = {"kind": kind, "step": step, "host": number, "back": back, "reached": reached}
    if not reached:
        return case | {"statuses": [run.end()]}
    done, starts, struck = run.step(), len(run.starts()), time.monotonic()
    strike(kind, hosts, number)
    if kind == "head":
        case["statuses"] = [run.end()]
        for each in list(hosts.hosts):
            hosts.kill(each)
        for each in range(COUNT):
            hosts.up(each)
        struck, run = time.monotonic(), NodesRun(hosts, folder)
    run.until(lambda: len(run.starts()) > starts)
    case["detected"] = _seconds(run, struck, starts)
    first = run.starts()[-1]["step"]
    run.until(lambda: run.step() > first)
    case["recovered"], case["lost"] = round(time.monotonic() - struck, 1), max(0, done - first)
    if back and kind in ("kill", "stop", "cut", "drain"):
        _bring_back(kind, hosts, number)
    case["statuses"] = [*case.get("statuses", []), run.end()]
    if not back and kind in ("kill", "stop", "cut", "drain"):
        _bring_back(kind, hosts, number)
    ranks = [process for each in hosts.hosts for process in ranks_of(hosts, each)]
    _, alive = psutil.wait_procs(ranks, timeout=30)
    return case | {"left": [process.name() for process in alive], "sizes": [start["ranks"] for start in run.starts()]}


def _seconds(run: NodesRun, struck: float, starts: int) -> float:
    """Seconds until the next group of ranks took over: what was noticed, and waited for, before."""
    return round(time.monotonic() - struck, 1) if len(run.starts()) > starts else -1.0


def _bring_back(kind: str, hosts: Hosts, number: int) -> None:
    if kind == "cut":
        hosts.join(number)
    if number in hosts.hosts:
        hosts.kill(number)
    hosts.up(number)


def judge(case: dict[str, Any], folder: Path, whole: Path) -> list[str]:
    """What is wrong with how a case came out."""
    run, wrong = RunFolder(folder), []
    came = {record["step"]: record["loss"] for record in read_lines(run.metrics)}
    expected = {record["step"]: record["loss"] for record in read_lines(RunFolder(whole).metrics)}
    if came.keys() != expected.keys():
        wrong.append("steps are missing")
    elif any(abs(came[step] - loss) > TOLERANCE * loss for step, loss in expected.items()):
        wrong.append("losses differ")
    if case["statuses"][-1] != 0:
        wrong.append("did not finish")
    if None in case["statuses"]:
        wrong.append("hung")
    if case.get("lost", 0) > EVERY:
        wrong.append(f"{case['lost']} steps are lost")
    if case.get("left"):
        wrong.append("processes are left")
    if any(run.path.rglob("*.partial")):
        wrong.append("a partial file is left")
    if saved_step(run.epochs) != STEPS:
        wrong.append("the last checkpoint is missing")
    if "Traceback" in folder.with_suffix(".txt").read_text():
        wrong.append("a traceback")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """Makes the cases that the table has not; prints each, and the table. The exit status."""
    settings = read_settings(Settings, arguments)
    for kind in settings.kinds:
        if kind not in KINDS:
            raise ConfigError(unknown_name("kinds", kind, KINDS))
    if not available():
        raise ConfigError("run_node_faults: hosts are made of Linux's namespaces, which needs root and iproute2")
    root = Path(settings.output_dir).absolute()
    root.mkdir(parents=True, exist_ok=True)
    whole, lines, began = root / "undisturbed", root / "cases.jsonl", time.monotonic()
    if not RunFolder(whole).summary.exists() and Run(whole, *WHOLE).end() != 0:
        raise ConfigError(f"output_dir={root}: the undisturbed run failed, see {whole.with_suffix('.txt')}")
    done = {line["name"]: line for line in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    with Hosts(root / "lab", COUNT) as hosts:
        for number in range(settings.cases):
            kind = settings.kinds[number % len(settings.kinds)]
            name = f"{kind}-{settings.seed}-{number:03d}"
            if name in done:
                continue
            if settings.minutes and time.monotonic() - began > 60 * settings.minutes:
                break
            shutil.rmtree(root / name, ignore_errors=True)
            (root / f"{name}.txt").unlink(missing_ok=True)
            case = make(kind, root / name, random.Random(name), hosts)
            case = {"name": name} | case | {"wrong": judge(case, root / name, whole)}
            done[name] = case
            with lines.open("a") as file:
                file.write(json.dumps(case) + "\n")
            if not case["wrong"]:
                with suppress(OSError):
                    shutil.rmtree(root / name)
            print(case, flush=True)
    report.show_table(COLUMNS, table(list(done.values())))
    return int(any(case["wrong"] for case in done.values()))
