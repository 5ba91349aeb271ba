"""Runs this folder's tests in one process of their own, where Triton interprets kernels on the CPU.

Triton decides when it is imported whether it interprets or compiles, and the other tests' process must stay free of
that. Each test reports by its own name, as it ends. With TRITON_INTERPRET=1 set they run where they are (a debugger).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A file in the interpreting process: reports are written there, one a line.
REPORTS = "SEQTRAIN_TEST_REPORTS"

if INTERPRETED:
    from seqtrain.analysis.triton_interpreter import install

    install()


class Child:
    """The interpreting process, and its reports as they come."""

    def __init__(self, session: pytest.Session, items: list[str], folder: Path):
        (folder / "tests").write_text("\n".join(items))
        self.log, self.reports = folder / "log", folder / "reports"
        self.reports.touch()
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORTS: str(self.reports)}
        command = [sys.executable, "-m", "pytest", f"@{folder / 'tests'}", "-p", "no:cacheprovider"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=session.config.rootpath, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.lines = self.read()
        self.early: dict[str, list[pytest.TestReport]] = {}

    def read(self) -> Iterator[dict]:
        """Reports until the process has ended."""
        with self.reports.open() as reports:
            rest = ""
            while True:
                ended = self.process.poll() is not None
                rest += reports.read()
                *lines, rest = rest.split("\n")
                yield from map(json.loads, lines)
                if ended:
                    return
                try:
                    self.process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Setup, call and teardown of a test; those of tests that come before theirs was asked for are kept."""
        found = self.early.pop(item.nodeid, [])
        while not found or found[-1].when != "teardown":
            line = next(self.lines, None)
            if line is None:
                ended = f"the interpreting process ended ({self.process.wait()})"
                text = f"{ended}:\n{self.log.read_text()[-4000:]}"
                return [*found, pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=line)
            (found if report.nodeid == item.nodeid else self.early.setdefault(report.nodeid, [])).append(report)
        return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    # pytest asks this hook about the tests of every folder.
    if INTERPRETED or HERE not in item.path.parents:
        return None
    session = item.session
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in session.stash[CHILD].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORTS in os.environ:
        with Path(os.environ[REPORTS]).open("a") as reports:
            reports.write(
                json.dumps(CONFIG[0].hook.pytest_report_to_serializable(config=CONFIG[0], report=report)) + "\n"
            )


def pytest_collection_finish(session: pytest.Session) -> None:
    CONFIG.append(session.config)
    items = [item.nodeid for item in session.items if HERE in item.path.parents]
    # From the start, beside the tests that come before them: a core more is busy.
    if items and not INTERPRETED and not session.config.option.collectonly:
        session.stash[CHILD] = Child(session, items, session.config._tmp_path_factory.mktemp("interpreted"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if CHILD in session.stash and session.stash[CHILD].process.poll() is None:
        session.stash[CHILD].process.terminate()


CHILD = pytest.StashKey[Child]()
CONFIG: list[pytest.Config] = []
