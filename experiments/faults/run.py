"""Kills, full disks and zombies at random moments of small runs, and what became of each.

    python tools/run_faults.py minutes=60                       # as many cases as an hour holds; the same again goes on
    python tools/run_faults.py kinds=[disk,zombie] cases=20
    python tools/run_faults.py kinds=[gcs_server] seed=1

Each case starts a run of two ranks (one, for disks and zombies), lets the fault happen, starts the run again where it
ended, and compares it with an undisturbed one: the same losses bit for bit, each step once, at most one interval of
checkpoints done again, no process and no partial file left, and nothing but one line of error. A case is a function of
`seed` and its number; `output_dir/cases.jsonl` gets a line for each as it ends. The exit status is 1 if a case failed.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import Field

from seqtrain import report
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.runtime.checkpoint import listed
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.validation import FilePath

STEPS, EVERY = 60, 5
# What is killed, by a part of its name: the program itself, a rank, Ray's processes, or all of them at once.
KILLED = ("driver", "RayTrainWorker", "tree", "raylet", "gcs_server", "fork_server")
# What a rank is sent that is not killed: stopped it is named and replaced, told of its end it makes way.
SENT = {"freeze": "SIGSTOP", "notice": "SIGTERM"}
KINDS = (*KILLED, *SENT, "disk", "zombie")
# Seconds after which a run that still goes is taken for hung.
HUNG = 600
SMALL = (
    "data=selective_copy", "model.width=32", "model.heads=2", "model.depth=2", "model.layers=[gated_delta_net]",
    f"train.steps={STEPS}", "train.sequence_length=256", "train.batch_size=4", f"checkpoint.every={EVERY}",
    "evaluation.every=20", "data.held_out_rows=8", "sample.tokens=0", "runtime.device=cpu", "runtime.lease_seconds=4",
)  # fmt: skip
ALONE = ("runtime=inline", "parallel.data=1")
TOGETHER = ("runtime=ray", "parallel.data=2")


@dataclass(frozen=True)
class Settings:
    # Folder of the runs and of the table.
    output_dir: FilePath = "outputs/faults"
    # Cases in all, over all kinds in turn.
    cases: Annotated[int, Field(gt=0)] = 80
    # No case begins after so many minutes; 0: no limit.
    minutes: Annotated[float, Field(ge=0)] = 0.0
    # Kinds of faults.
    kinds: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: list(KINDS))
    seed: Annotated[int, Field(ge=0)] = 0


COLUMNS = ("fault", "tried", "survived", "steps lost", "recovered, median", "at most", "processes left")


class Run:
    """A training run in a process of its own, and everything it starts."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder, self.log = RunFolder(folder), folder.with_suffix(".txt")
        with self.log.open("ab") as said:
            self.process = psutil.Popen(
                [sys.executable, "-m", "seqtrain.cli", "pretrain", *SMALL, *overrides, f"output_dir={folder}"],
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        self.seen: set[psutil.Process] = {self.process}

    def look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.seen.update(self.process.children(recursive=True))

    def until(self, moment: Callable[[], bool]) -> bool:
        """Waits for `moment`; False where the run ended before, or hangs."""
        end = time.monotonic() + HUNG
        while self.process.poll() is None and time.monotonic() < end:
            self.look()
            if moment():
                return True
            time.sleep(0.02)
        return False

    def step(self) -> int:
        return max((record["step"] for record in read_lines(self.folder.metrics)), default=0)

    def end(self) -> int | None:
        """The exit status; None for a run that had to be ended."""
        ended = not self.until(lambda: False) and self.process.poll() is not None
        status = self.process.returncode if ended else None
        for process in self.seen if not ended else ():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return status

    def left(self) -> list[str]:
        """Names of what still runs a minute after the end: what is told to stop may save before."""
        _, alive = psutil.wait_procs(self.seen, timeout=60)
        return sorted(process.name() for process in alive if process.is_running())


def pick_moment(chance: random.Random) -> tuple[str, Callable[[Run], Callable[[], bool]]]:
    """When a fault happens: while the run starts, at a step, in a checkpoint, in an evaluation."""
    seconds, step = chance.uniform(1, 15), chance.randint(1, STEPS - 1)

    def saving(run: Run) -> bool:
        return run.step() >= step - EVERY and any(run.folder.checkpoints.glob("*/rank-*.json"))

    began = time.monotonic()
    return chance.choice(
        [
            (f"after {seconds:.0f} s", lambda run: lambda: time.monotonic() - began > seconds),
            (f"at step {step}", lambda run: lambda: run.step() >= step),
            (f"in a checkpoint after step {step - EVERY}", lambda run: lambda: saving(run)),
            ("in the evaluation of step 20", lambda run: lambda: run.step() >= 19),
        ]
    )


def kill(kind: str, folder: Path, chance: random.Random) -> dict[str, Any]:
    when, moment = pick_moment(chance)
    run = Run(folder, *TOGETHER)
    due = moment(run)

    def hit() -> list[psutil.Process]:
        """What is to be killed, where it has started."""
        if kind == "driver":
            # What the signal of a user, or the system for want of memory, would hit.
            return [run.process]
        name = "RayTrainWorker" if kind in SENT else kind
        return [process for process in run.seen if kind == "tree" or name in _words(process)]

    reached = run.until(lambda: due() and bool(hit()))
    step, victims = run.step(), hit()
    chance.shuffle(victims)
    struck, starts = time.monotonic(), len(read_lines(run.folder.starts))
    for process in victims if kind == "tree" else victims[:1]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.Signals[SENT.get(kind, "SIGKILL")])
    # Where the ranks are started again by themselves.
    back = run.until(lambda: len(read_lines(run.folder.starts)) > starts)
    recovered = round(time.monotonic() - struck, 1) if back and starts else None
    statuses, left = [run.end()], run.left()
    while statuses[-1] != 0 and len(statuses) < 3:
        run = Run(folder, *TOGETHER)
        statuses.append(run.end())
        left += run.left()
    return {"when": when, "reached": reached, "step": step, "statuses": statuses, "left": left, "recovered": recovered}


def fill_disk(folder: Path, chance: random.Random) -> dict[str, Any]:
    """On a file system of its own that is too small, then is not."""
    kib = chance.randint(150, 900)
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "faults", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        return {"skipped": "mounting a file system needs more rights"}
    try:
        run = Run(folder, *ALONE)
        statuses, said = [run.end()], run.log.read_text()
        named = "No space left on device" in said.splitlines()[-1] and str(folder) in said.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        statuses.append(Run(folder, *ALONE).end())
        shutil.copytree(folder, folder.with_name(f"{folder.name}-copy"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    shutil.rmtree(folder)
    folder.with_name(f"{folder.name}-copy").rename(folder)
    return {"when": f"{kib} KiB", "reached": statuses[0] != 0, "named": named or statuses[0] == 0, "statuses": statuses}


def wake_zombie(folder: Path, chance: random.Random) -> dict[str, Any]:
    when, moment = pick_moment(chance)
    first = Run(folder, *ALONE)
    due = moment(first)
    # Before it holds the folder, it is not one that was replaced.
    reached = first.until(lambda: due() and any(first.folder.epochs.glob("*/alive")))
    step = first.step()
    with suppress(psutil.NoSuchProcess):
        first.process.suspend()
    statuses = [Run(folder, *ALONE).end()]
    before = _content(folder)
    with suppress(psutil.NoSuchProcess):
        first.process.resume()
    zombie, changed = first.end(), sorted(set(_content(folder).items()) ^ set(before.items()))
    return {
        "when": when, "reached": reached, "step": step, "zombie": zombie, "changed": changed[:3], "statuses": statuses
    }  # fmt: skip


def _content(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file; but for the log, in which a zombie may say that it was replaced."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.log"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _words(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        # Not all of it: a folder is called after its case.
        return " ".join([process.name(), *process.cmdline()[:3]])
    return ""


def judge(case: dict[str, Any], folder: Path, whole: Path) -> list[str]:
    """What is wrong with how a case came out."""
    if "skipped" in case:
        return []
    run, wrong = RunFolder(folder), []
    steps = [(record["step"], record["loss"]) for record in read_lines(run.metrics)]
    if steps != [(record["step"], record["loss"]) for record in read_lines(RunFolder(whole).metrics)]:
        wrong.append("losses differ")
    if case["statuses"][-1] != 0:
        wrong.append("did not finish")
    if None in case["statuses"]:
        wrong.append("hung")
    if case.get("zombie", 2) != 2 or case.get("changed"):
        wrong.append("the zombie went on")
    if not case.get("named", True):
        wrong.append("the full disk is not named")
    starts = [start["step"] for start in read_lines(run.starts)]
    case["lost"] = max(0, case.get("step", 0) - starts[1]) if len(starts) > 1 else 0
    if case["lost"] > EVERY:
        wrong.append(f"went on from step {starts[1]}")
    if case.get("left"):
        wrong.append("processes are left")
    if partial := [path.name for path in run.path.rglob("*.partial")]:
        wrong.append(f"{partial[0]} is left")
    if "Traceback" in folder.with_suffix(".txt").read_text():
        wrong.append("a traceback")
    if not listed(run.checkpoints):
        wrong.append("no checkpoint")
    return wrong


def table(cases: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """By kind: tried, survived, most steps lost, seconds until ranks were there again, processes left."""
    kinds = defaultdict(list)
    for case in cases:
        kinds[case["kind"]].append(case)
    rows: list[tuple[str, ...]] = []
    for kind, of in kinds.items():
        seconds = sorted(case["recovered"] for case in of if case.get("recovered"))
        rows.append(
            (
                kind,
                str(len(of)),
                str(sum(not case["wrong"] for case in of)),
                str(max((case.get("lost", 0) for case in of), default=0)),
                f"{seconds[len(seconds) // 2]:.0f} s" if seconds else "-",
                f"{seconds[-1]:.0f} s" if seconds else "-",
                str(sum(len(case.get("left", ())) for case in of)),
            )
        )
    return rows


COLUMNS = ("fault", "tried", "survived", "steps lost", "recovered, median", "at most", "processes left")


def main(arguments: Sequence[str]) -> int:
    """Makes the cases that the table has not; prints each. The exit status."""
    settings = read_settings(Settings, arguments)
    for kind in settings.kinds:
        if kind not in KINDS:
            raise ConfigError(unknown_name("kinds", kind, KINDS))
    root = Path(settings.output_dir).absolute()
    root.mkdir(parents=True, exist_ok=True)
    lines, began, failed = root / "cases.jsonl", time.monotonic(), 0
    done = {line["name"]: line for line in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    for number in range(settings.cases):
        kind = settings.kinds[number % len(settings.kinds)]
        name = f"{kind}-{settings.seed}-{number:03d}"
        if name not in done:
            if settings.minutes and time.monotonic() - began > 60 * settings.minutes:
                break
            done[name] = make(kind, root / name, random.Random(name), root)
            with lines.open("a") as file:
                file.write(json.dumps({"name": name} | done[name]) + "\n")
        failed += bool(done[name]["wrong"])
        print(
            name, "WRONG: " + "; ".join(done[name]["wrong"]) if done[name]["wrong"] else "right", done[name], flush=True
        )
    report.show_table(COLUMNS, table([{"kind": name.split("-")[0]} | case for name, case in done.items()]))
    print(f"{failed} of {len(done)} cases are wrong: {lines}")
    return int(failed > 0)


def make(kind: str, folder: Path, chance: random.Random, root: Path) -> dict[str, Any]:
    """One case, and what is wrong with it; its folder stays where something is."""
    layout = ALONE if kind in ("disk", "zombie") else TOGETHER
    whole = root / f"undisturbed-{len(layout[0])}"
    if not RunFolder(whole).summary.exists() and Run(whole, *layout).end() != 0:
        raise ConfigError(f"output_dir={root}: the undisturbed run failed, see {whole.with_suffix('.txt')}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".txt").unlink(missing_ok=True)
    began = time.monotonic()
    made = {"disk": fill_disk, "zombie": wake_zombie}.get(kind)
    case = made(folder, chance) if made else kill(kind, folder, chance)
    wrong = judge(case, folder, whole)
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return case | {"seconds": round(time.monotonic() - began), "wrong": wrong}
