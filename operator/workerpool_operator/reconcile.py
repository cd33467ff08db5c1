"""The one pass: observe, decide, act, report.

It is level-triggered: whatever caused it (a watch event, a wake message, the tick), it looks at everything and does what is
missing. All pools of one broker are read in one pipeline. What fails for one pool does not keep the pass from the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from workerpool_operator import conditions, planning, scaling, sharing
from workerpool_operator.model import Mode
from workerpool_operator.observation import BrokerReading, TierReplicas, Unavailable
from workerpool_operator.planning import TierPlan
from workerpool_operator.ports import Broker, Pool, Report, Reporter, Urls, Workers
from workerpool_operator.reaper import Reaper
from workerpool_operator.sharing import Conflict

logger = logging.getLogger("workerpool_operator")

TICK_SECONDS = 1.0
"""The longest time between two passes."""

SHORTEST_PAUSE_SECONDS = 0.1
"""Causes that arrive within this time share a pass."""


class Reconciler:
    """Keeps every pool as its WorkerPool says.

    Args:
        urls: where the broker of a pool is.
        broker: the queues.
        workers: the place where workers run.
        reporter: the place where people look.
        wake: set by whoever saw something change.
        clock: wall-clock seconds.

    Attributes:
        pools: the valid WorkerPools by id; whoever watches them adds, replaces and removes, then sets ``wake``.
    """

    def __init__(
        self,
        *,
        urls: Urls,
        broker: Broker,
        workers: Workers,
        reporter: Reporter,
        wake: asyncio.Event,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pools: dict[str, Pool] = {}
        self._urls, self._broker, self._workers, self._reporter = urls, broker, workers, reporter
        self._wake, self._clock = wake, clock
        self._memory: dict[str, dict[str, scaling.Memory]] = {}
        self._status: dict[str, Mapping[str, Any]] = {}
        self._reaper = Reaper(broker, clock)

    async def run(self) -> None:
        """Pass after pass, until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.reconcile_once()
            except Exception:
                logger.exception("the pass failed, the next one tries again")
            await asyncio.sleep(SHORTEST_PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS - SHORTEST_PAUSE_SECONDS):
                    await self._wake.wait()

    async def reconcile_once(self) -> None:
        """One pass over all pools."""
        pools = list(self.pools.values())
        self._forget_all_but({pool.uid for pool in pools})
        found = await asyncio.gather(*(self._urls.broker_url(pool) for pool in pools))
        urls = {pool.id: url for pool, url in zip(pools, found, strict=True) if isinstance(url, str)}
        readings: dict[str, BrokerReading | Unavailable] = {
            pool.id: url for pool, url in zip(pools, found, strict=True) if isinstance(url, Unavailable)
        }
        by_url = {url: [pool for pool in pools if urls.get(pool.id) == url] for url in set(urls.values())}
        for result in await asyncio.gather(*(self._read(url, sharers) for url, sharers in by_url.items())):
            readings.update(result)
        held = sharing.conflicts(pools, urls)
        passes = (self._pass(pool, urls.get(pool.id, ""), readings[pool.id], held.get(pool.id)) for pool in pools)
        for pool, outcome in zip(pools, await asyncio.gather(*passes, return_exceptions=True), strict=True):
            if isinstance(outcome, Exception):
                logger.error("%s: the pass failed, the next one tries again", pool.id, exc_info=outcome)

    async def _read(self, url: str, pools: list[Pool]) -> dict[str, BrokerReading | Unavailable]:
        answer = await self._broker.read(url, pools)
        self._reaper.saw(url, answer)
        return {pool.id: answer if isinstance(answer, Unavailable) else answer[pool.id] for pool in pools}

    async def _pass(self, pool: Pool, url: str, reading: BrokerReading | Unavailable, conflict: Conflict | None) -> None:
        seen = await self._workers.observe(pool)
        plans = [] if isinstance(seen, Unavailable) else self._decide(pool, reading, seen)
        if plans and pool.spec.mode is Mode.ACTIVE and conflict is None:
            await self._act(pool, url, reading, plans)
        status, events = conditions.assess(
            pool,
            plans,
            reading if isinstance(reading, Unavailable) else None,
            seen if isinstance(seen, Unavailable) else None,
            conflict,
            self._status.get(pool.uid, pool.status),
            self._clock(),
        )
        self._status[pool.uid] = status.dump()
        await self._reporter.report(Report(pool, status, reading, events))

    def _decide(self, pool: Pool, reading: BrokerReading | Unavailable, seen: Mapping[str, TierReplicas]) -> list[TierPlan]:
        plans = planning.plan(pool, reading, seen, self._memory.get(pool.uid, {}), self._clock())
        self._memory[pool.uid] = {plan.tier.name: plan.decision.memory for plan in plans}
        return plans

    async def _act(self, pool: Pool, url: str, reading: BrokerReading | Unavailable, plans: list[TierPlan]) -> None:
        replicas = {plan.tier.name: plan.decision.replicas for plan in plans}
        await self._workers.scale(pool, replicas, planning.busy(plans))
        if isinstance(reading, Unavailable):
            return
        await self._broker.publish(url, pool, planning.policy(pool.spec), planning.capacity(plans))
        await self._reaper.reap(pool, url, {name: queue.lost for name, queue in reading.tiers.items()})

    def _forget_all_but(self, uids: set[str]) -> None:
        self._reaper.forget_all_but(uids)
        for kept in (self._memory, self._status):
            for uid in kept.keys() - uids:
                del kept[uid]
