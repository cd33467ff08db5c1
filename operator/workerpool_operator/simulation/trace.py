"""Jobs for the simulator: read from a file, or made up from a seed."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from workerpool_routing.ledger import Job, State


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in order of arrival; both in seconds, of the same length."""

    name: str
    arrivals: Sequence[float]
    services: Sequence[float]

    def __len__(self) -> int:
        return len(self.arrivals)


class BadTrace(ValueError):
    """A trace that cannot be used; the message names line, column and value."""


ARRIVAL = "arrival_s"
SERVICE = ("service_s", "exec_s")
LLM = ("ctx_tokens", "gen_tokens")


def read(name: str, lines: Iterable[str], columns: Mapping[str, str] | None = None) -> Trace:
    """Parse a CSV with ``arrival_s`` and ``service_s`` (or ``exec_s``); other columns are ignored.

    A language-model trace without a service time but with ``ctx_tokens`` and ``gen_tokens`` is given one by convention:
    0.3 s + 0.25 ms for each token of context + 20 ms for each generated token.

    Args:
        name: what tables call it.
        lines: the file.
        columns: the file's own names of ``arrival_s`` and ``service_s``, where they differ.

    Raises:
        BadTrace: a column is missing, or a value is not a number, negative, or earlier than the one before it.
    """
    rows = csv.DictReader(lines)
    present = rows.fieldnames or []
    arrival = (columns or {}).get(ARRIVAL, ARRIVAL)
    wanted = (columns or {}).get(SERVICE[0])
    if arrival not in present:
        raise BadTrace(f"{name}: line 1: no column {arrival}; the columns are: {', '.join(present) or 'none'}")
    seconds = _service(name, present, wanted)
    arrivals: list[float] = []
    services: list[float] = []
    for row in rows:
        at = _number(name, rows.line_num, arrival, row[arrival])
        if arrivals and at < arrivals[-1]:
            raise BadTrace(f"{name}: line {rows.line_num}: {arrival} is {at:g}, earlier than {arrivals[-1]:g} before it: sort it")
        arrivals.append(at)
        services.append(seconds(rows.line_num, row))
    return Trace(name, arrivals, services)


def _service(name: str, present: Sequence[str], wanted: str | None) -> Callable[[int, Mapping[str, str]], float]:
    column = wanted if wanted in present else None
    if wanted is None:
        column = next((own for own in SERVICE if own in present), None)
    if column is not None:
        return lambda line, row: _number(name, line, column, row[column])
    if wanted is None and all(own in present for own in LLM):
        context, generated = LLM
        return lambda line, row: (
            0.3 + 0.00025 * _number(name, line, context, row[context]) + 0.020 * _number(name, line, generated, row[generated])
        )
    raise BadTrace(f"{name}: line 1: no column {wanted or ' or '.join(SERVICE)}; the columns are: {', '.join(present)}")


def _number(name: str, line: int, column: str, raw: str | None) -> float:
    try:
        value = float(raw or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        shown = repr(raw) if raw else "missing"
        raise BadTrace(f"{name}: line {line}: {column} is {shown}: it must be a number of seconds, 0 or more")
    return value


def of_jobs(pool: str, tier: str, jobs: Iterable[Job]) -> tuple[Trace, int]:
    """The ended jobs of a pool that wanted a tier, from the first one's admission on.

    Returns:
        the trace, and for how many of its jobs no run that was done on that tier is known, because they ran elsewhere or failed:
        these are given the mean length of the others.

    Raises:
        BadTrace: no job of that tier was done there, so that nothing says how long one takes.
    """
    wanted = sorted((job for job in jobs if job.wanted == tier and State.ADMITTED in job.times), key=_admitted)
    lengths = [_seconds_on(tier, job) for job in wanted]
    known = [seconds for seconds in lengths if seconds is not None]
    if not known:
        raise BadTrace(f"the ledger of {pool} has no job (any more) that was done on tier {tier}: there is nothing to replay")
    mean = sum(known) / len(known)
    arrivals = [(_admitted(job) - _admitted(wanted[0])) / 1000 for job in wanted]
    return Trace(pool, arrivals, [mean if seconds is None else seconds for seconds in lengths]), len(lengths) - len(known)


def _admitted(job: Job) -> int:
    return job.times[State.ADMITTED]


def _seconds_on(tier: str, job: Job) -> float | None:
    """Of the run that was done there, None without one."""
    runs = [run for run in job.runs if run.tier == tier and run.how == State.DONE]
    return (runs[-1].ended - runs[-1].began) / 1000 if runs and runs[-1].ended is not None else None


HOUR_SHARES = (
    .1429, .0408, .0436, .0450, .0248, .0134, .0125, .0094, .0046, .0017, .0013, .0001,
    .0, .0001, .0001, .0015, .0238, .0874, .1036, .0231, .0408, .1240, .1236, .1317,
)  # fmt: skip
"""Share of a day's jobs in each hour: a service that people use in the evening, with an empty morning."""


def images(seed: int, jobs: int = 10_000) -> Trace:
    """A day of an image generation service: a strong daily rhythm, jobs of half a minute, some of ten."""
    rng = random.Random(seed)
    arrivals: list[float] = []
    for hour, share in enumerate(HOUR_SHARES):
        mean = 3600 / (share * jobs) if share else math.inf
        arrivals += _renewals(rng, hour * 3600.0, (hour + 1) * 3600.0, mean, variation=1.16)
    services = [min(rng.lognormvariate(math.log(23.1), 0.654), 567.0) for _ in arrivals]
    return Trace("images", arrivals, services)


def bursts(seed: int) -> Trace:
    """An hour of short jobs that come in bursts of up to hundreds, with minutes of silence between them."""
    rng = random.Random(seed)
    arrivals: list[float] = []
    at = 0.0
    while at < 3600:
        size = int(rng.paretovariate(1.1) * 20)
        arrivals += _renewals(rng, at, at + min(size, 1500) / 25, 0.04, variation=1.5)
        at = max(at, arrivals[-1] if arrivals else 0.0) + rng.expovariate(1 / 40)
    return Trace("bursts", arrivals, [min(rng.lognormvariate(0.0, 0.8), 40.0) for _ in arrivals])


def steady(seed: int, rate: float = 1.16, hours: float = 24.0) -> Trace:
    """Poisson arrivals at one rate, jobs of half a minute: 100,000 in a day."""
    rng = random.Random(seed)
    arrivals = _renewals(rng, 0.0, hours * 3600, 1 / rate, variation=1.0)
    return Trace("steady", arrivals, [min(rng.lognormvariate(math.log(23.1), 0.654), 567.0) for _ in arrivals])


SYNTHETIC: Mapping[str, Callable[[int], Trace]] = {"images": images, "bursts": bursts, "steady": steady}
"""The traces that need no file, by name."""


def _renewals(rng: random.Random, start: float, end: float, mean: float, *, variation: float) -> list[float]:
    """Arrivals between two times with Gamma distributed gaps of this mean and coefficient of variation."""
    if math.isinf(mean):
        return []
    shape = 1 / variation**2
    times = []
    at = start + rng.random() * mean
    while at < end:
        times.append(at)
        at += rng.gammavariate(shape, mean / shape)
    return times
