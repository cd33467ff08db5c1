"""Measures what admission costs, as ratios within one run on one machine: ``python -m benchmarks.admission`` prints the table.

Both sides of a ratio take turns in one process on one Redis, so whatever else the machine does falls on both.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from celery import Celery
from redis import Redis

from workerpool_operator.local.redis_server import private_redis
from workerpool_routing import Reason, Tier, WorkerPool
from workerpool_routing.wire import JOB_LIFE_SECONDS, SCHEMA_VERSION, Policy, TaskPolicy

GPU, CPU = Tier("gpu", "gpu-tasks", accelerated=True), Tier("cpu", "celery", accelerated=False)
WORKERS = 200
JOBS, PROCESSES, SLOTS = 10_000, 8, 50
PATIENCE = 5.0
"""Seconds that a submitting process waits for Redis: on a busy machine the throughput is to be measured, not refusals."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``bound`` is what must be reached, ``met`` whether it was."""

    what: str
    seen: str
    bound: str
    met: bool


def app_on(url: str) -> Celery:
    app = Celery("api", broker=url, set_as_current=False)

    @app.task(name="bench.work", shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def work(path: str) -> str:
        return path

    @app.task(name="bench.plain", shared=False, ignore_result=True)  # type: ignore[untyped-decorator]
    def plain(path: str) -> str:
        return path

    return app


def turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the sides taking turns."""
    for call in list(sides.values()) * 20:
        call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def micros(seconds: list[float]) -> str:
    return f"{median(seconds) * 1e6:.0f} µs, p99 {p99(seconds) * 1e6:.0f} µs"


def p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[-1]


def seed_workers(client: Any, pool: WorkerPool, count: int) -> None:
    """Presence of that many workers, half of them on either tier, all just now."""
    now = client.time()[0] * 1000 + 3_600_000
    for n in range(count):
        tier = (GPU, CPU)[n % 2]
        owner = f"{tier.name}-{n}.x"
        report = {"owner": owner, "worker": owner, "tier": tier.name, "queue": tier.queue, "slots": 1, "busy": 1, "since": now}
        client.hset(pool.keys.presence(tier.name), owner, json.dumps({"version": SCHEMA_VERSION, "at": now, **report}))
        client.zadd(pool.keys.slots(tier.name), {f"{owner}/0": now})


def decision(client: Any, pool: WorkerPool, task: Any) -> Iterator[Row]:
    empty = client.register_script("return 1")
    client_of_the_pool = pool.connection.client
    seed_workers(client, pool, WORKERS)
    seen = turns(
        {"bare": lambda: empty(client=client_of_the_pool), "ours": lambda: pool.should_accelerate(task), "status": pool.status},
        1500,
    )
    ratio = median(seen["ours"]) / median(seen["bare"])
    yield Row(
        f"one decision against an EVALSHA of an empty script, {WORKERS} workers",
        f"{ratio:.2f} x ({micros(seen['ours'])}; empty {micros(seen['bare'])})",
        "≤ 2 x",
        ratio <= 2,
    )
    yield Row(f"status() with {WORKERS} workers", micros(seen["status"]), "p99 < 5 ms", p99(seen["status"]) < 0.005)


def flatness(client: Any, app: Celery, task: Any) -> Iterator[Row]:
    pools = {}
    for waiting in (0, 1_000, 100_000):
        queue = f"held-{waiting}"
        pools[waiting] = WorkerPool(f"bench/held-{waiting}", app, tiers=(Tier("gpu", queue, accelerated=True), CPU))
        for at in range(0, waiting, 1_000):
            client.lpush(queue, *[f"{at}"] * 1_000)
    seen = turns({str(waiting): partial(pool.should_accelerate, task) for waiting, pool in pools.items()}, 1500)
    medians = {waiting: median(seconds) for waiting, seconds in seen.items()}
    spread = max(medians.values()) / min(medians.values()) - 1
    shown = ", ".join(f"{waiting}: {seconds * 1e6:.0f} µs" for waiting, seconds in medians.items())
    yield Row("one decision by waiting messages", f"{spread:.0%} apart ({shown})", "≤ 25 %", spread <= 0.25)
    client.delete(*(f"held-{waiting}" for waiting in pools))


def submitting(client: Any, pool: WorkerPool, app: Celery) -> Iterator[Row]:
    task, plain = app.tasks["bench.work"], app.tasks["bench.plain"]

    seen = turns(
        {
            "submit": lambda: pool.submit(task, ("a.wav",), accelerated=True, content_type="audio"),
            "celery": lambda: plain.apply_async(("a.wav",)),
            "hook": lambda: task.apply_async(("a.wav",)),
        },
        1500,
    )
    ours = max(0.0, 1 - median(seen["celery"]) / median(seen["submit"]))
    hook = 1 - median(seen["celery"]) / median(seen["hook"])
    yield Row(
        "share of submit() beyond what a bare apply_async takes",
        f"{ours:.0%} ({micros(seen['submit'])}; apply_async {micros(seen['celery'])})",
        "≤ 30 %",
        ours <= 0.3,
    )
    yield Row("share of the hook in a routed apply_async", f"{hook:.0%} ({micros(seen['hook'])})", "beside it", True)
    ids = list(client.scan_iter(pool.keys.job("*"), count=1000))[:200]
    bytes_each = median(client.memory_usage(key, samples=0) for key in ids)
    lives = max(client.ttl(key) for key in ids)
    yield Row(
        "memory of the ledger for each waiting job, its message included",
        f"{bytes_each:.0f} bytes, gone {lives / 3600:.0f} h after its last transition",
        "has an end",
        0 < lives <= JOB_LIFE_SECONDS and all(client.ttl(key) > 0 for key in ids),
    )
    client.flushall()


def _submit(url: str, count: int, start: Any, found: Any, *, routed: bool) -> None:
    app = app_on(url)
    pool = WorkerPool("bench/pool", app, tiers=(GPU, CPU), timeout=PATIENCE)
    task = app.tasks["bench.work"]
    pool.queue_length(GPU.queue)
    start.wait()
    free = 0
    for _ in range(count):
        if routed:
            free += pool.submit(task, ("a.wav",), accelerated=True).reason is Reason.FREE_SLOT
        else:
            task.apply_async(("a.wav",))
    found.put(free)


def from_processes(url: str, *, routed: bool) -> tuple[float, int]:
    """Jobs a second from all processes together, and how many of them got a free slot."""
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(PROCESSES + 1), context.Queue()
    arguments = (url, JOBS // PROCESSES, start, found)
    processes = [
        context.Process(target=_submit, args=arguments, kwargs={"routed": routed}, daemon=True) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    start.wait()
    started = time.perf_counter()
    free = sum(found.get(timeout=120) for _ in processes)
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return JOBS / seconds, free


def herd(client: Any, url: str, pool: WorkerPool) -> Iterator[Row]:
    rates: dict[bool, list[float]] = {True: [], False: []}
    over = 0
    for routed in (False, True, False, True):
        client.flushall()
        client.zadd(pool.keys.slots("gpu"), {f"w/{n}": client.time()[0] * 1000 + 3_600_000 for n in range(SLOTS)})
        rate, free = from_processes(url, routed=routed)
        rates[routed].append(rate)
        over += abs(free - SLOTS) if routed else 0
    client.flushall()
    share = sum(rates[True]) / sum(rates[False])
    what = f"{JOBS} jobs from {PROCESSES} processes"
    yield Row(f"{what}: free slots given out of {SLOTS}", f"{over} too many or too few in 2 runs", "0", over == 0)
    yield Row(
        f"{what}: throughput of submit() against bare apply_async",
        f"{share:.0%} ({rates[True][-1]:.0f}/s)",
        "≥ 60 %",
        share >= 0.6,
    )


@contextmanager
def real_workers(url: str, count: int) -> Iterator[None]:
    """Celery workers of the sample app's kind, each in its own process group."""
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.admission:app", "worker", "-P", "solo", "-l", "ERROR"]
    with ExitStack() as stack:
        for n in range(count):
            queue = GPU.queue if n % 2 else CPU.queue
            process = subprocess.Popen(
                [*command, "-n", f"w{n}@bench", "-Q", queue], env={**os.environ, "BENCH_URL": url}, start_new_session=True,
                cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
        yield


def sketch(app: Celery, client: Any) -> bool:
    """The rule as one would first write it: asks the workers by inspect, and Redis for two lengths."""
    inspect = app.control.inspect(timeout=1.0)
    active, stats, queues = inspect.active() or {}, inspect.stats() or {}, inspect.active_queues() or {}
    gpu = [name for name, served in queues.items() if any(queue["name"] == GPU.queue for queue in served)]
    free = [name for name in gpu if len(active[name]) < stats[name]["pool"]["max-concurrency"]]
    return bool(free) and client.llen(GPU.queue) <= client.llen(CPU.queue) + 5


def against_inspect(client: Any, url: str, pool: WorkerPool, task: Any) -> Iterator[Row]:
    app = app_on(url)
    with real_workers(url, 8):
        deadline = time.monotonic() + 60
        while len(app.control.ping(timeout=1.0)) < 8:
            if time.monotonic() > deadline:
                yield Row(
                    "against the sketched rule with inspect on 8 real workers", "they did not start", "≥ 10000 x", met=False
                )
                return
        theirs = []
        for _ in range(3):
            started = time.perf_counter()
            sketch(app, client)
            theirs.append(time.perf_counter() - started)
        ours = turns({"ours": lambda: pool.should_accelerate(task)}, 500)["ours"]
    ratio = median(theirs) / median(ours)
    yield Row(
        "against the sketched rule with inspect on 8 real workers",
        f"{ratio:.0f} x faster ({median(theirs):.2f} s against {median(ours) * 1e6:.0f} µs)",
        "≥ 10000 x",
        ratio >= 10_000,
    )


def importing() -> Iterator[Row]:
    """Seconds of ``import workerpool_routing`` in a fresh process that has Celery and redis-py, and what it adds to them."""
    code = (
        "import asyncio, celery, kombu.messaging, redis.sentinel, time; celery.Celery; celery.Task\n"
        "started = time.perf_counter(); import workerpool_routing; print(time.perf_counter() - started)"
    )
    seconds = median(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(7)
    )
    yield Row("import of the library after Celery and redis-py", f"{seconds * 1000:.0f} ms", "≤ 50 ms", seconds <= 0.05)


def table(rows: list[Row]) -> str:
    lines = ["| what | seen | must be |", "|---|---|---|"]
    return "\n".join(lines + [f"| {row.what} | {row.seen}{'' if row.met else ' **not met**'} | {row.bound} |" for row in rows])


def main() -> int:
    """Measure everything and print the table; 1 if a bound was not met."""
    rows = list(importing())
    with private_redis() as server, Redis.from_url(server.url, decode_responses=True) as client:
        hooked = app_on(server.url)
        pool = WorkerPool("bench/pool", hooked)
        client.set(pool.keys.policy, Policy((GPU, CPU), tasks=(TaskPolicy("bench.work"),)).dump())
        task = hooked.tasks["bench.work"]
        rows += decision(client, pool, task)
        rows += flatness(client, hooked, task)
        rows += submitting(client, pool, hooked)
        rows += herd(client, server.url, pool)
        client.set(pool.keys.policy, Policy((GPU, CPU), tasks=(TaskPolicy("bench.work"),)).dump())
        rows += against_inspect(client, server.url, pool, task)
    print(table(rows))
    return int(not all(row.met for row in rows))


if "BENCH_URL" in os.environ:
    app = app_on(os.environ["BENCH_URL"])

if __name__ == "__main__":
    sys.exit(main())
