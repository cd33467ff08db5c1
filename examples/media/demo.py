"""The whole system on one machine: ``python -m examples.media.demo``, with ``--help`` for its options.

A private Redis, dev mode with the sample pool, the sample API, and a burst of real uploads over HTTP. While they are processed a
GPU worker drains, then all GPU workers are killed (one of them in the middle of a job), and later come back. The exit code is 0
only if every job took effect exactly once; 1 if something went wrong, which it says; 2 for a bad argument.
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
from itertools import cycle, islice
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2 as httpx
import uvicorn
from examples.media import audio, image, samples
from examples.media.kinds import MAX_BYTES, Kind, kind_of
from examples.media.record import Recorder, Upload
from examples.media.scenes import Scenes
from examples.media.summary import problems, sparkline, summarise
from rich.console import Console, RenderableType
from rich.table import Table
from soundfile import LibsndfileError

from workerpool_operator import manifest
from workerpool_operator.dev import CannotStart, Session, session
from workerpool_operator.live import LiveView
from workerpool_operator.local.redis_server import RedisServerError
from workerpool_operator.ports import Pool

RESOURCE = Path(__file__).with_name("workerpool.yaml")
LONGEST_SECONDS = 240.0
"""From the start until every job has ended and the GPU tier is back at zero; some five times what it takes on two idle cores."""

STOP_SECONDS = 6.0
"""How long the workers then have to end."""

UPLOADS_AT_ONCE = 2
SAMPLE_FILES = 9
PLAIN_EVERY = 6
"""Every so many uploads, one does not ask for a GPU."""

PATIENCE_SECONDS = 5.0
"""How long the API waits for Redis: every upload has to be accepted, on a slow machine too."""

INTRODUCTION = """\
A private Redis, the sample API and the sample pool, all on this machine;
numpy stands in for the GPUs. {jobs} pictures and recordings are uploaded, then
one more every second, while three things happen:

  1 drain     the GPU tier is limited to one worker: any other one finishes its
              job and leaves
  2 outage    every GPU worker is killed, one of them in the middle of a job
  3 way back  GPU workers may start again

In the view ● is a ready worker, ○ a starting one and ▇ a waiting job;
"→ cpu 9 QueueTooLong" means that 9 jobs were sent to cpu for that reason.
At the end every job is counted.
"""
ONE_MORE_EVERY_SECONDS = 1.0
FOLLOW_EVERY_SECONDS = 0.5
SPARK_WIDTH = 22
MEASURES: Mapping[Kind, Callable[..., Mapping[str, Any]]] = {"image": image.measure, "audio": audio.measure}


class BadFiles(Exception):
    """The folder of files cannot be used; the message says why."""


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


async def send(client: httpx.AsyncClient, upload: Upload) -> None:
    """Upload one file."""
    data = {"gpu": "true" if upload.asked else "false", "metadata": json.dumps({"name": upload.path.name})}
    content = await asyncio.to_thread(upload.path.read_bytes)
    answer = await client.post("/process/file", files={"file": (upload.path.name, content)}, data=data)
    upload.accepted = answer.raise_for_status().json()


async def send_burst(client: httpx.AsyncClient, uploads: Sequence[Upload]) -> None:
    """Upload everything, a few at a time."""
    turns = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def send_one(upload: Upload) -> None:
        async with turns:
            await send(client, upload)

    async with asyncio.TaskGroup() as group:
        for upload in uploads:
            group.create_task(send_one(upload))


async def send_on(client: httpx.AsyncClient, uploads: list[Upload], more: Iterator[Upload], enough: asyncio.Event) -> None:
    """Upload one file every :data:`ONE_MORE_EVERY_SECONDS` until it is enough."""
    for upload in more:
        if enough.is_set():
            return
        uploads.append(upload)
        await send(client, upload)
        await asyncio.sleep(ONE_MORE_EVERY_SECONDS)


async def follow(client: httpx.AsyncClient, uploads: Sequence[Upload], enough: asyncio.Event) -> None:
    """Ask the API for the state of each task, until all have ended and no more come."""
    while not (enough.is_set() and all(upload.ended for upload in uploads)):
        for upload in [upload for upload in uploads if upload.accepted and not upload.ended]:
            answer = await client.get(f"/tasks/{upload.accepted['task_id']}")
            upload.task = answer.raise_for_status().json()
        await asyncio.sleep(FOLLOW_EVERY_SECONDS)


async def perform(dev: Session, recorder: Recorder, console: Console, uploads: list[Upload], more: Iterator[Upload]) -> None:
    """Serve, upload, play the scenes, and wait for the end of every job."""
    service = await asyncio.to_thread(importlib.import_module, "examples.media.api")
    service.pool.connection.timeout = PATIENCE_SECONDS
    await recorder.until(lambda tiers: bool(tiers))
    enough = asyncio.Event()
    with serving(service.api) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client, asyncio.TaskGroup() as group:
            group.create_task(follow(client, uploads, enough))
            await send_burst(client, uploads)
            group.create_task(send_on(client, uploads, more, enough))
            await Scenes(dev, service.pool, recorder, uploads, console).play()
            enough.set()
    await recorder.until(lambda tiers: tiers["gpu"].desired == 0 and tiers["gpu"].ready == 0)


async def run(recorder: Recorder, console: Console, directory: Path, uploads: list[Upload], more: Iterator[Upload]) -> bool:
    """The run, from the start of Redis to the end of the last worker; returns whether it finished in time."""
    in_time = False
    pool = manifest.parse(RESOURCE.read_text())
    assert isinstance(pool, Pool), pool
    # The outer limit is for workers that do not stop.
    with suppress(TimeoutError):
        async with asyncio.timeout(LONGEST_SECONDS + STOP_SECONDS):
            async with session(pool, directory=directory / "logs", reporter=recorder, broker_url=None) as dev:
                os.environ |= {"CELERY_BROKER_URL": dev.broker_url, "MEDIA_DIR": str(directory / "media")}
                async with asyncio.timeout(LONGEST_SECONDS):
                    await perform(dev, recorder, console, uploads, more)
                    in_time = True
    return in_time


def demo(options: argparse.Namespace, console: Console, directory: Path) -> list[str]:
    """Run, show the summary, write what was asked for; return what went wrong."""
    started = time.monotonic()
    expected = measured(options.files or samples.write(directory / "samples", SAMPLE_FILES), options.jobs)
    more = (Upload(path, asked=n % PLAIN_EVERY != 0) for n, path in enumerate(cycle(expected), start=1))
    uploads = list(islice(more, options.jobs))
    console.print(INTRODUCTION.format(jobs=options.jobs), markup=False, highlight=False)
    with LiveView(console) as view:
        recorder = Recorder(view)
        in_time = asyncio.run(run(recorder, console, directory, uploads, more))
    seconds = time.monotonic() - started
    outcomes = [upload.outcome(expected) for upload in uploads if upload.accepted]
    summary = summarise(outcomes, recorder.peak, recorder.final, recorder.course, seconds)
    show(console, summary, recorder)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
    if options.picture:
        save_picture(recorder.picture, options.picture)
    late = [] if in_time else [f"it did not finish within {LONGEST_SECONDS:.0f} s"]
    return late + problems(summary)


def show(console: Console, summary: Mapping[str, Any], recorder: Recorder) -> None:
    """The summary for people: each tier in a row with its course in small, then the counts in sentences."""
    table = Table(title="summary", title_justify="left")
    for heading in ("tier", "jobs", "peak", "final", "workers over time", "waiting over time"):
        table.add_column(heading, no_wrap=True)
    for name, tier in summary["tiers"].items():
        counts = [str(tier[key]) for key in ("jobs", "peak_replicas", "final_replicas")]
        table.add_row(name, *counts, sparkline(recorder.ready(name), SPARK_WIDTH), sparkline(recorder.waiting(name), SPARK_WIDTH))
    console.print(table)
    outage, jobs = summary["outage"], summary["jobs"]
    for name, words in {
        "jobs": ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in jobs.items()),
        "routing": f"jobs that asked for a GPU and were sent to a CPU: {summary['spilled']}; "
        f"deciding and queueing took {summary['decision_ms_p50']} ms (median)",
        "fallback": f"jobs that lost their GPU worker and ran once more on a CPU: {summary['fell_back']}",
        "drain": "workers that took nothing new before they left: "
        + ", ".join(f"{tier} {count}" for tier, count in summary["drained"].items()),
        "outage": f"{outage['seconds']} s without a GPU; waiting jobs that moved to a CPU: {outage['moved']}, "
        f"new jobs sent to one: {outage['spilled']}",
        "way back": f"the next job started on a GPU {outage['back_after']} s after the outage",
        "time": f"{summary['seconds']} s in all",
    }.items():
        console.print(f"{name:<9} {words}", markup=False, highlight=False, soft_wrap=True)


def save_picture(picture: RenderableType, path: Path) -> None:
    """The live view at the busiest moment, as SVG."""
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(picture)
    console.save_svg(str(path), title="make demo")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends with exit code 2 on a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.media.demo",
        description="Run Redis, the sample API and a pool of workers on this machine, upload files, drain and kill workers "
        "meanwhile, and check that every job took effect exactly once.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary as JSON")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="upload the pictures and recordings of this folder, not samples"
    )
    parser.add_argument("--jobs", type=int, default=24, metavar="N", help="how many uploads to begin with (default %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="save the live view at its busiest moment as SVG")
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
    else:
        console.print("Every job took effect exactly once.", style="bold green", highlight=False)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
