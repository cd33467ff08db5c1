"""What one broken worker among good ones costs the jobs of a tier: by the breaker's own rule, and ejected as the scripts do it.

The world is small: Poisson arrivals, exponential lengths, whoever has idled longest gets the next job, and a pass a second.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import fmean
from typing import Any

import pytest
from tests.outlier import Outlier

from workerpool_operator import breaker
from workerpool_operator.observation import NEVER_OPENED, NO_ATTEMPTS, Attempts, Breaker, BreakerState
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.simulation

WORKERS = 8
LENGTH, ELSEWHERE, FAILS_AFTER = 30.0, 200.0, 0.2
HOURS = 6
BROKEN = 0


@dataclass(slots=True)
class Outcome:
    """Parts of all jobs, and of the time."""

    lost_their_fallback: float
    served: float
    out: float


@dataclass(slots=True)
class World:
    load: float
    ejects: bool
    dice: random.Random
    idle: list[int] = field(default_factory=lambda: list(range(WORKERS)))
    state: Breaker = NEVER_OPENED
    attempts: Attempts = NO_ATTEMPTS
    limit: int | None = None
    outlier: Outlier = field(default_factory=Outlier)
    events: list[tuple[float, int, str, int, float]] = field(default_factory=list)
    numbers: Any = field(default_factory=count)
    jobs: int = 0
    succeeded: int = 0
    failed: int = 0
    seconds_out: int = 0
    ejected: bool = False

    def later(self, at: float, what: str, worker: int = -1, began: float = 0.0) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), what, worker, began))

    def ended(self, what: str, began: float) -> None:
        if began * 1000 >= self.state.since:
            self.attempts = replace(self.attempts, **{what: getattr(self.attempts, what) + 1})

    def run(self) -> Outcome:
        self.dice.shuffle(self.idle)
        self.later(0.0, "arrives")
        self.later(1.0, "looks")
        while (event := heapq.heappop(self.events))[0] < HOURS * 3600:
            now, _, what, worker, began = event
            getattr(self, what)(now, worker, began)
        return Outcome(self.failed / self.jobs, self.succeeded / self.jobs, self.seconds_out / (HOURS * 3600))

    def arrives(self, now: float, _worker: int, _began: float) -> None:
        self.later(now + self.dice.expovariate(self.load * WORKERS / LENGTH), "arrives")
        self.jobs += 1
        free = [worker for worker in self.idle if worker != BROKEN or not self.ejected]
        if free and (self.limit is None or WORKERS - len(self.idle) < self.limit):
            self.idle.remove(free[0])
            lasts = FAILS_AFTER if free[0] == BROKEN else self.dice.expovariate(1 / LENGTH)
            self.later(now + lasts, "fails" if free[0] == BROKEN else "succeeds", free[0], now)

    def succeeds(self, _now: float, worker: int, began: float) -> None:
        self.idle.append(worker)
        self.succeeded += 1
        self.ended("succeeded", began)

    def fails(self, now: float, worker: int, began: float) -> None:
        self.idle.append(worker)
        self.failed += 1
        self.ended("failed", began)
        self.outlier.fails(self.succeeded, 1000 * now)
        self.later(now + self.dice.expovariate(1 / ELSEWHERE), "is_confirmed", began=began)

    def is_confirmed(self, _now: float, _worker: int, began: float) -> None:
        self.ended("confirmed", began)
        self.outlier.is_at_fault()

    def looks(self, now: float, _worker: int, _began: float) -> None:
        self.later(now + 1.0, "looks")
        in_flight = WORKERS - len(self.idle)
        decision = breaker.decide(self.state, self.attempts, in_flight, Milliseconds(round(now * 1000)))
        self.state, self.attempts, self.limit = decision.breaker, decision.attempts, decision.limit
        self.seconds_out += self.state.state is not BreakerState.CLOSED
        self.ejected = self.ejects and self.outlier.ejected(self.succeeded, 1000 * now)


def play(load: float, *, ejects: bool) -> Outcome:
    """The mean of three days' work."""
    runs = [World(load, ejects, random.Random(seed)).run() for seed in (1, 2, 3)]
    return Outcome(*(fmean(getattr(run, name) for run in runs) for name in ("lost_their_fallback", "served", "out")))


@pytest.mark.parametrize("load", [0.3, 0.7, 1.2])
def test_a_broken_worker_that_is_ejected_costs_few_jobs_their_fallback_and_the_others_go_on(load: float) -> None:
    without, ejected = play(load, ejects=False), play(load, ejects=True)
    assert ejected.lost_their_fallback < min(0.05, without.lost_their_fallback / 2)
    assert ejected.served > 1.1 * without.served
    assert ejected.out < 0.05
