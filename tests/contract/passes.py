"""The operator's passes over a real Redis; the place where workers run is a double that keeps what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from workerpool_operator.broker import RedisBroker
from workerpool_operator.observation import Replica, TierReplicas, Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_operator.reconcile import Reconciler
from workerpool_operator.status import ConditionType


class Place:
    """Where workers would run: what is ordered by pool and tier, and every call that changed it."""

    def __init__(self) -> None:
        self.ordered: dict[str, dict[str, int]] = {}
        self.changes: list[tuple[str, dict[str, int]]] = []
        self.broken: set[str] = set()
        self.hanging: set[str] = set()
        self.first_start: float | None = None
        self.workers: dict[str, tuple[Replica, ...]] = {}

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas]:
        ordered = self.ordered.get(pool.id, {})
        return {
            tier.name: TierReplicas(ordered.get(tier.name, 0), self.workers.get(tier.name, ()), first_start=self.first_start)
            for tier in pool.tiers
        }

    async def scale(self, pool: Pool, replicas: Mapping[str, int], leaving: frozenset[str]) -> None:  # noqa: ARG002 nobody runs here
        if pool.id in self.broken:
            raise ConnectionResetError("the place is out of order")
        if pool.id in self.hanging:
            await asyncio.Event().wait()
        if self.ordered.get(pool.id) != dict(replicas):
            self.ordered[pool.id] = dict(replicas)
            self.changes.append((pool.id, dict(replicas)))


class System:
    """A Reconciler, its parts, and a clock set by hand; it is itself the port that knows URLs and the one that reports."""

    def __init__(self, *pools: Pool) -> None:
        self.now = 1_000.0
        self.reports: list[Report] = []
        self.unknown: set[str] = set()
        self.place = Place()
        self.wake = asyncio.Event()
        self.broker = RedisBroker(self.wake)
        self.reconciler = Reconciler(
            urls=self, broker=self.broker, workers=self.place, reporter=self, wake=self.wake, clock=lambda: self.now
        )
        self.reconciler.pools = {pool.id: pool for pool in pools}

    async def broker_url(self, pool: Pool) -> str | Unavailable:
        return Unavailable("no Secret") if pool.id in self.unknown else str(pool.spec.broker.url)

    async def report(self, report: Report) -> None:
        self.reports.append(report)

    async def after(self, seconds: float = 1.0) -> None:
        """A pass, so much later."""
        self.now += seconds
        await self.reconciler.reconcile_once()

    async def watch_for(self, seconds: float) -> None:
        """A pass a second, without a gap."""
        for _ in range(int(seconds)):
            await self.after(1)

    def condition(self, pool: Pool, kind: ConditionType) -> str:
        """Its status in the last report of the pool."""
        last = next(report for report in reversed(self.reports) if report.pool.id == pool.id)
        return next(condition.status for condition in last.status.conditions if condition.type is kind)


@asynccontextmanager
async def running(*pools: Pool) -> AsyncIterator[System]:
    system = System(*pools)
    try:
        yield system
    finally:
        await system.broker.close()
