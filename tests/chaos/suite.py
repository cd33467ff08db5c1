"""Kill everything that can be killed, and count every job: one row for each fault.

``python -m tests.chaos.suite short|full|long`` prints the table, and its random seed; exit 1 if a promise was broken.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos import drains
from tests.chaos.parts import KEYS, Line, Server, Worker, end, guardian, job, publish, start_sweep, sweeping

from workerpool_routing.ledger import Run, State


@dataclass
class Row:
    """What became of the jobs of one fault. ``forgotten``: Redis itself came back without them."""

    fault: str
    times: int
    jobs: int
    lost: int
    doubled: int
    overstarted: int
    forgotten: int = 0
    recovery: Sequence[float] = ()
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether every job had its one outcome, and no more starts than promised, however slow the machine is."""
        return not (self.lost or self.doubled or self.overstarted)

    @property
    def late(self) -> bool:
        return bool(self.recovery) and quantile(self.recovery, 0.99) > TAKEN_OVER_SECONDS and not self.note

    def cells(self) -> list[str]:
        p50, p99 = (f"{quantile(self.recovery, q):.1f}" if self.recovery else "" for q in (0.5, 0.99))
        numbers = (self.times, self.jobs, self.lost, self.doubled, self.overstarted, self.forgotten or "")
        return [self.fault, *map(str, numbers), p50, p99, self.note]


TAKEN_OVER_SECONDS = 15
"""From a death to the next start, while an operator or a sweep runs."""

PATIENCE_SECONDS = 120
"""How long nothing may change before what is missing counts as lost: many workers start at once, on a machine of any speed."""

HEADINGS = ["fault", "times", "jobs", "lost", "doubled", "started too often", "forgotten by Redis", "recovery p50 s", "p99 s", ""]


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


@dataclass
class Scene:
    """A Redis, workers of both tiers, a sweep, and the jobs so far."""

    server: Server
    log: Path
    line: Line
    dice: Random
    plain: bool = False
    workers: list[Worker] = field(default_factory=list)
    leaving: list[Worker] = field(default_factory=list)
    sweeps: list[Any] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    losses: list[tuple[str, float]] = field(default_factory=list)
    """Which workers were killed or stopped, or had their children killed, and when, by Redis's clock, in seconds."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.line.port}/0"

    def start(self, tier: str, slots: int = 1) -> Worker:
        worker = Worker(self.url, tier, self.log, slots=slots, plain=self.plain)
        self.workers.append(worker)
        return worker

    def publish(self, count: int, seconds: float = 0.0, how: str = "") -> None:
        with self.server.client() as client:
            self.ids += publish(client, count, seconds, how, plain=self.plain)

    def of(self, tier: str) -> Worker:
        """A worker that is at work; if none is for a while, or it is plain Celery and does not say, one that is up."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < PATIENCE_SECONDS:
            up = [w for w in self.workers if w.tier == tier and w.process.poll() is None and w.children()]
            chosen = [w for w in up if w.name in self.busy(tier)] or (up if self.plain or waited > 10 else [])
            if chosen:
                return self.dice.choice(chosen)
            time.sleep(0.05)
        raise TimeoutError(f"no worker of tier {tier} has come up within {PATIENCE_SECONDS} s")

    def busy(self, tier: str) -> set[str]:
        with self.server.client() as client:
            reports = map(json.loads, client.hvals(KEYS.presence(tier)))
            return {report["worker"] for report in reports if report["busy"]}

    def note_loss(self, worker: Worker) -> None:
        with self.server.client() as client:
            seconds, micros = client.time()
        self.losses.append((worker.name, seconds + micros / 1e6))

    def replace(self, worker: Worker, slots: int = 1) -> None:
        self.note_loss(worker)
        worker.kill()
        self.workers.remove(worker)
        self.start(worker.tier, slots)

    def kill(self) -> None:
        for worker in self.workers + self.leaving:
            worker.kill()

    def counted(self) -> int:
        """How many jobs have counted their outcome."""
        with self.server.client() as client:
            return int(client.hlen("outcomes"))

    def open(self) -> set[str]:
        """The jobs without an outcome."""
        with self.server.client() as client:
            uncounted = [*set(self.ids) - set(client.hkeys("outcomes"))]
            # A child may die between storing its result and counting it.
            results = client.mget([f"celery-task-meta-{task_id}" for task_id in uncounted]) if uncounted else []
            return {task_id for task_id, result in zip(uncounted, results, strict=True) if not result}

    def drain(self, patience: float = PATIENCE_SECONDS) -> set[str]:
        """Wait until nothing changes any more for that long; the jobs that have no outcome."""
        changed, before = time.monotonic(), -1
        while True:
            counted = self.counted()
            if counted != before:
                changed, before = time.monotonic(), counted
            still = time.monotonic() - changed
            if counted >= len(self.ids) or still > 1:
                missing = self.open()
                if not missing or still > patience:
                    return missing
            time.sleep(0.5)

    def since_loss(self, lost: Run, again: int) -> float:
        """Seconds from the death of its worker to the next start; from its own start where it killed the worker itself."""
        began, end = lost.began / 1000, again / 1000
        return end - min(
            (at for name, at in self.losses if lost.owner.startswith(f"{name}.") and began <= at <= end), default=began
        )

    def judge(self, fault: str, times: int, lost: set[str], forgotten: int = 0) -> Row:
        with self.server.client() as client:
            outcomes = client.hgetall("outcomes")
            doubled = sum(int(n) > 1 for n in outcomes.values())
            overstarted, recovery = 0, []
            for task_id in [] if self.plain else self.ids:
                entry = job(client, task_id)
                runs = entry.runs if entry else ()
                given_back = sum(run.how in ("given back", "done") for run in runs[:-1])
                starts = entry.starts if entry else {}
                overstarted += starts.get("gpu", 0) > 1 + given_back or starts.get("cpu", 0) > 2 + given_back
                recovery += [self.since_loss(a, b.began) for a, b in pairwise(runs) if a.how == "lost"]
        return Row(fault, times, len(self.ids), len(lost), doubled, overstarted, forgotten, recovery)


def scene(stack: ExitStack, seed: str, *, plain: bool = False, keeps: bool = True, slots: int = 1) -> Scene:
    log = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    server = Server(keeps, log)
    server.start()
    stack.callback(server.kill)
    line = Line(server.port)
    stack.callback(line.close)
    made = Scene(server, log, line, Random(seed), plain)
    stack.callback(made.kill)
    for _ in range(2):
        made.start("gpu", slots)
    if not plain:
        made.start("cpu")
        made.sweeps = stack.enter_context(sweeping(server.url, log))
        until_present(made)
    return made


def until_present(stage: Scene) -> None:
    """Wait for every worker's first report: a slow start is no slow recovery."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with stage.server.client() as client:
        while sum(client.hlen(KEYS.presence(tier)) for tier in ("gpu", "cpu")) < len(stage.workers):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers have not started within {PATIENCE_SECONDS} s")
            time.sleep(0.2)


def flood(seed: str, jobs: int, kills: int, *, plain: bool) -> Row:
    """SIGKILL whole workers while they take thousands of short jobs."""
    with ExitStack() as stack:
        stage = scene(stack, seed, plain=plain, keeps=False, slots=2)
        stage.publish(jobs)
        until_started(stage)
        for _ in range(kills):
            time.sleep(stage.dice.uniform(0.5, 1.5))
            if len(stage.ids) - stage.counted() < 200:
                stage.publish(1_000)
            stage.replace(stage.of("gpu"), 2)
        lost = stage.drain(20 if plain else PATIENCE_SECONDS)  # plain Celery does lose some: there is nothing to wait for
        if plain:  # what Kombu would deliver again after its hour is not lost
            with stage.server.client() as client:
                held = client.hvals("unacked")
            lost = {task_id for task_id in lost if not any(task_id in raw for raw in held)}
        name = "worker SIGKILL under flood" + (", plain Celery" if plain else "")
        return stage.judge(name, kills, lost)


def scaled_down(times: int) -> Row:
    """Scale-downs under load, by the operator's own pass in dev mode: no job is cut off or given back."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        jobs = asyncio.run(drains.scale_down(Path(directory), times, POOLS))
    lost = sum(job.state is not State.DONE for job in jobs)
    again = sum(len(job.runs) > 1 for job in jobs)
    return Row("scale-down under load", times, len(jobs), lost, 0, again)


def until_started(stage: Scene) -> None:
    before, deadline = stage.counted(), time.monotonic() + PATIENCE_SECONDS
    while stage.counted() == before:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no job has ended within {PATIENCE_SECONDS} s")
        time.sleep(0.2)


Fault = Callable[[Scene], None]


def child_killed(stage: Scene) -> None:
    worker = stage.of("gpu")
    stage.note_loss(worker)
    for pid in worker.children():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def worker_killed(stage: Scene) -> None:
    stage.replace(stage.of("gpu"))


def worker_stopped(stage: Scene) -> None:
    worker = stage.of("gpu")
    stage.note_loss(worker)
    worker.signal(signal.SIGSTOP)
    time.sleep(14)
    worker.signal(signal.SIGCONT)


def attempt_raises(stage: Scene) -> None:
    stage.publish(3, 0.1, "raise")


def attempt_hangs(stage: Scene) -> None:
    stage.publish(1, 0.1, "hang")
    time.sleep(2)


def redis_restarted(stage: Scene) -> None:
    stage.server.kill()
    time.sleep(stage.dice.uniform(0, 2))
    stage.server.start()


def redis_paused(stage: Scene) -> None:
    os.kill(stage.server.process.pid, signal.SIGSTOP)
    time.sleep(10)
    os.kill(stage.server.process.pid, signal.SIGCONT)


def scripts_flushed(stage: Scene) -> None:
    with stage.server.client() as client:
        client.script_flush()


def line_cut(stage: Scene) -> None:
    stage.line.cut(stage.dice.uniform(0, 2))


def worker_told_to_stop(stage: Scene) -> None:
    """As a rolling update does it: a new worker comes, and an old one has its grace period."""
    worker = stage.of("gpu")
    stage.workers.remove(worker)
    stage.leaving.append(worker)
    stage.start("gpu")
    worker.process.terminate()


def poisoned(stage: Scene) -> None:
    stage.publish(1, 0.1, "kill")


def reaper_killed(stage: Scene) -> None:
    """Kill a worker, and again and again whoever is about to take over from it."""
    worker_killed(stage)
    for _ in range(3):
        time.sleep(stage.dice.uniform(0.5, 3))
        end(stage.sweeps[0])
        stage.sweeps[0] = start_sweep(stage.log / "pool.yaml")


def under(seed: str, fault: Fault, name: str, times: int, pause: float) -> Row:
    """A steady load, a fault at random moments, and the count."""
    with ExitStack() as stack:
        stage = scene(stack, seed + name)
        stage.publish(20, 0.3)
        until_started(stage)
        for _ in range(times):
            stage.publish(12, stage.dice.uniform(0.2, 0.5))
            time.sleep(stage.dice.uniform(0.2, pause))
            fault(stage)
        row = stage.judge(name, times, stage.drain())
        row.note = NOT_WITHIN.get(fault, "")
        return row


def redis_emptied(seed: str, times: int) -> Row:
    """A Redis that keeps nothing is restarted: what it lost is counted; what comes afterwards is done."""
    with ExitStack() as stack:
        stage, forgotten = scene(stack, seed, keeps=False), 0
        for _ in range(times):
            stage.publish(12, 0.3)
            until_started(stage)
            forgotten += len(stage.ids)
            redis_restarted(stage)
            stage.ids.clear()
        stage.publish(20, 0.1)
        return stage.judge("Redis restarted, kept nothing", times, stage.drain(), forgotten)


NOT_WITHIN: Mapping[Fault, str] = {
    reaper_killed: "each sweep first watches for a presence life",
    redis_paused: "the pauses are in it",
}
"""Why a job is not taken over as soon as usual."""

FAULTS: Sequence[tuple[Fault, str, float]] = (
    (child_killed, "child SIGKILL", 1.0),
    (worker_killed, "worker SIGKILL", 3.0),
    (worker_stopped, "worker SIGSTOP 14 s, then SIGCONT", 1.0),
    (attempt_raises, "exception", 1.0),
    (attempt_hangs, "hard time limit", 1.0),
    (poisoned, "job that kills its workers", 1.0),
    (worker_told_to_stop, "worker SIGTERM, replaced", 1.0),
    (redis_restarted, "Redis restarted, kept all", 2.0),
    (redis_paused, "Redis paused 10 s", 1.0),
    (scripts_flushed, "scripts flushed", 0.5),
    (line_cut, "network cut", 1.0),
    (reaper_killed, "worker SIGKILL, sweep SIGKILL while it takes over", 2.0),
)

SIZES = {"short": (2_000, 3, 1), "full": (45_000, 25, 5), "long": (90_000, 50, 20)}


SIDE_BY_SIDE = 4
"""How many rows are looked at at once, each in a Redis and with workers of its own: most of their time is waiting."""

POOLS = 5
"""How many pools are scaled down at once: most of that time is waiting too, for what busy workers still have to do."""


def run(size: str, seed: str) -> list[Row]:
    """Every row, printed as it comes."""
    jobs, kills, times = SIZES[size]
    rows = []

    def show(row: Row) -> None:
        rows.append(row)
        print("| " + " | ".join(row.cells()) + " |", flush=True)

    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS), flush=True)
    guardian()  # one for all threads
    show(flood(seed, jobs, kills, plain=True))
    show(flood(seed, jobs, kills, plain=False))
    quick = {child_killed, worker_killed, redis_restarted, line_cut}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        coming = [pool.submit(scaled_down, 40 * times), pool.submit(redis_emptied, seed, times)] if size != "short" else []
        coming += [
            pool.submit(under, seed, fault, name, times, pause)
            for fault, name, pause in FAULTS
            if size != "short" or fault in quick
        ]
        for done in as_completed(coming):
            show(done.result())
    return rows


def main(size: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, and with it all that it has started
    seed = os.environ.get("CHAOS_SEED") or str(int(time.time()))
    print(f"CHAOS_SEED={seed}\n", flush=True)
    began = time.monotonic()
    rows = run(size, seed)
    broken = [row.fault for row in rows if not row.kept and "plain" not in row.fault]
    late = [row.fault for row in rows if row.late]
    print(f"\n{time.monotonic() - began:.0f} s; broken: {', '.join(broken) or 'nothing'}; "
          f"taken over later than {TAKEN_OVER_SECONDS} s: {', '.join(late) or 'nothing'}")  # fmt: skip
    return int(bool(broken or late))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
