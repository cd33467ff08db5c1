"""The app of the contract tests: tasks that end in every way that a task can end, on the tier that they are told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from celery import Celery, bootsteps, signals
from celery.exceptions import Ignore, Reject
from kombu import Connection, Consumer, Queue

from workerpool_routing import Tier, WorkerPool

URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
TIER = os.environ.get("WORKERPOOL_TIER", "none")

app = Celery("jobs", broker=URL, backend=os.environ.get("JOBS_BACKEND", URL))
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_pool_start_method=os.environ.get("JOBS_START_METHOD", "fork"),
    broker_transport_options=json.loads(os.environ.get("JOBS_TRANSPORT", "{}")),
    **json.loads(os.environ.get("JOBS_CONF", "{}")),
)
tiers = [Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False)]
further = [
    Tier(name, f"{name}-jobs", accelerated=False) for name in filter(None, os.environ.get("JOBS_FURTHER_TIERS", "").split(","))
]
given = None if os.environ.get("JOBS_WITHOUT_TIERS") else [*tiers, *further]
pool = WorkerPool("test/jobs", app, tiers=given, timeout=5)
if "JOBS_LATE_CONF" in os.environ:
    app.config_from_object(json.loads(os.environ["JOBS_LATE_CONF"]))


class Letters(bootsteps.ConsumerStep):  # type: ignore[misc]
    """A consumer of its author's, which keeps what it has received."""

    def get_consumers(self, channel: Any) -> list[Consumer]:
        """One consumer of the letters."""
        return [Consumer(channel, queues=[Queue("letters")], on_message=lambda _: None)]


if "JOBS_LETTERS" in os.environ:
    app.steps["consumer"].add(Letters)


class Unprintable(Exception):
    """An error whose author's ``repr`` raises, or is no text that can be encoded."""

    def __repr__(self) -> str:
        if self.args == ("repr raises",):
            raise RuntimeError("no repr")
        return "caf\udce9.wav"


def end(how: str) -> None:
    """End in some way other than returning."""
    while how.startswith("gate") and not app.backend.client.get("gate"):
        time.sleep(0.05)
    if how in ("raise", "gate, raise"):
        raise ValueError("asked to fail")
    if how == "cancel":
        raise asyncio.CancelledError
    if how == "memory":
        raise MemoryError("7.28 TiB")
    if how.startswith("repr"):
        raise Unprintable(how)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(3)
    if how == "hang":
        time.sleep(60)
    if how == "driver" and app.backend.client.exists("driver is broken", f"{os.environ['WORKERPOOL_WORKER']} is broken"):
        raise OSError("no such device")


@app.task  # type: ignore[untyped-decorator]
def work(endings: dict[str, str], seconds: float = 0) -> str:
    """Run for some seconds, end as told for this tier, else return the tier's name."""
    time.sleep(seconds)
    end(endings.get(TIER, "return"))
    return TIER


@app.task  # type: ignore[untyped-decorator]
def held(path: str) -> str:
    """Run as long as a file exists, whatever Redis does meanwhile."""
    while Path(path).exists():
        time.sleep(0.05)
    return TIER


@app.task(time_limit=5)  # type: ignore[untyped-decorator]
def hard_limited(endings: dict[str, str]) -> str:
    """The same under a hard time limit."""
    end(endings.get(TIER, "return"))
    return TIER


@app.task(soft_time_limit=4)  # type: ignore[untyped-decorator]
def soft_limited(endings: dict[str, str]) -> str:
    """The same under a soft time limit."""
    end(endings.get(TIER, "return"))
    return TIER


def hold_redis() -> None:
    """Let Redis take nothing for 3 s, and a soft time limit strike while this child asks the ledger something meanwhile.

    The signal is the pool's own; the main process, which would send it, may be waiting for Redis as well.
    """
    child, held_until = threading.main_thread().ident or 0, time.monotonic() + 3

    def strike() -> None:
        while time.monotonic() < held_until:
            stack = traceback.walk_stack(sys._current_frames()[child])
            if any(frame.f_globals["__name__"] == "workerpool_routing.connection" for frame, _ in stack):
                signal.pthread_kill(child, signal.SIGUSR1)
                return
            time.sleep(0.01)

    app.backend.client.client_pause(3000, all=False)
    threading.Thread(target=strike, daemon=True).start()


def interrupt_its_answer(connection: Any) -> None:
    """Let a soft time limit strike when the ledger has entered the end of the attempt, before this child hears so."""
    run = connection.run

    def unheard(name: str, call: Any) -> Any:
        answer = run(name, call)
        if name == "settle":
            connection.run = run
            signal.raise_signal(signal.SIGUSR1)
        return answer

    connection.run = unheard


@app.task(bind=True)  # type: ignore[untyped-decorator]
def late(self: Any, endings: dict[str, str]) -> str:
    """Return the tier's name, to a ledger that keeps it waiting or is not heard where the job says so."""
    if endings.get(TIER) == "hold":
        hold_redis()
    if endings.get(TIER) == "unheard":
        interrupt_its_answer(self.life.connection)
    return TIER


@app.task(bind=True, max_retries=3)  # type: ignore[untyped-decorator]
def retried(self: Any, times: int, seconds: float = 0) -> tuple[str, int]:
    """Take some time, ask for some retries, then return the tier and the count."""
    time.sleep(seconds)
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return TIER, self.request.retries


@app.task(bind=True)  # type: ignore[untyped-decorator]
def retried_late(self: Any, countdown: float = 0) -> None:
    """Ask for a retry when the gate is open, on an accelerator; fail elsewhere."""
    if TIER == "gpu":
        end("gate")
        raise self.retry(countdown=countdown)
    raise ValueError("asked to fail")


@app.task(bind=True)  # type: ignore[untyped-decorator]
def retried_by_one(self: Any, asks: str) -> str:
    """Wait for this worker's own gate, ask for a retry on one worker, return the name of any other."""
    name = os.environ["WORKERPOOL_WORKER"]
    while not app.backend.client.exists(f"gate of {name}"):
        time.sleep(0.05)
    if name == asks and not self.request.retries:
        raise self.retry(countdown=0)
    return name


class CutOff(app.Task):  # type: ignore[name-defined,misc]
    """A task whose worker is killed as soon as its failure is stored, where the job says so."""

    abstract = True

    def on_failure(self, _exc: Any, _task_id: str, args: Any, _kwargs: Any, _einfo: Any) -> None:
        """Kill all processes of the worker."""
        if args[0].get("after") == "kill":
            os.killpg(0, signal.SIGKILL)


@app.task(base=CutOff, track_started=True)  # type: ignore[untyped-decorator]
def tracked(endings: dict[str, str]) -> str:
    """A task that says when it has started."""
    end(endings.get(TIER, "return"))
    return TIER


class Based(app.Task):  # type: ignore[name-defined,misc]
    """An author's own base class, with hooks of its own."""

    abstract = True

    def before_start(self, _task_id: str, args: Any, _kwargs: Any) -> None:
        """Refuse to start where the job's first argument says so."""
        if TIER in args[0].get("refused", ()):
            raise ValueError(f"refused on {TIER}")

    def on_success(self, retval: Any, task_id: str, *_: Any) -> None:
        """Leave a trace."""
        self.backend.client.set(f"success-of:{task_id}", retval)


@app.task(base=Based)  # type: ignore[untyped-decorator]
def based(endings: dict[str, str]) -> str:
    """A task with a base class of its author."""
    end(endings.get(TIER, "return"))
    return TIER


@app.task  # type: ignore[untyped-decorator]
def factorial(n: int) -> int:
    """A task that calls itself directly."""
    return n * factorial(n - 1) if n > 1 else 1


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def die_before_the_claim(task_id: str, args: Any, **_: Any) -> None:
    """Kill the child before the fence, once or at every start, or hold Redis, when the job's first argument says so."""
    where = args[0].get("before") if args and isinstance(args[0], dict) else None
    if where == "hold" and app.backend.client.set(f"held:{task_id}", 1, nx=True):
        hold_redis()
    if where == "always" or (where == TIER and app.backend.client.set(f"died:{task_id}", 1, nx=True)):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(acks_on_failure=False)  # type: ignore[untyped-decorator]
def not_acknowledged() -> None:
    """Fail, without an acknowledgement of the message."""
    raise RuntimeError(TIER)


@app.task  # type: ignore[untyped-decorator]
def add(n: int, fails: bool = False) -> int:
    """One part of a canvas, which may fail where there is an accelerator."""
    if fails and TIER == "gpu":
        raise RuntimeError("no GPU memory")
    return n + 1


@app.task(bind=True)  # type: ignore[untyped-decorator]
def part(self: Any, n: int, dies: str = "") -> int:
    """One part of a chord whose child is killed, when its result is stored, before or after it has been counted."""
    counted = self.backend.on_chord_part_return

    def die(*part: Any, **more: Any) -> None:
        if dies == "after":
            counted(*part, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    if dies:
        self.backend.on_chord_part_return = die
    return n


@app.task(max_retries=0)  # type: ignore[untyped-decorator]
def add_once(n: int, fails: bool = False) -> int:
    """The same, with no retries of its author's."""
    return int(add(n, fails))


@app.task  # type: ignore[untyped-decorator]
def total(parts: list[int], key: str) -> int:
    """The body of a chord, which counts how often it ran."""
    app.backend.client.incr(key)
    return sum(parts)


@app.task(fallback_on_failure=False)  # type: ignore[untyped-decorator]
def settled_here(endings: dict[str, str]) -> str:
    """A task whose failure is final wherever it is."""
    end(endings.get(TIER, "return"))
    return TIER


@app.task(fallback_on_failure=(OSError,))  # type: ignore[untyped-decorator]
def particular(how: str) -> str:
    """A task that another tier can help after some errors only."""
    if TIER == "gpu":
        raise OSError("no device") if how == "device" else ValueError("bad input")
    return TIER


@app.task(fenced=False)  # type: ignore[untyped-decorator]
def unfenced(endings: dict[str, str]) -> str:
    """A task whose author wants plain Celery."""
    end(endings.get(TIER, "return"))
    return TIER


@app.task(bind=True)  # type: ignore[untyped-decorator]
def special(self: Any, how: str) -> Any:
    """End by one of Celery's own exceptions, when no door is closed."""
    while app.backend.client.exists("door"):
        time.sleep(0.05)
    if how == "ignore":
        raise Ignore
    if how == "reject":
        raise Reject("no", requeue=False)
    if how == "requeue" and app.backend.client.set(f"requeued:{self.request.id}", 1, nx=True):
        raise Reject("once more", requeue=True)
    if how == "replace":
        raise self.replace(add.s(41).set(queue=self.request.delivery_info["routing_key"]))
    return how


class Stopping:
    """A result at which the worker stops that is about to store it, where there is an accelerator."""

    def __json__(self) -> str:
        """The tier's name."""
        if TIER == "gpu":
            os.killpg(0, signal.SIGSTOP)
        return TIER


@app.task  # type: ignore[untyped-decorator]
def stopping() -> Stopping:
    """Return at once on an accelerator, elsewhere when the gate is open."""
    end("gate" if TIER != "gpu" else "return")
    return Stopping()


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def unstored() -> str:
    """A task whose result nobody wants."""
    return TIER


@app.task  # type: ignore[untyped-decorator]
def unencodable(endings: dict[str, str] | None = None) -> object:
    """A task whose result cannot be stored."""
    end((endings or {}).get(TIER, "return"))
    return object()


@app.task(acks_late=False)  # type: ignore[untyped-decorator]
def acknowledged_early() -> str:
    """A task whose author asked for what could lose its jobs."""
    return TIER


@app.task(rate_limit="1/h")  # type: ignore[untyped-decorator]
def limited() -> str:
    """A task that a worker may run once."""
    return TIER


@app.task  # type: ignore[untyped-decorator]
def read_mail(letters: int) -> list[str]:
    """Read some letters from a queue, by a connection of its own, and acknowledge all but the last."""
    with Connection(URL) as connection, connection.SimpleQueue("mail") as mail:
        read = [mail.get(timeout=30) for _ in range(letters)]
        for letter in read[:-1]:
            letter.ack()
        return [letter.payload for letter in read]


@app.task  # type: ignore[untyped-decorator]
def count(key: str, seconds: float = 0) -> None:
    """Count how often it ran, and take some time."""
    app.backend.client.incr(key)
    time.sleep(seconds)
