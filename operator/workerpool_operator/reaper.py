"""Takes over jobs from lost workers, and sweeps: in the operator's pass, in dev mode, and in ``workerpool sweep``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from workerpool_operator import witness
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Broker, Pool

logger = logging.getLogger("workerpool_operator")

SWEEP_SECONDS = 3.0


class Reaper:
    """Remembers how long each Redis has been seen to work, and acts only when silence means loss (:mod:`witness`).

    Args:
        broker: where the jobs are.
        clock: wall-clock seconds.
    """

    def __init__(self, broker: Broker, clock: Callable[[], float] = time.time) -> None:
        self._broker, self._clock = broker, clock
        self._witnesses: dict[str, witness.Witness | None] = {}
        self._swept_at: dict[str, float] = {}

    def saw(self, pool: Pool, answer: BrokerReading | Unavailable) -> None:
        """Take note of the answer of the pool's Redis, or that it did not answer, or took no writes."""
        run_id, at = (answer, 0.0) if isinstance(answer, Unavailable) else (answer.run_id, answer.time / 1000)
        self._witnesses[pool.uid] = witness.look(self._witnesses.get(pool.uid), run_id, self._clock(), at)

    async def reap(self, pool: Pool, url: str, reading: BrokerReading) -> None:
        """Take over from the lost workers of each tier and, every few seconds, look for jobs that fell between two steps."""
        if not witness.may_reap(self._witnesses.get(pool.uid)):
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
