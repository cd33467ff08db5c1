"""The whole system on one machine: ``python -m examples.media.demo``, with ``--help`` for its options.

A private Redis, the dev mode with the sample pool, the sample API, and a burst of real uploads over HTTP, in the middle of
which one busy GPU worker is killed. Exit 0 only if every job took effect exactly once; 1 says what went wrong; 2 is a bad
argument.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2 as httpx
import uvicorn
from examples.media import audio, image, samples
from examples.media.kinds import MAX_BYTES, Kind, kind_of
from examples.media.summary import Outcome, problems, same, sparkline, summarise
from rich.console import Console, RenderableType
from rich.table import Table
from soundfile import LibsndfileError

from workerpool_operator import manifest
from workerpool_operator.dev import CannotStart, session
from workerpool_operator.live import LiveView
from workerpool_operator.local import LocalWorkers
from workerpool_operator.local.redis_server import RedisServerError
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_operator.status import TierStatus
from workerpool_routing import Job, State, WorkerPool

RESOURCE = Path(__file__).with_name("workerpool.yaml")
BURST_SECONDS = 48.0
"""From the start until every job has ended and the GPU tier is back at zero."""

STOP_SECONDS = 6.0
"""What the workers then get to end."""

TIERS = ("gpu", "cpu")
UPLOADS_AT_ONCE = 2
SAMPLE_FILES = 9
PLAIN_EVERY = 6
"""Every so many uploads, one does not ask for a GPU."""

LOOK_EVERY_SECONDS = 0.05
SPARK_WIDTH = 22
MEASURES: Mapping[Kind, Callable[..., Mapping[str, Any]]] = {"image": image.measure, "audio": audio.measure}


class BadFiles(Exception):
    """The folder of files cannot be used; the message says why."""


@dataclass(slots=True)
class Recorder:
    """A reporter that shows each pass and remembers what the summary needs."""

    view: LiveView
    passes: list[tuple[float, dict[str, TierStatus]]] = field(default_factory=list)
    busiest: int = -1
    picture: RenderableType = ""
    _passed: asyncio.Event = field(default_factory=asyncio.Event)

    async def report(self, report: Report) -> None:
        """Take one pass in."""
        await self.view.report(report)
        if isinstance(report.reading, Unavailable):
            return
        self.passes.append((time.monotonic(), {tier.name: tier for tier in report.status.tiers}))
        work = (report.status.waiting or 0) + (report.status.in_flight or 0) + sum(t.ready for t in report.status.tiers)
        if work > self.busiest:
            self.busiest, self.picture = work, self.view.view()
        self._passed.set()

    async def until(self, holds: Callable[[Mapping[str, TierStatus]], bool]) -> None:
        """Wait for a pass of which this holds."""
        while not self.passes or not holds(self.passes[-1][1]):
            self._passed.clear()
            await self._passed.wait()

    @property
    def peak(self) -> dict[str, int]:
        """The most ready replicas of each tier."""
        return {tier: max((ready for _, ready in self.ready(tier)), default=0) for tier in TIERS}

    @property
    def final(self) -> dict[str, int]:
        """The last ready replicas of each tier."""
        return {tier: ready for tier in TIERS for _, ready in self.ready(tier)[-1:]}

    def ready(self, tier: str) -> list[tuple[float, int]]:
        """Ready replicas over time."""
        return [(at, tiers[tier].ready) for at, tiers in self.passes]

    def waiting(self, tier: str) -> list[tuple[float, int]]:
        """Waiting jobs over time."""
        return [(at, tiers[tier].waiting or 0) for at, tiers in self.passes]


@dataclass(slots=True)
class Upload:
    """One file on its way: what was answered, then the last thing known of its task."""

    path: Path
    asked: bool
    accepted: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return bool(self.task) and State(self.task["state"]).ended

    def outcome(self, expected: Mapping[Path, Mapping[str, Any]]) -> Outcome:
        """What the summary counts."""
        return Outcome(
            asked=self.asked,
            first_tier=self.accepted["tier"],
            decision_ms=self.accepted["decision_ms"],
            state=self.task.get("state", "unknown"),
            tier=self.task.get("tier", "unknown"),
            starts=self.task.get("starts", {}),
            correct=same(self.task.get("result"), {**expected[self.path], "metadata": {"name": self.path.name}}),
        )


def usable(directory: Path) -> dict[Path, Kind]:
    """The pictures and recordings of a folder; raises :class:`BadFiles` when it has none."""
    if not directory.is_dir():
        raise BadFiles(f"{directory} is not a directory")
    try:
        files = [path for path in sorted(directory.iterdir()) if path.is_file()]
        kinds = {path: kind for path in files if path.stat().st_size <= MAX_BYTES and (kind := _kind(path))}
    except PermissionError as error:
        raise BadFiles(f"{error.filename}: {error.strerror}") from error
    if not kinds:
        limit = MAX_BYTES // 1024 // 1024
        raise BadFiles(f"{directory} holds no picture or recording of at most {limit} MiB ({len(files)} other files)")
    return kinds


def measured(directory: Path, most: int) -> dict[Path, Mapping[str, Any]]:
    """What the jobs will have to find in the first files of a folder; raises :class:`BadFiles` for one that is damaged."""
    expected = {}
    for path, kind in islice(usable(directory).items(), most):
        try:
            expected[path] = MEASURES[kind](path, accelerated=True)
        except (OSError, LibsndfileError) as error:
            raise BadFiles(f"{path} cannot be decoded: {error}") from error
    return expected


def _kind(path: Path) -> Kind | None:
    with path.open("rb") as file:
        return kind_of(file)


@contextmanager
def serving(api: Any) -> Iterator[str]:
    """The API on a free port of this machine, in a thread of its own, as far from the pass as another process would be."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning", timeout_graceful_shutdown=2))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def send_all(client: httpx.AsyncClient, uploads: Sequence[Upload]) -> None:
    """Upload everything, a few at a time."""
    turns = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def send(upload: Upload) -> None:
        async with turns:
            data = {"gpu": "true" if upload.asked else "false", "metadata": json.dumps({"name": upload.path.name})}
            content = await asyncio.to_thread(upload.path.read_bytes)
            answer = await client.post("/process/file", files={"file": (upload.path.name, content)}, data=data)
            upload.accepted = answer.raise_for_status().json()

    async with asyncio.TaskGroup() as group:
        for upload in uploads:
            group.create_task(send(upload))


async def follow(client: httpx.AsyncClient, uploads: Sequence[Upload]) -> None:
    """Ask after each task until it has ended."""
    while open_uploads := [upload for upload in uploads if not upload.ended]:
        for upload in open_uploads:
            answer = await client.get(f"/tasks/{upload.accepted['task_id']}")
            upload.task = answer.raise_for_status().json()
        await asyncio.sleep(0.5)


async def kill_a_busy_gpu_worker(pool: WorkerPool, workers: LocalWorkers, uploads: Sequence[Upload], console: Console) -> None:
    """SIGKILL one GPU worker, children and all, in the middle of a job."""
    while True:
        present = {owner: worker for owner, worker in pool.workers().items() if worker.tier == "gpu"}
        for upload in uploads if present else ():
            job = pool.job(upload.accepted["task_id"]) if upload.accepted else None
            if job and job.owner in present and kill_at_work(pool, job, workers.process_group(present[job.owner].worker)):
                words = f"killed {present[job.owner].worker} in the middle of {upload.path.name}"
                console.print(f"{time.strftime('%H:%M:%S')}  {words}", highlight=False)
                return
        await asyncio.sleep(LOOK_EVERY_SECONDS)


def kill_at_work(pool: WorkerPool, job: Job, group: int | None) -> bool:
    """Kill the worker that has claimed this job; whether it did.

    It is frozen first, and killed only if the ledger says that it still has the job: a job that ends in between is no loss.
    """
    if job.state is not State.CLAIMED or group is None:
        return False
    os.killpg(group, signal.SIGSTOP)
    frozen = pool.job(job.task_id)
    at_work = frozen is not None and (frozen.state, frozen.owner) == (job.state, job.owner)
    os.killpg(group, signal.SIGKILL if at_work else signal.SIGCONT)
    return at_work


async def burst(recorder: Recorder, console: Console, workers: LocalWorkers, uploads: Sequence[Upload]) -> None:
    """Serve, upload, kill, and wait for the end."""
    service = await asyncio.to_thread(importlib.import_module, "examples.media.api")
    await recorder.until(lambda tiers: bool(tiers))
    with serving(service.api) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client, asyncio.TaskGroup() as group:
            killing = group.create_task(kill_a_busy_gpu_worker(service.pool, workers, uploads, console))
            await send_all(client, uploads)
            await follow(client, uploads)
            killing.cancel()
    await recorder.until(lambda tiers: tiers["gpu"].desired == 0 and tiers["gpu"].ready == 0)


async def run(recorder: Recorder, console: Console, directory: Path, uploads: Sequence[Upload]) -> bool:
    """The run from Redis to the end of the last worker; whether it came to its end in time."""
    in_time = False
    pool = manifest.parse(RESOURCE.read_text())
    assert isinstance(pool, Pool), pool
    # The outer limit cancels the stop of workers that do not end.
    with suppress(TimeoutError):
        async with asyncio.timeout(BURST_SECONDS + STOP_SECONDS):
            async with session(pool, directory=directory / "logs", reporter=recorder, broker_url=None) as dev:
                os.environ |= {"CELERY_BROKER_URL": dev.broker_url, "MEDIA_DIR": str(directory / "media")}
                async with asyncio.timeout(BURST_SECONDS):
                    await burst(recorder, console, dev.workers, uploads)
                    in_time = True
    return in_time


def demo(options: argparse.Namespace, console: Console, directory: Path) -> list[str]:
    """Run, show the summary, write what was asked for; return what went wrong."""
    started = time.monotonic()
    expected = measured(options.files or samples.write(directory / "samples", SAMPLE_FILES), options.jobs)
    chosen = islice(cycle(expected), options.jobs)
    uploads = [Upload(path, asked=n % PLAIN_EVERY != 0) for n, path in enumerate(chosen, start=1)]
    with LiveView(console) as view:
        recorder = Recorder(view)
        in_time = asyncio.run(run(recorder, console, directory, uploads))
    seconds = time.monotonic() - started
    outcomes = [upload.outcome(expected) for upload in uploads if upload.accepted]
    summary = summarise(outcomes, recorder.peak, recorder.final, seconds)
    show(console, summary, recorder)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
    if options.picture:
        save_picture(recorder.picture, options.picture)
    late = [] if in_time else [f"not at its end after {BURST_SECONDS:.0f} s"]
    return late + problems(summary)


def show(console: Console, summary: Mapping[str, Any], recorder: Recorder) -> None:
    """The run in one table, with its course in small pictures."""
    table = Table(title="what came of it", title_justify="left")
    for heading in ("tier", "jobs", "peak", "final", "replicas over time", "waiting over time"):
        table.add_column(heading, no_wrap=True)
    for name, tier in summary["tiers"].items():
        counts = [str(tier[key]) for key in ("jobs", "peak_replicas", "final_replicas")]
        table.add_row(name, *counts, sparkline(recorder.ready(name), SPARK_WIDTH), sparkline(recorder.waiting(name), SPARK_WIDTH))
    console.print(table)
    jobs = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary["jobs"].items())
    console.print(f"jobs: {jobs}", highlight=False)
    console.print(
        f"{summary['spilled']} spilled to CPU, {summary['fell_back']} fell back to CPU; "
        f"a decision took {summary['decision_ms_p50']} ms (median); {summary['seconds']} s",
        highlight=False,
    )


def save_picture(picture: RenderableType, path: Path) -> None:
    """The live view at the busiest moment, as SVG."""
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(picture)
    console.save_svg(str(path), title="make demo")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends with exit code 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m examples.media.demo", description="The whole system on one machine.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened")
    parser.add_argument("--files", type=Path, metavar="DIR", help="pictures and recordings of your own")
    parser.add_argument("--jobs", type=int, default=32, metavar="N", help="how many uploads (default %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="save the live view at its busiest, as SVG")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"argument --jobs: {options.jobs} is not a number of uploads")
    for path in filter(None, (options.json, options.picture)):
        if not path.absolute().parent.is_dir():
            parser.error(f"{path}: no such directory: {path.absolute().parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    options = parse(arguments)
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    directory = Path(tempfile.mkdtemp(prefix="workerpool-demo-"))
    found: list[str] = []
    try:
        found = demo(options, console, directory)
    except BadFiles as error:
        print(f"--files: {error}", file=sys.stderr)
        return 2
    except (CannotStart, RedisServerError) as error:
        found = [str(error)]
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    finally:
        if not found:
            shutil.rmtree(directory)
    for problem in found:
        console.print(f"FAILED: {problem}", style="bold red", highlight=False)
    if found:
        console.print(f"The workers' logs are in {directory / 'logs'}", highlight=False)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
