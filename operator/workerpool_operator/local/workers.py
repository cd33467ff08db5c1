"""The ``Workers`` port with local processes in place of Deployments."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.launch import launch, unsupported
from workerpool_operator.local.process import LocalWorker
from workerpool_operator.model import Tier
from workerpool_operator.observation import Phase, TierReplicas, newest
from workerpool_operator.ports import Pool

FIRST_START_SECONDS = 3.0
"""The assumed start time until one has been seen on this machine: about what a process takes to import an app."""

CROWDED = 2.0
"""The first start of a tier is assumed to take this many times as long as the last start of another tier. That one mostly had the
machine to itself, and this one starts while jobs keep the cores busy. Factors from 2.1 to 3.0 have been seen."""

_SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_SUFFIX_LENGTH = 5


class LocalWorkers:
    """Runs each replica as a Celery process. None of them outlives this process, however it ends.

    Args:
        directory: gets one log file a worker.
        wake: set when a worker became ready, died or is gone.
    """

    def __init__(self, directory: Path, wake: asyncio.Event) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._wake = wake
        self._guardian = Guardian()
        self._workers: dict[tuple[str, str], list[LocalWorker]] = {}

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas]:
        """What runs now, by tier name; a worker that is leaving is no longer counted as desired.

        All tiers start the same app on the same machine, so that the start of one says what that of another may take.
        """
        seen = {tier.name: tuple(worker.replica for worker in self._of(pool, tier)) for tier in pool.spec.tiers}
        ready_at, last = newest(chain.from_iterable(seen.values())) or (0.0, None)
        first = CROWDED * (ready_at - last.ordered_at) if last else FIRST_START_SECONDS
        return {
            tier: TierReplicas(sum(r.phase is not Phase.STOPPING for r in replicas), replicas, first_start=first)
            for tier, replicas in seen.items()
        }

    async def scale(self, pool: Pool, replicas: Mapping[str, int], leaving: frozenset[str]) -> None:
        """Start missing workers and tell surplus ones to stop; wait for neither.

        Raises ValueError for a pool that needs a cluster.
        """
        if problems := unsupported(pool.spec):
            raise ValueError("; ".join(map(str, problems)))
        for tier in pool.spec.tiers:
            staying = [worker for worker in self._of(pool, tier) if worker.phase is not Phase.STOPPING]
            surplus = len(staying) - replicas[tier.name]
            for _ in range(-surplus):
                self._start(pool, tier)
            for worker in [worker for worker in staying if worker.name in leaving][: max(0, surplus)]:
                worker.stop()

    def process_group(self, worker: str) -> int | None:
        """The process group of a worker and all its children; None when it does not run."""
        return next((w.process_group for tier in self._workers.values() for w in tier if w.name == worker), None)

    async def close(self) -> None:
        """Stop every worker, each within its grace period; if cancelled, at once."""
        workers = [worker for tier in self._workers.values() for worker in tier]
        for worker in workers:
            worker.stop()
        try:
            await asyncio.gather(*(worker.life for worker in workers), return_exceptions=True)
        finally:
            self._guardian.close()

    def _of(self, pool: Pool, tier: Tier) -> list[LocalWorker]:
        workers = [worker for worker in self._workers.get((pool.id, tier.name), ()) if not worker.life.done()]
        self._workers[pool.id, tier.name] = workers
        return workers

    def _start(self, pool: Pool, tier: Tier) -> None:
        suffix = "".join(secrets.choice(_SUFFIX_LETTERS) for _ in range(_SUFFIX_LENGTH))
        name = f"{pool.name}-{tier.name}-{suffix}"
        log = self._directory / f"{name}.log"
        worker = LocalWorker(name, launch(pool, tier, name), log, self._guardian, self._wake)
        self._workers[pool.id, tier.name].append(worker)
