"""A thread that says every second that this worker is there, and renews what it holds.

A thread, because a worker that is busy (the solo pool, a long callback) must still report; in the main process, because that
one holds the channel.
"""

from __future__ import annotations

import json
import logging
from threading import Event, Thread
from typing import Any

from celery.worker import state

from workerpool_routing import ledger
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.ledger import Call
from workerpool_routing.wire import JOB_LIFE_SECONDS, PRESENCE_PERIOD_SECONDS, SCHEMA_VERSION
from workerpool_routing.worker.attempt import WorkerLife

logger = logging.getLogger("workerpool_routing.worker")


class PresenceReporter:
    """Reports one worker life from the moment it consumes until it has left."""

    def __init__(self, life: WorkerLife, *, worker: str, queue: str) -> None:
        self._life, self._worker, self._queue = life, worker, queue
        self._consumer: Any = None
        self._retiring = False
        self._stopped = Event()
        self._thread: Thread | None = None

    def start(self, sender: Any, **_: Any) -> None:
        """Begin, when the worker is ready to consume; ``sender`` is Celery's consumer."""
        self._consumer = sender
        self._life.timer = sender.timer
        if self._thread is None:
            self._thread = Thread(target=self._run, name="workerpool-presence", daemon=True)
            self._thread.start()

    def retire(self) -> None:
        """From now on the worker only finishes what it has: it reports no slots."""
        self._retiring = True

    def stop(self, **_: Any) -> None:
        """Leave: nothing of this worker is left to take over."""
        self._stopped.set()
        if self._thread is None:
            return
        self._thread.join(timeout=PRESENCE_PERIOD_SECONDS)
        try:
            self._life.connection.run("leave", ledger.leave(self._life.keys, self._life.tier, self._life.owner))
        except PoolUnavailable:
            logger.warning("could not sign off: this worker will be taken for lost in some seconds")

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._report()
            except PoolUnavailable as unavailable:
                logger.warning("presence: %s", unavailable)
            except Exception:
                logger.exception("presence could not be reported")
            self._stopped.wait(PRESENCE_PERIOD_SECONDS)

    def _report(self) -> None:
        life = self._life
        report = {
            "version": SCHEMA_VERSION,
            "owner": life.owner,
            "worker": self._worker,
            "tier": life.tier,
            "queue": self._queue,
            "slots": 0 if self._retiring else self._consumer.pool.num_processes,
            "busy": len(state.reserved_requests),
        }
        keys = [life.keys.presence(life.tier), life.keys.slots(life.tier), life.keys.unacked_index(life.tier)]
        life.connection.run("presence", Call(keys, [json.dumps(report), JOB_LIFE_SECONDS, *self._held_tags()]))

    def _held_tags(self) -> list[str]:
        """Every delivery that the channel has not acknowledged, those with a future ETA among them."""
        task_consumer = self._consumer.task_consumer
        if task_consumer is None:
            return []
        return list(task_consumer.channel.qos._delivered)  # noqa: SLF001 kombu has no public name for it
