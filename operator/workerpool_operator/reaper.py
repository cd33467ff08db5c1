"""Takes over from lost workers, and sweeps; part of the operator's pass, of dev mode, and of ``workerpool sweep``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from workerpool_operator import reaping
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Broker, Pool

logger = logging.getLogger("workerpool_operator")

SWEEP_SECONDS = 3.0


class Reaper:
    """Knows how long each Redis has been seen to answer, and acts only when silence means loss.

    Args:
        broker: where the jobs are.
        clock: wall-clock seconds.
    """

    def __init__(self, broker: Broker, clock: Callable[[], float] = time.time) -> None:
        self._broker, self._clock = broker, clock
        self._witnesses: dict[str, reaping.Witness | None] = {}
        self._swept_at: dict[str, float] = {}

    def saw(self, pool: Pool, answer: BrokerReading | Unavailable) -> None:
        """Take note of what the pool's Redis has answered, or that it did not, or took no write."""
        run_id, at = (answer, 0.0) if isinstance(answer, Unavailable) else (answer.run_id, answer.time / 1000)
        self._witnesses[pool.uid] = reaping.witness(self._witnesses.get(pool.uid), run_id, self._clock(), at)

    async def reap(self, pool: Pool, url: str, reading: BrokerReading) -> None:
        """Take over from the lost workers of each tier, and look for what fell between the steps."""
        if not reaping.may_reap(self._witnesses.get(pool.uid)):
            return
        for tier, queue in reading.tiers.items():
            for owner in queue.lost:
                self._tell(pool, await self._broker.take_over(url, pool, tier, owner))
        if abs(self._clock() - self._swept_at.get(pool.uid, float("-inf"))) >= SWEEP_SECONDS:
            self._swept_at[pool.uid] = self._clock()
            self._tell(pool, await self._broker.sweep(url, pool))

    def forget_all_but(self, uids: set[str]) -> None:
        """Drop what is remembered of pools that are gone."""
        for uid in self._witnesses.keys() - uids:
            del self._witnesses[uid]
            self._swept_at.pop(uid, None)

    def _tell(self, pool: Pool, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            logger.warning("%s: %s", pool.id, sentence)
