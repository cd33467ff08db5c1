"""The one pass: observe, decide, act, report.

It is level-triggered: whatever caused it (a watch event, a wake message, the tick), it looks at everything and does what is
missing. All pools of one broker are read in one pipeline. What fails or hangs for one pool does not keep the pass from the
others: what outlasts the patience of its pass goes on by itself, and is not begun again before it has ended. A defect that
strikes one pool stands in its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from workerpool_operator import conditions, planning, rebalancing, sharing
from workerpool_operator.model import Mode
from workerpool_operator.observation import BrokerReading, TierReplicas, Unavailable
from workerpool_operator.planning import TierPlan
from workerpool_operator.ports import NO_MARKS, Broker, Pool, Report, Reporter, Urls, Workers
from workerpool_operator.reaper import Reaper
from workerpool_operator.rebalancing import Moved
from workerpool_operator.sharing import Conflict
from workerpool_routing.decide import Load

logger = logging.getLogger("workerpool_operator")

TICK_SECONDS = 1.0
"""The longest time between two passes."""

SHORTEST_PAUSE_SECONDS = 0.1
"""Causes that arrive within this time share a pass."""

PATIENCE_SECONDS = 0.5
"""How long a pass waits for a broker, and for what it began: what takes longer must not delay the others."""

LOOK_AGAIN_SECONDS = 3.0
"""How long a queue is left alone in which nothing was found that may move: each look reads a thousand messages."""


_Version: TypeAlias = tuple[str, int, tuple[str, ...]]


@dataclass(slots=True)
class Passes:
    """What the passes have come to so far; times are monotonic seconds.

    Attributes:
        ended: how many there were.
        seconds: what they took together.
        errors: passes, and parts of a pass for one pool, that ended in an error.
        last_ended_at: when the last one ended, None before the first.
    """

    ended: int = 0
    seconds: float = 0.0
    errors: int = 0
    last_ended_at: float | None = None


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
        passes: what the passes have come to.
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
        self.passes = Passes()
        self._urls, self._broker, self._workers, self._reporter = urls, broker, workers, reporter
        self._wake, self._clock = wake, clock
        self._memory: dict[str, dict[str, planning.Memory]] = {}
        self._status: dict[str, Mapping[str, Any]] = {}
        self._reaper = Reaper(broker, lambda: self._clock())
        self._looked_in_vain: dict[str, dict[tuple[str, str], float]] = {}
        self._moved: dict[str, list[Moved]] = {}
        self._failures: dict[str, str] = {}
        self._places: dict[str, tuple[str, Hashable]] = {}
        self._held: dict[str, Conflict] = {}
        self._readings: dict[_Version, BrokerReading | Unavailable] = {}
        self._underway: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Pass after pass, until cancelled."""
        try:
            while True:
                self._wake.clear()
                began = time.monotonic()
                try:
                    await self._pass(PATIENCE_SECONDS)
                except Exception:
                    self.passes.errors += 1
                    logger.exception("the pass failed, the next one tries again")
                self.passes.last_ended_at = time.monotonic()
                self.passes.ended += 1
                self.passes.seconds += self.passes.last_ended_at - began
                await asyncio.sleep(SHORTEST_PAUSE_SECONDS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS - SHORTEST_PAUSE_SECONDS):
                        await self._wake.wait()
        finally:
            tasks = list(self._underway.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def reconcile_once(self) -> None:
        """One pass over all pools, to its end."""
        await self._pass(None)

    async def _pass(self, patience: float | None) -> None:
        pools = list(self.pools.values())
        self._forget_all_but({pool.uid for pool in pools})
        found = await asyncio.gather(*(self._urls.broker_url(pool) for pool in pools))
        urls = {pool.id: url for pool, url in zip(pools, found, strict=True) if isinstance(url, str)}
        for pool, url in zip(pools, found, strict=True):
            if isinstance(url, Unavailable):
                self._readings[_version(pool)] = url
        needed = [(urls[pool.id], pool) for pool in pools if pool.id in urls]
        self._begin(("keep only", ""), "connections", partial(self._broker.keep_only, needed))
        await self._read(pools, urls, patience)
        readings, self._readings = self._readings, {}
        held = self._conflicts(pools, urls, readings)
        ceded = sharing.ceded(pools, self._brokers(pools))
        for pool in pools:
            if reading := readings.get(_version(pool)):
                known = replace(pool, ceded=ceded.get(pool.id, frozenset()))
                tend = partial(self._tend, known, urls.get(pool.id, ""), reading, held.get(pool.id))
                self._begin(("tend", pool.id), pool.id, tend)
        await self._finish(patience)

    async def _read(self, pools: list[Pool], urls: Mapping[str, str], patience: float | None) -> None:
        """Gather readings; a broker that is slower than the patience is read to the end, for a later pass."""
        for url in set(urls.values()):
            sharers = [pool for pool in pools if urls.get(pool.id) == url]
            names = ", ".join(pool.id for pool in sharers)
            self._begin(("read", url), names, partial(self._measure, url, sharers))
        reads = [task for (what, _), task in self._underway.items() if what == "read"]
        if reads:
            await asyncio.wait(reads, timeout=patience)

    async def _measure(self, url: str, pools: list[Pool]) -> None:
        answer = await self._broker.read(url, pools)
        for pool in pools:
            self._readings[_version(pool)] = answer if isinstance(answer, Unavailable) else answer[pool.id]

    def _conflicts(
        self, pools: list[Pool], urls: Mapping[str, str], readings: Mapping[_Version, BrokerReading | Unavailable]
    ) -> Mapping[str, Conflict]:
        """Who is held; what cannot be read just now is where it was."""
        servers: dict[str | None, Hashable] = {}
        for pool in pools:
            if isinstance(seen := readings.get(_version(pool)), BrokerReading):
                servers[urls.get(pool.id)] = (seen.run_id, seen.database)
        for pool in pools:
            url = urls.get(pool.id)
            if url is not None and (url in servers or self._places.get(pool.uid, ("",))[0] != url):
                self._places[pool.uid] = (url, servers.get(url, url))
        sure = {pool.id for pool in pools if urls.get(pool.id) in servers}
        self._held = sharing.conflicts(pools, self._brokers(pools), sure, self._held)
        return self._held

    def _brokers(self, pools: list[Pool]) -> Mapping[str, Hashable]:
        """By pool id, what identifies its broker, as last known."""
        return {pool.id: self._places[pool.uid][1] for pool in pools if pool.uid in self._places}

    def _begin(self, lane: tuple[str, str], name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start it, unless the same of an earlier pass is still under way."""
        if lane not in self._underway:
            self._underway[lane] = asyncio.create_task(self._carry(lane, name, work))

    async def _carry(self, lane: tuple[str, str], name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception:
            self.passes.errors += 1
            logger.exception("%s: the pass failed, the next one tries again", name)
        finally:
            del self._underway[lane]

    async def _finish(self, patience: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._underway:
                    await asyncio.wait(self._underway.values())

    async def _tend(self, pool: Pool, url: str, reading: BrokerReading | Unavailable, conflict: Conflict | None) -> None:
        """Decide and do what is to be done in the broker; what is to be done where the workers run must not delay the next."""
        failures: list[str] = []
        seen: Mapping[str, TierReplicas] | Unavailable | None = None
        plans: list[TierPlan] = []
        with self._noting(pool, failures):
            seen = await self._workers.observe(pool)
            plans = [] if isinstance(seen, Unavailable) else self._decide(pool, reading, seen)
        acts, refused = pool.spec.mode is Mode.ACTIVE and conflict is None, None
        if acts:
            with self._noting(pool, failures):
                refused = await self._tell(pool, url, reading, plans)

        async def carry_out() -> None:
            if acts and plans and not failures:
                with self._noting(pool, failures):
                    replicas = {plan.tier.name: plan.drain.replicas for plan in plans if not plan.lingers}
                    await self._workers.scale(pool, replicas, frozenset[str]().union(*(plan.drain.leaving for plan in plans)))
            if not failures:
                self._failures.pop(pool.uid, None)
            found = conditions.Findings(
                pool,
                plans,
                self._clock(),
                broker=reading if isinstance(reading, Unavailable) else None,
                refused=refused,
                workers=seen if isinstance(seen, Unavailable) else None,
                conflict=conflict,
                moved=self._moved.get(pool.uid, ()),
                failure="; ".join(failures),
            )
            status, events = conditions.assess(found, self._status.get(pool.uid, pool.status))
            self._status[pool.uid] = status.dump()
            await self._reporter.report(Report(pool, status, reading, events))

        self._begin(("carry out", pool.id), pool.id, carry_out)

    @contextlib.contextmanager
    def _noting(self, pool: Pool, failures: list[str]) -> Iterator[None]:
        """Note what fails unexpectedly, so that the status can say it; the log has each failure once."""
        try:
            yield
        except Exception as error:
            self.passes.errors += 1
            failures.append(repr(error))
            if self._failures.get(pool.uid) != repr(error):
                self._failures[pool.uid] = repr(error)
                logger.exception("%s: the pass failed, the next one tries again", pool.id)

    def _decide(self, pool: Pool, reading: BrokerReading | Unavailable, seen: Mapping[str, TierReplicas]) -> list[TierPlan]:
        plans = planning.plan(pool, reading, seen, self._memory.get(pool.uid, {}), self._clock())
        self._memory[pool.uid] = {plan.tier.name: plan.memory for plan in plans}
        return plans

    async def _tell(
        self, pool: Pool, url: str, reading: BrokerReading | Unavailable, plans: list[TierPlan]
    ) -> Unavailable | None:
        """Publish, reap and rebalance; return why the broker took nothing, where it could be read."""
        if isinstance(reading, Unavailable):
            self._reaper.saw(pool, reading)
            return None
        capacity = planning.capacity(pool.spec, plans, reading.time, self._clock()) if plans else None
        marks = planning.marks(plans, reading.marked) if plans else NO_MARKS
        if ("carry out", pool.id) in self._underway:
            # A count may be on its way down that stands on them.
            marks = replace(marks, remove=frozenset())
        policy, checkpoints = planning.policy(pool.spec, pool.removed), planning.checkpoints(plans)
        refused = await self._broker.publish(url, pool, policy, capacity, marks, checkpoints)
        # A Redis that takes no write takes no presence either: workers that live fall silent there.
        self._reaper.saw(pool, refused or reading)
        if refused:
            known = self._memory.get(pool.uid, {})
            self._memory[pool.uid] = {tier: memory.heard(self._clock()) for tier, memory in known.items()}
        await self._reaper.reap(pool, url, reading)
        if pool.spec.routing.rebalance and capacity and not refused:
            await self._rebalance(pool, url, plans, planning.loads(plans, capacity, reading.time))
        return refused

    async def _rebalance(self, pool: Pool, url: str, plans: list[TierPlan], loads: Mapping[str, Load]) -> None:
        policy, spilled = planning.policy(pool.spec, pool.removed), {plan.tier.name: plan.spilled or 0 for plan in plans}
        looked_in_vain = self._looked_in_vain.setdefault(pool.uid, {})
        for transfer in rebalancing.transfers(policy, loads, spilled):
            if self._clock() - looked_in_vain.get(transfer.way, -math.inf) < LOOK_AGAIN_SECONDS:
                continue
            if moved := await self._broker.rebalance(url, pool, policy, transfer):
                logger.info("%s: %d waiting jobs go %s", pool.id, moved, transfer.message)
                self._moved[pool.uid] = rebalancing.tell(self._moved.get(pool.uid, ()), transfer, moved, self._clock())
            else:
                looked_in_vain[transfer.way] = self._clock()

    def _forget_all_but(self, uids: set[str]) -> None:
        self._reaper.forget_all_but(uids)
        for kept in (self._memory, self._status, self._places, self._looked_in_vain, self._moved, self._failures):
            for uid in kept.keys() - uids:
                del kept[uid]


def _version(pool: Pool) -> _Version:
    """What a reading belongs to: it does not fit the tiers of another generation, nor other removed ones."""
    return pool.uid, pool.generation, tuple(tier.name for tier in pool.removed)
