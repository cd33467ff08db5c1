"""Runs the levels of test, or the checks before a commit, one after the other and live, and ends with one table.

``python -m tests.levels test|check|LEVEL``: exit 1 if anything failed. A level that this machine cannot run is "not run", with
the reason and the remedy; a level that finds no test has failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e.cluster import binaries, cluster, images

from workerpool_operator.local.redis_server import RedisServerError, find_redis_server

ROOT = Path(__file__).parents[1]


class CannotRun(Exception):
    """This machine lacks what a level needs; the message says what, and how to get it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; neither passed nor failed means not run."""

    name: str
    passed: int
    failed: int
    seconds: float
    note: str = ""

    @property
    def result(self) -> str:
        total = self.passed + self.failed
        if self.failed:
            return f"failed {self.failed} of {total}"
        return f"passed {self.passed}" if self.passed else "not run"


def need_nothing() -> None:
    """Python is enough."""


def need_redis() -> None:
    try:
        find_redis_server()
    except RedisServerError as error:
        raise CannotRun(str(error)) from error


def need_control_plane() -> None:
    """Build it if need be; a build that fails where there is a Go is a failure, not a lack."""
    need_redis()
    with suppress(binaries.BinariesMissing):
        binaries.find(binaries.CONTROL_PLANE)
        return
    try:
        binaries.find_go()
    except binaries.BinariesMissing as error:
        raise CannotRun(str(error)) from error
    binaries.ensure(lambda line: print(line, flush=True), binaries.CONTROL_PLANE)


def need_cluster() -> None:
    """Build its programs and the images if need be; with a cluster that is named to us there is nothing to build."""
    if os.environ.get("E2E_KUBECONFIG"):
        return
    try:
        cluster.need()
    except cluster.CannotRun as error:
        raise CannotRun(str(error)) from error
    need_control_plane()
    images.ensure(lambda line: print(line, flush=True))


@dataclass(frozen=True, slots=True)
class Level:
    """The tests with one marker, in the folder of the same name."""

    name: str
    need: Callable[[], None]
    options: tuple[str, ...] = ()

    def run(self) -> Row:
        """Run it, its progress on this process's own output."""
        started = time.monotonic()
        try:
            self.need()
        except CannotRun as error:
            return Row(self.name, 0, 0, 0.0, str(error))
        except (binaries.BinariesMissing, images.ImageFailed) as error:
            return Row(self.name, 0, 1, time.monotonic() - started, str(error))
        passed, failed, note = self._pytest()
        return Row(self.name, passed, failed, time.monotonic() - started, note)

    def _pytest(self) -> tuple[int, int, str]:
        selection = ["-m", self.name, f"tests/{self.name}", *self.options]
        say(self.name, ["pytest", *selection])
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "junit.xml"
            status = call([sys.executable, "-m", "pytest", "--quiet", f"--junit-xml={report}", *selection])
            return judge(status, *count(report))


def count(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped, from a JUnit report; zeros where pytest wrote none."""
    if not report.exists():
        return 0, 0, 0
    suites = [suite.attrib for suite in ET.parse(report).iter("testsuite")]
    failed = sum(int(suite["failures"]) + int(suite["errors"]) for suite in suites)
    skipped = sum(int(suite["skipped"]) for suite in suites)
    return sum(int(suite["tests"]) for suite in suites) - failed - skipped, failed, skipped


def judge(status: int, passed: int, failed: int, skipped: int) -> tuple[int, int, str]:
    """Passed and failed as the table shows them, and a note: a level passes only by tests that ran."""
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        return 0, 1, "no test was collected"
    if status and not failed:
        return passed, 1, f"pytest ended with exit code {status}"
    if not passed and not failed:
        return 0, 1, "every test was skipped"
    return passed, failed, f"{skipped} skipped" if skipped else ""


FILES_SIDE_BY_SIDE = ("--numprocesses=4", "--dist=loadfile", "--no-loadscope-reorder")
"""For what mostly waits for others. Each process has servers of its own, so no test meets another's."""

UNIT = Level("unit", need_nothing, ("--numprocesses=2",))
LEVELS = (
    UNIT,
    Level("contract", need_redis, FILES_SIDE_BY_SIDE),
    Level("chaos", need_redis, ("--capture=no",)),
    Level("api", need_control_plane, FILES_SIDE_BY_SIDE),
    Level("e2e", need_cluster, ("--verbose",)),
    Level("demo", need_redis, ("--capture=no",)),
    Level("simulation", need_nothing),
)

CHECKS: Mapping[str, Sequence[str]] = {
    "format": ("ruff", "format", "--check"),
    "lint": ("ruff", "check"),
    "types": ("mypy",),
    "imports": ("lint-imports", "--no-logo"),
    "generated": ("python", "charts/render.py", "--check"),
    "reference": ("python", "-m", "docs.render", "--check"),
}


def check(name: str) -> Row:
    """Run one of the checks."""
    started = time.monotonic()
    say(name, CHECKS[name])
    tool, *arguments = CHECKS[name]
    failed = int(call([str(Path(sys.executable).with_name(tool)), *arguments]) != 0)
    return Row(name, 1 - failed, failed, time.monotonic() - started)


def say(name: str, command: Sequence[str]) -> None:
    print(f"\n== {name}: {' '.join(command)}", flush=True)


def call(command: Sequence[str]) -> int:
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the same signal, and may have servers to stop
            raise


def table(rows: Iterable[Row]) -> str:
    """Name, result, seconds and a note, in columns."""
    lines = [("", "result", "seconds", "")]
    lines += [(row.name, row.result, f"{row.seconds:.1f}", row.note) for row in rows]
    names, results = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {result:<{results}}  {took:>7}  {note}".rstrip() for name, result, took, note in lines)


def main(what: str) -> int:
    """Run everything of one kind, or one level, failures or not, and show the table."""
    if what == "check":
        rows = [*(check(name) for name in CHECKS), UNIT.run()]
    else:
        rows = [level.run() for level in LEVELS if what in ("test", level.name)]
    failed = sum(row.failed for row in rows)
    print(f"\n{table(rows)}\n\n{sum(row.passed for row in rows)} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
